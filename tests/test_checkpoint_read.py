"""Files from URLs and the hub, and hostile or damaged files."""

import functools
import hashlib
import http.server
import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import models  # noqa: F401
from checkpoint import CheckpointError, find, read
from checkpoint.fill import load_all
from checkpoint.read import HUB, LAST, _checksum_in
from models.kat import default_cfgs
from models.published import PUBLISHED, model_in
from tests.data_helpers import random_weights
from tests.reference_vit import npz_arrays


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(URL, folder, list of the requests) of a file server; downloads go to tmp_path/hub."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    (tmp_path / "www").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www"))
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", tmp_path / "www", requests
        httpd.shutdown()


def test_urls_are_downloaded_once_and_checked(server, tmp_path):
    url, www, requests = server
    micro = random_weights("kat_micro_patch8_32")
    torch.save(micro, www / "x.pth")
    digest = hashlib.sha256((www / "x.pth").read_bytes()).hexdigest()
    good, wrong = f"kat_micro_patch8_32_{digest}.pth", f"kat_micro_patch8_32_{'ab' * 32}.pth"
    for name in (good, wrong, "no_checksum.pth"):
        (www / name).write_bytes((www / "x.pth").read_bytes())
    for _ in range(2):
        checkpoint = read(f"{url}/{good}")
        assert model_in(checkpoint.source) == "kat_micro_patch8_32"
        assert torch.equal(checkpoint.weights["norm.bias"], micro["norm.bias"])
        read(f"{url}/no_checksum.pth?download=true")
    assert len(requests) == 2
    with pytest.raises(CheckpointError, match="not the file its name promises"):
        read(f"{url}/{wrong}")
    with pytest.raises(CheckpointError, match="could not be downloaded.*404"):
        read(f"{url}/missing.pth")
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        read("ftpx://nowhere/file.pth")
    assert not list((tmp_path / "hub").rglob("*abab*.pth"))
    for url_of_nothing in ("http://127.0.0.1:9/a b.pth", "http://127.0.0.1:abc/x.pth"):
        with pytest.raises(CheckpointError, match="could not be downloaded"):
            read(url_of_nothing)


