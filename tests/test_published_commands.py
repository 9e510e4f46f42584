"""The commands of the READMEs and scripts of KAT, FlashKAT, DeiT and KArAt; only path, epochs and batch are changed."""

import functools
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main
import models  # noqa: F401
from tests.reference_vit import npz_arrays

ROOT = Path(__file__).resolve().parent.parent
RECIPE = r""" \
    -b 128 --opt adamw --lr 1e-3 --weight-decay 0.05 --epochs 300 --mixup 0.8 --cutmix 1.0 --sched cosine \
    --smoothing 0.1 --drop-path 0.1 --aa rand-m9-mstd0.5 --remode pixel --reprob 0.25 --amp --crop-pct 0.875 \
    --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --model-ema --model-ema-decay 0.9999 \
    --output output/kat_tiny_swish_patch16_224 """
NPZ = (
    "./checkpoints/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz"
)
KAT_FILE = "kat_tiny_patch16_224_1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth"
DEIT_FILE = "deit_tiny_patch16_224-a1311bcf.pth"
TRAIN_KAT = f"bash ./dist_train.sh 8 $DATA_PATH --model kat_tiny_swish_patch16_224{RECIPE}"
COMMANDS = {
    "KAT": f"{TRAIN_KAT}--log-wandb",
    "KAT from ViT": f"{TRAIN_KAT}--initial-checkpoint {NPZ} --log-wandb",
    "KAT from ViT, as for the small model": f"{TRAIN_KAT}--pretrained-path {NPZ} --pretrained --log-wandb",
    "FlashKAT": f"bash ./dist_train.sh 8 $DATA_PATH --model flash_kat_tiny_swish_patch16_224{RECIPE}"
    "--model-kwargs m=6 n=4 num_groups=1 den_groups=8 --log-wandb",
    "KAT evaluation": f"python validate.py $DATA_PATH --model kat_tiny_patch16_224 --checkpoint {KAT_FILE} -b 512",
    "DeiT evaluation": f"python main.py --eval --resume https://dl.fbaipublicfiles.com/deit/{DEIT_FILE} "
    "--model deit_tiny_patch16_224 --data-path /path/to/imagenet",
    "DeiT evaluation without --model": "python main.py --eval "
    f"--resume https://dl.fbaipublicfiles.com/deit/{DEIT_FILE} --data-path /path/to/imagenet",
    "DeiT": "python -m torch.distributed.launch --nproc_per_node=4 --use_env main.py --model deit_tiny_patch16_224 "
    "--batch-size 256 --data-path /path/to/imagenet --output_dir /path/to/save",
    "DeiT at 384": "python main.py --model deit_tiny_patch16_224 --batch-size 32 "
    f"--finetune https://dl.fbaipublicfiles.com/deit/{DEIT_FILE} --input-size 384 --lr 5e-6 --weight-decay 1e-8 "
    "--epochs 30 --min-lr 5e-6 --data-path /path/to/imagenet",
    "DeiT III": "python run_with_submitit.py --model deit_small_patch16_LS --data-path /path/to/imagenet "
    "--batch-size 256 --lr 4e-3 --epochs 800 --weight-decay 0.05 --sched cosine --input-size 224 --reprob 0.0 "
    "--smoothing 0.0 --warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 --opt fusedlamb --warmup-lr 1e-6 "
    "--mixup .8 --drop-path 0.05 --cutmix 1.0 --unscale-lr --repeated-aug --bce-loss --color-jitter 0.3 --ThreeAugment",
}
for name, which in (("G3B", "blockwise"), ("G3U", "universal")):
    COMMANDS[f"KArAt {name}"] = (
        "python main.py --model vit_tiny_patch16_224_karat --batch-size 128 --data-path path/to/imagenet "
        f"--data-set IMNET --output_dir ./output/vit_tiny_patch16_224_FourierKArAt_{name} --epochs 100 --num_workers 8 "
        "--grid 3 --hidden_dim 12 --basis_type FourierBasis --base_fn ZeroModule --base_not_trainable --modular_attn "
        f"--modular_mode phi1_w2 --{which}"
    )
