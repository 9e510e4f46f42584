"""The published weights of KAT, and which model a file is of, by its name."""

import os

import timm

_RELEASES = "https://github.com/Adamdad/kat/releases/download/checkpoint/"
# The published files. Each name ends in the sha256 of its file. (KAT's README swaps the first two links.)
PUBLISHED = {
    ("tiny", "scratch"): _RELEASES
    + "kat_tiny_patch16_224_1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth",
    ("small", "scratch"): _RELEASES
    + "kat_small_patch16_224_32487885cf13d2c14e461c9016fac8ad43f7c769171f132530941e930aeb5fe2.pth",
    ("base", "scratch"): _RELEASES
    + "kat_base_patch16_224_abff874d925d756d15cde97303f772a3460ddbd44b9c53fb9ce5cf15be230fb6.pth",
    ("tiny", "vitft"): _RELEASES
    + "kat_tiny_patch16_224-finetune_64f124d003803e4a7e1aba1ba23500ace359b544e8a5f0110993f25052e402fb.pth",
    ("small", "vitft"): _RELEASES
    + "kat_small_patch_224-finetune_3ae087a4c28e2993468eb377d5151350c52c80b2a70cc48ceec63d1328ba58e0.pth",
    ("base", "vitft"): "https://huggingface.co/adamdad/kat_pretained/resolve/main/"
    "kat_base_patch16_224-finetune_440bf1ead9dd8ecab642078cfb60ae542f1fa33ca65517260501e02c011e38f2.pth",
}


def model_in(source: str) -> str | None:
    """The model that a file name begins with, or that KAT published under this file name.

    For instance deit_tiny_patch16_224 for deit_tiny_patch16_224-a1311bcf.pth.
    """
    file_name = os.path.basename(source)
    published = [size for (size, _), url in PUBLISHED.items() if url.endswith(f"/{file_name}")]
    if published:
        return f"kat_{published[0]}_patch16_224"
    return max((name for name in timm.list_models() if file_name.startswith(name)), key=len, default=None)
