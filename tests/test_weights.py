"""Files of every foreign layout, with the real names and shapes, against what their tensors imply; hostile files; --finetune."""

import argparse
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
import weights
from checkpoints import CheckpointError
from models.kat import PUBLISHED, default_cfgs
from models.load import choose, load_all, load_matching
from tests.reference_vit import logits, npz_arrays, npz_logits

TRAINER_ARGS = dict(
    batch_size=128,
    lr=1e-3,
    opt="adamw",
    aa="rand-m9-mstd0.5",
    output_dir=Path("/checkpoint/1"),
    device="cuda",
    resume="",
    drop_path=0.1,
)


def random_weights(name: str, **kwargs) -> dict[str, torch.Tensor]:
    """The state dict of a timm model, filled at random so that every tensor matters."""
    torch.manual_seed(1)
    model = timm.create_model(name, **kwargs)
    return {key: value + 0.05 * torch.randn_like(value) for key, value in model.state_dict().items()}


def layouts(kat: dict, deit: dict) -> dict[str, object]:
    """file name -> content as the trainers write it."""
    other = {name: torch.zeros_like(value) for name, value in kat.items()}
    state = {
        "state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
    }
    flash = {
        name.replace("weight_numerator", "numerator_v").replace("weight_denominator", "denominator_v"): value
        for name, value in kat.items()
    }
    deit_args = argparse.Namespace(
        model="deit_tiny_patch16_224", input_size=224, data_set="IMNET", data_path="/imagenet", **TRAINER_ARGS
    )
    kat_args = argparse.Namespace(
        model="kat_tiny_swish_patch16_224",
        input_size=None,
        img_size=None,
        mean=[0.5, 0.5, 0.5],
        crop_pct=0.9,
        **TRAINER_ARGS,
    )
    return {
        "deit_tiny_patch16_224-a1311bcf.pth": {"model": deit},
        "deit_checkpoint.pth": {
            "model": deit,
            "optimizer": state,
            "lr_scheduler": {"t_initial": 300},
            "epoch": 7,
            "scaler": {"scale": 65536.0},
            "model_ema": {name: value + 1 for name, value in deit.items()},
            "args": deit_args,
        },
        "timm_model_best.pth.tar": {
            "epoch": 9,
            "arch": "kat_tiny_swish_patch16_224",
            "state_dict": {f"module.{n}": v for n, v in kat.items()},
            "optimizer": state,
            "version": 2,
            "args": kat_args,
            "amp_scaler": {},
            "metric": 74.5,
            "state_dict_ema": {f"_orig_mod.{n}": v for n, v in other.items()},
        },
        "kat_tiny_patch16_224_1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth": kat,
        "flash_kat_tiny_swish_patch16_224.pth": {"state_dict": {f"module._orig_mod.{n}": v for n, v in flash.items()}},
        "kat_tiny_patch16_224.safetensors": kat,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a file in each layout, and the tensors of KAT-T and DeiT-T in them."""
    folder = tmp_path_factory.mktemp("files")
    kat, deit = random_weights("kat_tiny_patch16_224"), random_weights("deit_tiny_patch16_224")
    assert len(kat) == 200 and kat["blocks.0.mlp.act1.weight_denominator"].shape == (8, 4)
    for name, content in layouts(kat, deit).items():
        if name.endswith(".safetensors"):
            save_file(content, folder / name)
        else:
            torch.save(
                content, folder / name, _use_new_zipfile_serialization="a1311bcf" not in name
            )  # the oldest files are not zips
    return folder, kat, deit


def outputs_from(source, images) -> torch.Tensor:
    """Logits of the model that the file itself names, filled with the file's raw weights."""
    checkpoint = weights.read(source)
    model = timm.create_model(checkpoint["args"]["model"]).eval()
    load_all(model, checkpoint["model"], source)
    with torch.no_grad():
        return model(images).double()


@pytest.mark.parametrize("name", layouts({}, {}))
def test_every_layout_gives_what_its_tensors_imply(files, name):
    folder, kat, deit = files
    torch.manual_seed(2)
    images = torch.randn(1, 3, 224, 224)
    expected = logits(deit if "deit" in name else kat, images, num_heads=3)
    assert expected.std() > 0.1
    torch.testing.assert_close(outputs_from(folder / name, images), expected, rtol=1e-5, atol=1e-5)


def test_what_a_foreign_checkpoint_says_about_its_model(files):
    folder, _, deit = files
    assert weights.read(folder / "deit_checkpoint.pth")["args"] == {
        "model": "deit_tiny_patch16_224",
        "input_size": 224,
        "opt": "adamw",
    }
    assert weights.read(folder / "timm_model_best.pth.tar")["args"] == {
        "model": "kat_tiny_swish_patch16_224",
        "opt": "adamw",
        "mean": [0.5] * 3,
        "eval_crop_ratio": 0.9,
        "input_size": 224,
    }
    assert weights.read(folder / "flash_kat_tiny_swish_patch16_224.pth")["args"] == {
        "model": "flash_kat_tiny_swish_patch16_224",
        "input_size": 224,
    }
    checkpoint = weights.read(folder / "deit_checkpoint.pth")
    assert torch.equal(choose(checkpoint, True)[0]["norm.bias"], deit["norm.bias"] + 1)
    assert torch.equal(choose(checkpoint, False)[0]["norm.bias"], deit["norm.bias"])
    assert choose(checkpoint, None)[1] == "EMA"
    assert choose({**checkpoint, "epoch": 3, "best": {"epoch": 3, "weights": "raw"}}, None)[1] == "raw"
    with pytest.raises(CheckpointError, match="no averaged weights"):
        choose({"model": deit}, True)


@pytest.mark.parametrize("dim, heads, patch, grid, classes", [(192, 3, 16, 14, 21843), (64, 2, 8, 4, 10)])
def test_augreg_npz(tmp_path, dim, heads, patch, grid, classes):
    arrays = npz_arrays(dim, 12 if dim == 192 else 3, heads, patch, grid, classes)
    np.savez(tmp_path / "Ti_16.npz", **arrays, **{"pre_logits/bias": np.zeros(3, np.float32)})
    checkpoint = weights.read(tmp_path / "Ti_16.npz")
    assert "pre_logits/bias" in checkpoint["model"]  # listed later as left out
    images = torch.randn(1, 3, grid * patch, grid * patch)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=grid * patch,
        patch_size=patch,
        embed_dim=dim,
        num_heads=heads,
        num_classes=classes,
        depth=12 if dim == 192 else 3,
    ).eval()
    lines = load_matching(model, checkpoint["model"], "Ti_16.npz")
    assert lines == [
        f"{len(model.state_dict())} of {len(model.state_dict())} tensors taken from Ti_16.npz",
        "  not in the model, left out: pre_logits/bias",
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), npz_logits(arrays, images), rtol=1e-5, atol=1e-5)


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
        checkpoint = weights.read(f"{url}/{good}")
        assert checkpoint["args"]["model"] == "kat_micro_patch8_32" and torch.equal(
            checkpoint["model"]["norm.bias"], micro["norm.bias"]
        )
        weights.read(f"{url}/no_checksum.pth?download=true")
    assert len(requests) == 2
    with pytest.raises(CheckpointError, match="not the file its name promises"):
        weights.read(f"{url}/{wrong}")
    with pytest.raises(CheckpointError, match="could not be downloaded.*404"):
        weights.read(f"{url}/missing.pth")
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        weights.read("ftpx://nowhere/file.pth")
    assert not list((tmp_path / "hub").rglob("*abab*.pth"))
    for url_of_nothing in ("http://127.0.0.1:9/a b.pth", "http://127.0.0.1:abc/x.pth"):
        with pytest.raises(CheckpointError, match="could not be downloaded"):
            weights.read(url_of_nothing)