COMMANDS["KArAt evaluation"] = COMMANDS["KArAt G3B"] + " --resume /path/to/checkpoint.pth --eval"
COMMANDS["KArAt fine-tuning"] = COMMANDS["KArAt G3B"] + " --finetune /path/to/pretrained_checkpoint.pth"
COMMANDS["KArAt on several GPUs"] = COMMANDS["KArAt G3U"].replace("python", "torchrun --nproc_per_node=2")
SLOW = {"DeiT III", "KAT from ViT, as for the small model", "DeiT evaluation", "DeiT at 384"}
SLOW |= {"KArAt G3U", "KArAt fine-tuning", "KArAt on several GPUs"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the repository's files, images of two synsets, and files with the published names."""
    folder = tmp_path_factory.mktemp("place")
    for entry in ROOT.iterdir():
        if entry.name not in ("output", "checkpoints", ".git"):
            (folder / entry.name).symlink_to(entry)
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for synset in ("n01440764", "n02119789"):
            path = folder / "imagenet" / split / synset
            path.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(path / f"{i}.JPEG")
    torch.manual_seed(0)
    kat, karat, deit = map(
        timm.create_model, ("kat_tiny_patch16_224", "vit_tiny_patch16_224_karat", "deit_tiny_patch16_224")
    )
    for model in (kat, karat):  # always answers with the second synset, which is ImageNet's class 278
        torch.nn.init.zeros_(model.head.weight)
        with torch.no_grad():
            model.head.bias.copy_(torch.arange(1000) == 278)
    torch.save(kat.state_dict(), folder / KAT_FILE)
    torch.save({"model": deit.state_dict()}, folder / DEIT_FILE)
    torch.save({"model": karat.state_dict()}, folder / "karat.pth")
    (folder / "checkpoints").mkdir()
    np.savez(folder / NPZ, **npz_arrays(192, 12, 3, 16, 14, 21843))
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def adapted(command: str, folder: Path, server: str) -> str:
    """The command with other paths, epochs and batch; URLs lead to `server`, without the real files' checksums."""
    for old, new in (
        ("$DATA_PATH", str(folder / "imagenet")),
        ("/path/to/imagenet", str(folder / "imagenet")),
        ("path/to/imagenet", str(folder / "imagenet")),
        ("/path/to/save", str(folder / "save")),
        ("/path/to/pretrained_checkpoint.pth", str(folder / "karat.pth")),
        ("/path/to/checkpoint.pth", str(folder / "karat.pth")),
        ("https://dl.fbaipublicfiles.com/deit/" + DEIT_FILE, f"{server}/{DEIT_FILE.replace('-a1311bcf', '-local')}"),
        ("\\\n", " "),
        ("--epochs 300", "--epochs 1"),
        ("--epochs 800", "--epochs 1"),
        ("--epochs 100 ", "--epochs 1 "),
        ("--epochs 30 ", "--epochs 1 "),
    ):
        command = command.replace(old, new)
    return re.sub(r"(-b|--batch-size) \d+", r"\1 2", command) + (
        "" if "--eval" in command or "validate" in command or "--epochs" in command else " --epochs 1"
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS]
)
def test_published_command(name, place, monkeypatch, capfd):
    """In this process, hence without its launcher."""
    folder, server = place
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    if not (folder / "deit_tiny_patch16_224-local.pth").exists():
        os.link(folder / DEIT_FILE, folder / "deit_tiny_patch16_224-local.pth")
    command = shlex.split(adapted(COMMANDS[name], folder, server))
    if "validate.py" in command:
        result = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        values = json.loads(result.stdout.split("--result\n")[1])
        assert list(values) == [
            "model",
            "top1",
            "top1_err",
            "top5",
            "top5_err",
            "param_count",
            "img_size",
            "crop_pct",
            "interpolation",
        ]
        assert (values["model"], values["top1"], values["top1_err"], values["param_count"]) == (
            "kat_tiny_patch16_224",
            50.0,
            50.0,
            5.72,
        )
        assert (values["img_size"], values["crop_pct"], values["interpolation"]) == (
            224,
            0.875,
            "bicubic",
        ) and "amp off" in result.stdout
        return
    first = next(i for i, word in enumerate(command) if word in ("main.py", "run_with_submitit.py", "8"))
    assert main.main(command[first + 1 :]) == 0
    output = capfd.readouterr().out
    if name.startswith(("KAT", "FlashKAT")):
        assert "learning rate 0.001 (not scaled, as in timm's and KAT's scripts" in output and "amp bf16" in output
        assert ("150 of 200 tensors taken from" in output) == ("ViT" in name)
    assert ("deit_tiny_patch16_224: " in output or "deit_small_patch16_LS: 22" in output) == name.startswith("DeiT")
    if name.startswith("KArAt"):
        size = "6,483,352" if "--eval" in command else "5,588,630" if "--universal" in command else "6,290,738"
        assert f"vit_tiny_patch16_224_karat: {size} parameters" in output
        assert ("top-1 50.00 % (raw weights)" in output) == ("--eval" in command) != ("base 0.0005 x 2 / 512" in output)
        assert ("tensors taken from" in output) == ("--finetune" in command)
    if "evaluation" not in name and "output" in " ".join(command):
        saved = next(Path(word) for flag, word in zip(command, command[1:]) if flag.startswith("--output"))
        assert (folder / saved / "best_checkpoint.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KAT from ViT", "FlashKAT", "KAT evaluation", "DeiT", "KArAt on several GPUs"])
def test_published_command_in_a_shell(name, place, monkeypatch):
    """With its launcher and all its processes."""
    folder, server = place
    command = adapted(COMMANDS[name], folder, server)
    environment = {
        **os.environ,
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=580
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "global batch 16 = 2 images x 8 processes" in result.stdout or "KAT" not in name or "evaluation" in name