def test_a_download_that_was_cut_off_is_not_kept(server):
    url, www, _ = server
    micro = random_weights("kat_micro_patch8_32")
    torch.save(micro, www / "whole.pth")
    (www / "file.pth").write_bytes((www / "whole.pth").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        read(f"{url}/file.pth")
    (www / "whole.pth").rename(www / "file.pth")
    assert torch.equal(read(f"{url}/file.pth").weights["norm.bias"], micro["norm.bias"])


def test_checksums_in_names():
    for name, checksum in (
        ("deit_tiny_patch16_224-a1311bcf.pth", "a1311bcf"),
        ("run-20240101.pth", None),
        ("kat_tiny_patch16_224.pth", None),
        ("kat_tiny_1a2b3c4d.pth", None),
        (f"kat_tiny_{'1a' * 32}.pth", "1a" * 32),
        ("S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz", None),
        ("model_best.pth", None),
    ):
        assert _checksum_in(name) == checksum, name


def test_published_files_belong_to_their_models():
    """KAT's README gives the small file as tiny and the tiny one as small; the names say which is which."""
    for (size, tag), url in PUBLISHED.items():
        assert f"kat_{size}_patch" in url and len(_checksum_in(url)) == 64
        assert model_in(url) == f"kat_{size}_patch16_224"
        assert default_cfgs[f"kat_{size}_patch16_224"].cfgs[tag].url == url
    small = Path(PUBLISHED["small", "scratch"]).name
    with pytest.raises(CheckpointError, match="kat_tiny_patch16_224 .its name says kat_small_patch16_224.*shape"):
        load_all(
            timm.create_model("kat_tiny_patch16_224"), timm.create_model("kat_small_patch16_224").state_dict(), small
        )


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_hub_names(tmp_path, monkeypatch, file_name):
    """Through the hub's client and its cache, as after a download."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--kat"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    micro = random_weights("kat_micro_patch8_32", num_classes=7)
    (save_file if file_name.endswith("safetensors") else torch.save)(micro, snapshot / file_name)
    (snapshot / "config.json").write_text(
        json.dumps(
            {
                "architecture": "kat_micro_patch8_32",
                "num_classes": 7,
                "pretrained_cfg": {
                    "input_size": [3, 32, 32],
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.5, 0.5, 0.5],
                    "crop_pct": 0.95,
                },
            }
        )
    )
    if not file_name.endswith(
        "safetensors"
    ):  # the client asks for the safe file first, and offline remembers that there is none
        no_exist = repository / ".no_exist" / ("0" * 40)
        no_exist.mkdir(parents=True)
        (no_exist / "model.safetensors").touch()
    for prefix in HUB:
        checkpoint = read(f"{prefix}someone/kat")
        assert all(torch.equal(checkpoint.weights[name], value) for name, value in micro.items())
        assert checkpoint.model == "kat_micro_patch8_32" and checkpoint.foreign
        assert checkpoint.settings == {
            "input_size": 32,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "eval_crop_ratio": 0.95,
        }
    with pytest.raises(CheckpointError, match="hf_hub:someone/else could not be loaded from the hub"):
        read("hf_hub:someone/else")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_code_ran",)


def test_bad_files_get_a_sentence_and_run_nothing(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "x": Hostile()}, "hostile.pth")
    torch.save({"model": {}, "x": Hostile()}, "hostile_old.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": torch.nn.Linear(2, 2)}, "module.pth")
    with open("pickle.pth", "wb") as file:
        pickle.dump(Hostile(), file)
    np.savez("hostile.npz", **{**npz_arrays(8, 1, 2, 4, 2, 3), "cls": np.array([Hostile()], dtype=object)})
    np.savez("other.npz", x=np.zeros(3))
    Path("other.safetensors").write_bytes(b"\xff" * 100)
    torch.save({"model": {"w": torch.randn(1000)}}, "whole.pth")
    for name, suffix in (("whole.pth", "pth"), ("hostile.npz", "npz")):
        whole = Path(name).read_bytes()
        Path(f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
    Path("empty.pth").touch()
    Path("empty.npz").touch()
    Path("text.pth").write_text("not a checkpoint")
    Path("folder.pth").mkdir()
    torch.save([1, 2], "list.pth")
    torch.save({"lr": 1}, "no_weights.pth")
    for name, sentence in {
        "hostile.pth": r"(posix|nt)\.system.*nothing in it was run",
        "hostile_old.pth": r"(posix|nt)\.system",
        "module.pth": "other than tensors",
        "pickle.pth": "nothing in it was run",
        "hostile.npz": "damaged",
        "other.npz": "damaged",
        "other.safetensors": "damaged",
        "truncated.pth": "damaged",
        "truncated.npz": "damaged",
        "empty.pth": "damaged",
        "empty.npz": "damaged",
        "text.pth": "damaged",
        "list.pth": "holds a list",
        "no_weights.pth": "no weights",
        "folder.pth": "is a folder",
        "missing.pth": "there is no checkpoint missing.pth",
    }.items():
        with pytest.raises(CheckpointError, match=sentence) as caught:
            read(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists("hostile_code_ran") and [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("kind", ["npz", "legacy.pth", "pth", "safetensors"])
def test_flipped_bytes_never_end_in_a_traceback(tmp_path, kind):
    rng, path = np.random.default_rng(0), tmp_path / f"file.{kind}"
    if kind == "npz":
        np.savez_compressed(path, **npz_arrays(16, 1, 2, 4, 2, 3))
    elif kind == "safetensors":
        save_file({"w": torch.ones(50)}, path)
    else:
        torch.save({"model": {"w": torch.ones(50)}}, path, _use_new_zipfile_serialization=kind == "pth")
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            read(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 5


def test_find(tmp_path):
    assert find("", "") is None and find("auto", str(tmp_path)) is None
    (tmp_path / LAST).touch()
    assert find("auto", str(tmp_path)) == str(tmp_path / LAST)
    assert find("a/b.pth", "") == "a/b.pth"