def test_a_download_that_was_cut_off_is_not_kept(server):
    url, www, _ = server
    micro = random_weights("kat_micro_patch8_32")
    torch.save(micro, www / "whole.pth")
    (www / "file.pth").write_bytes((www / "whole.pth").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        weights.read(f"{url}/file.pth")
    (www / "whole.pth").rename(www / "file.pth")
    assert torch.equal(weights.read(f"{url}/file.pth")["model"]["norm.bias"], micro["norm.bias"])


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
        assert weights._checksum_in(name) == checksum, name


def test_published_files_belong_to_their_models():
    """KAT's README gives the small file as tiny and the tiny one as small; the names say which is which."""
    for (size, tag), url in PUBLISHED.items():
        assert f"kat_{size}_patch" in url and len(weights._checksum_in(url)) == 64
        assert weights.model_in(url) == f"kat_{size}_patch16_224"
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
    for prefix in weights.HUB:
        checkpoint = weights.read(f"{prefix}someone/kat")
        assert all(torch.equal(checkpoint["model"][name], value) for name, value in micro.items())
        assert checkpoint["args"] == {
            "model": "kat_micro_patch8_32",
            "input_size": 32,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "eval_crop_ratio": 0.95,
        }
    with pytest.raises(CheckpointError, match="hf_hub:someone/else could not be loaded from the hub"):
        weights.read("hf_hub:someone/else")


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
            weights.read(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists("hostile_code_ran") and [str(w.message) for w in recwarn] == []


def micro(name: str = "kat_micro_patch8_32", **kwargs):
    return timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()


def test_everything_that_does_not_fit_is_named():
    source = random_weights("vit_micro_patch8_32", num_classes=4, depth=3)
    model = micro(img_size=48, patch_size=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = load_matching(
        model, {**source, "extra.0.w": torch.zeros(2), "extra.1.w": torch.zeros(2), "extra.3.w": torch.zeros(1)}, "file"
    )
    assert lines[0] == "42 of 72 tensors taken from file"
    assert (
        lines[1]
        == "  resampled: pos_embed (1, 17, 64) -> (1, 145, 64), patch_embed.proj.weight (64, 3, 8, 8) -> (64, 3, 4, 4)"
    )
    assert lines[2] == "  of another shape, not loaded: head.weight (4, 64) -> (10, 64), head.bias (4,) -> (10,)"
    assert "blocks.{0-3}.mlp.act1.weight_numerator" in lines[3] and "blocks.3.attn.qkv.weight" in lines[3]
    assert lines[4] == "  not in the model, left out: extra.{0-1,3}.w"
    after = model.state_dict()
    for name, value in after.items():  # taken, or exactly as before
        expected = source[name] if name in source and source[name].shape == value.shape else before[name]
        assert torch.equal(value, expected) or name in ("pos_embed", "patch_embed.proj.weight"), name
    assert not torch.equal(after["pos_embed"], before["pos_embed"])


def test_weights_of_another_model_are_refused_by_finetuning():
    """The rationals and the classifier's bias of KAT-S fit KAT-T; that is not fine-tuning."""
    with pytest.raises(
        CheckpointError,
        match=r"file does not fit the model kat_micro_patch8_32: nothing was loaded, because the tensors that fit are 314 of",
    ):
        load_matching(micro(), random_weights("kat_micro_patch8_32", embed_dim=96, num_classes=10), "file")


@pytest.mark.parametrize(
    "source, target",
    [
        ("kat_micro_distilled_patch8_32", "kat_micro_patch8_32"),
        ("kat_micro_patch8_32", "kat_micro_distilled_patch8_32"),
    ],
)
@pytest.mark.parametrize("size", [32, 64])
def test_distillation_tokens_come_and_go(source, target, size):
    state = random_weights(source, num_classes=10)
    model = micro(target, img_size=size)
    own = model.state_dict()["pos_embed"].clone()
    load_matching(model, state, "file")
    loaded, tokens = model.state_dict()["pos_embed"], model.num_prefix_tokens
    assert torch.equal(loaded[:, 0], state["pos_embed"][:, 0])
    if tokens == 2:
        assert torch.equal(loaded[:, 1], own[:, 1])
    if size == 32:
        assert torch.equal(loaded[:, tokens:], state["pos_embed"][:, 3 - tokens :])


def test_a_resampled_constant_stays_constant():
    state = random_weights("kat_micro_patch8_32", num_classes=10)
    state["pos_embed"][:, 1:] = torch.arange(64.0)
    model = micro(img_size=72)
    load_all(model, state, "file", resample=True)
    torch.testing.assert_close(model.pos_embed[:, 1:], torch.arange(64.0).expand(1, 81, 64))
    with pytest.raises(CheckpointError, match="pos_embed has shape"):
        load_all(micro(img_size=72), state, "file")


@pytest.mark.parametrize("size", [160, 224, 288])
def test_a_vit_becomes_a_kat_with_the_same_outputs(size):
    """fc, attention, norms and embeddings are taken, rational1 is the identity, rational2 a fit of GELU."""
    state = random_weights("vit_tiny_patch16_224")
    vit, kat = (
        timm.create_model(name, img_size=size).eval() for name in ("vit_tiny_patch16_224", "kat_tiny_gelu_patch16_224")
    )
    for model in (vit, kat):
        lines = load_matching(model, state, "vit")
    assert (
        lines[-1].startswith("  not in the file, start anew: blocks.{0-11}.mlp.act1.weight_numerator, ")
        and "152 of 200" in lines[0]
    )
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours, theirs = kat(images), vit(images)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)


def test_what_a_file_says_about_its_model_cannot_make_timm_read_another(tmp_path, monkeypatch):
    import timm.models._factory

    monkeypatch.setattr(
        timm.models._factory, "load_checkpoint", lambda *args, **kwargs: pytest.fail("timm was made to read a file")
    )
    for option in (
        {"checkpoint_path": "second.bin"},
        {"pretrained": True},
        {"pretrained_cfg": {"url": "http://x"}},
        {"cache_dir": "/tmp"},
    ):
        ours = {
            "model": random_weights("kat_micro_patch8_32"),
            "versions": {},
            "args": {"model": "kat_micro_patch8_32", "model_kwargs": option},
        }
        theirs = {
            "state_dict": ours["model"],
            "args": argparse.Namespace(model="kat_micro_patch8_32", model_kwargs=option),
        }
        for content in (ours, theirs):
            torch.save(content, tmp_path / "file.pth")
            with pytest.raises(CheckpointError, match=f"asks for the model option {next(iter(option))}"):
                weights.read(tmp_path / "file.pth")


@pytest.mark.parametrize(
    "entry",
    [
        {"args": argparse.Namespace(lr=1)},
        {"args": {"mean": ["a", "b", "c"]}},
        {"args": {"model_kwargs": [1]}},
        {"args": {"model": 3}},
        {"args": {"input_size": "32"}},
        {"best": [1]},
        {"classes": [1, 2]},
        {"epoch": "3"},
    ],
)
def test_entries_of_another_type_are_damage(tmp_path, entry):
    torch.save({"model": {"w": torch.ones(1)}, "versions": {}, **entry}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="makes no sense"):
        weights.read(tmp_path / "file.pth")


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
            weights.read(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 5


VITS = {
    "plain": {},
    "no_embed_class": {"no_embed_class": True},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "counted registers": {"reg_tokens": 4},
    "average": {"class_token": False, "global_pool": "avg"},
}


@pytest.mark.parametrize("source", VITS)
@pytest.mark.parametrize("target", VITS)
@pytest.mark.parametrize("size", [32, 48])
def test_positions_of_patches_find_their_place_whatever_stands_before_them(source, target, size):
    state = random_weights("vit_micro_patch8_32", num_classes=10, **VITS[source])
    model = micro("vit_micro_patch8_32", img_size=size, **VITS[target])
    before = model.pos_embed.detach().clone()
    if source == target:
        load_all(model, state, "file", resample=True)
    else:
        load_matching(model, state, "file")
    patches = (size // 8) ** 2
    first, theirs = model.pos_embed.shape[1] - patches, state["pos_embed"].shape[1] - 16
    assert torch.equal(model.pos_embed[:, : min(first, theirs)], state["pos_embed"][:, : min(first, theirs)])
    assert torch.equal(model.pos_embed[:, theirs:first], before[:, theirs:first])
    if size == 32:
        assert torch.equal(model.pos_embed[:, first:], state["pos_embed"][:, theirs:])
    else:
        torch.testing.assert_close(
            model.pos_embed[:, first:].mean(1), state["pos_embed"][:, theirs:].mean(1), atol=0.1, rtol=0
        )


def test_position_embeddings_that_make_no_sense_are_listed(tmp_path):
    for wrong in (torch.zeros(()), torch.zeros(5), torch.zeros(1, 12, 64)):
        state = {**random_weights("vit_micro_patch8_32", num_classes=10), "pos_embed": wrong}
        with pytest.raises(CheckpointError):
            load_all(micro("vit_micro_patch8_32"), state, "file", resample=True)
        assert any(
            "another shape, not loaded: pos_embed" in line
            for line in load_matching(micro("vit_micro_patch8_32"), state, "file")
        )
        torch.save(state, tmp_path / "file.pth")
        weights.read(tmp_path / "file.pth")


def test_the_format_is_seen_in_the_file_not_in_its_name(tmp_path):
    state, arrays = random_weights("kat_micro_patch8_32"), npz_arrays(16, 1, 2, 4, 2, 3)
    save_file(state, tmp_path / "pytorch_model.bin")
    np.savez(tmp_path / "vit.npz", **arrays)
    (tmp_path / "vit.npz").rename(tmp_path / "vit")
    torch.save(state, tmp_path / "kat.safetensors.pth")
    for name in ("pytorch_model.bin", "kat.safetensors.pth"):
        assert torch.equal(weights.read(tmp_path / name)["model"]["norm.bias"], state["norm.bias"])
    read = weights.read(tmp_path / "vit")
    assert (
        torch.equal(read["model"]["head.bias"], torch.from_numpy(arrays["head/bias"]))
        and read["args"]["mean"] == [0.5] * 3
    )  # AugReg's images


def test_harmless_neighbours_of_the_weights(tmp_path):
    state = random_weights("kat_micro_patch8_32")
    for neighbour in (
        {"metric": np.float64(74.5)},
        {"max_accuracy": np.float32(3), "epoch": 2},
        {"args": "kat"},
        {"args": [1]},
        {"args": argparse.Namespace(input_size=[], mean=0.5, crop_pct="x", model_kwargs="abc", img_size=-3, model=7)},
    ):
        torch.save({"state_dict": state, **neighbour}, tmp_path / "file.pth")
        assert weights.read(tmp_path / "file.pth")["args"] == {"input_size": 32}
    torch.save({"net": state, "step": 1}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="no entry 'model' or 'state_dict', but net, step"):
        weights.read(tmp_path / "file.pth")
    for wrong in (
        state["norm.bias"].to_sparse(),
        state["norm.bias"].to("meta"),
        state["norm.bias"] * 1j,
        state["norm.bias"] * float("nan"),
    ):
        torch.save({**state, "norm.bias": wrong}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match="norm.bias"):
            weights.read(tmp_path / "file.pth")
