import hashlib
import io
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import timm
from torchvision.datasets import imagenet

from arguments import parse
from checkpoint import Checkpoint
from run_scripts import extract_imagenet

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "run_scripts"
TRAIN = sorted(p.name for p in SCRIPTS.glob("train_*kat_*.sh"))
FINETUNE = sorted(p.name for p in SCRIPTS.glob("finetune_*.sh"))
# Replaces the interpreter that setup.sh finds and that srun starts: it answers setup.sh and records any other call.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *sys.executable*) echo "$0" ;;
    *check_env.py*) echo "has all of requirements.txt" ;;
    -c*) ;;
    *) printf '%s\\n' "$@" >"$RECORD" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """A function that runs a script in tmp_path; returns the process and the arguments of the last interpreter call."""
    stubs = {
        "python3": PYTHON,
        "srun": 'while [[ $1 = --* ]]; do shift; done\n"$@"',
        "scontrol": 'echo "$@" >&2; echo node07; echo node08',
    }
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "imagenet").mkdir()
    known = {k: v for k, v in os.environ.items() if not re.match(r"SLURM_|GPUS$|MODEL$|CHECKPOINT$|DATA_PATH$|KAT_", k)}

    def run(script, *args, **env):
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        env = (
            known
            | {"PATH": f"{tmp_path / 'bin'}:{known['PATH']}", "RECORD": str(record), "DATA_PATH": "imagenet"}
            | env
        )
        done = subprocess.run(["bash", ROOT / script, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
        return done, record.read_text().splitlines() if record.exists() else None

    return run


def main_arguments(argv, monkeypatch, folder):
    """The arguments that main.py parses from the recorded call, and the number of processes."""
    main = argv.index(str(ROOT / "main.py"))
    assert argv[:3] == ["-m", "torch.distributed.run", "--standalone"] and main == 4
    monkeypatch.chdir(folder)
    args = parse(argv[main + 1 :], lambda source: Checkpoint(source, {}, foreign=True)).args
    return args, int(argv[3].removeprefix("--nproc_per_node="))


def refused(done):
    return done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", [*sorted(SCRIPTS.glob("*.sh")), ROOT / "dist_train.sh"], ids=lambda p: p.name)
def test_parses(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_every_published_row_has_its_script():
    rows = {
        f"train_{kind}_{size}_8x128{ft}.sh"
        for kind in ("kat", "flash_kat")
        for size in ("tiny", "small", "base")
        for ft in ("", "_vitft")
    }
    assert set(TRAIN) == rows and len(FINETUNE) == 3


@pytest.mark.parametrize("folder", ["run_scripts", "scripts"])  # the second is the published command's
@pytest.mark.parametrize("script", TRAIN)
def test_training_scripts_are_the_published_recipe(script, folder, run, monkeypatch, tmp_path):
    done, argv = run(f"{folder}/{script}", "--seed", "3")
    assert done.returncode == 0, done.stderr
    args, processes = main_arguments(argv, monkeypatch, tmp_path)
    kind, size = re.fullmatch(r"train_(kat|flash_kat)_(tiny|small|base)_8x128(?:_vitft)?\.sh", script).groups()
    assert timm.is_model(args.model) and args.model == f"{kind}_{size}_swish_patch16_224"
    assert (args.data_set, args.data_path) == ("IMNET", str(tmp_path / "imagenet"))
    assert (processes, args.batch_size, args.grad_accum_steps, args.epochs) == (8, 128, 1, 300)
    assert (args.lr, args.unscale_lr, args.warmup_lr, args.min_lr, args.sched, args.warmup_epochs) == (
        1e-3,
        True,
        1e-5,
        0,
        "cosine",
        5,
    )
    assert (args.opt, args.weight_decay, args.decay_rational, args.drop_path) == (
        "adamw",
        0.05,
        True,
        0.4 if size == "base" else 0.1,
    )
    assert (args.mixup, args.cutmix, args.smoothing, args.aa) == (0.8, 1.0, 0.1, "rand-m9-mstd0.5")
    assert (args.remode, args.reprob, args.repeated_aug, args.train_interpolation) == ("pixel", 0.25, False, "random")
    assert (args.model_ema, args.model_ema_decay, args.eval_crop_ratio, args.seed) == (True, 0.9999, 0.875, 3)
    assert args.amp in ("bf16", "fp16")
    assert args.model_options == (dict(m=6, n=4, num_groups=1, den_groups=8) if kind == "flash_kat" else {})
    vit = "vitft" in script
    assert args.output_dir == f"output/{args.model}" + "_vitft" * vit
    letter = {"tiny": "Ti", "small": "S", "base": "B"}[size]
    assert re.match(rf"https://\S+/{letter}_16-i21k-\S+\.npz$", args.finetune) if vit else not args.finetune


def test_effective_batch_stays_and_later_arguments_win(run, monkeypatch, tmp_path):
    _, argv = run(
        "run_scripts/train_kat_base_8x128_vitft.sh",
        "--lr",
        "1e-4",
        "--output",
        "elsewhere",
        GPUS="4",
        CHECKPOINT="./vit.npz",
    )
    args, processes = main_arguments(argv, monkeypatch, tmp_path)
    assert (processes, args.batch_size, args.lr, args.output_dir, args.finetune) == (
        4,
        256,
        1e-4,
        "elsewhere",
        "./vit.npz",
    )


@pytest.mark.parametrize(
    "env, word", [({"DATA_PATH": "nowhere"}, "nowhere"), ({"GPUS": "3"}, "1024"), ({"GPUS": "x"}, "1024")]
)
def test_training_scripts_refuse(env, word, run):
    done, argv = run("run_scripts/train_kat_tiny_8x128.sh", **env)
    assert refused(done) and word in done.stderr and argv is None


@pytest.mark.parametrize(
    "row, model, options",
    [
        ("tiny G3B CIFAR10", "vit_tiny_patch16_224_karat", dict(basis_type="FourierBasis", grid=3, universal=False)),
        ("small G3U IMNET", "vit_small_patch16_224_karat", dict(basis_type="FourierBasis", grid=3, universal=True)),
        ("base G1U CIFAR100", "vit_base_patch16_224_karat", dict(basis_type="FourierBasis", grid=1, universal=True)),
        ("tiny G11B CIFAR10", "vit_tiny_patch16_224_karat", dict(grid=11)),
        ("tiny G11B_w1_phi2 CIFAR10", "vit_tiny_patch16_224_karat", dict(grid=11, modular_mode="w1_phi2")),
        (
            "tiny G11B_phi1_phi2 CIFAR10",
            "vit_tiny_patch16_224_karat",
            dict(grid=11, modular_attn=False, modular_mode=None, karat_depth=2),
        ),
        (
            "tiny rationalB CIFAR10",
            "vit_tiny_patch16_224_karat",
            dict(basis_type="RationalBasis", rational_order=[5, 4]),
        ),
        *(
            (
                f"tiny {wavelet}B CIFAR10",
                "vit_tiny_patch16_224_karat",
                dict(basis_type="WaveletBasis", wavelet_type=wavelet),
            )
            for wavelet in ("mexican_hat", "morlet", "dog", "meyer", "shannon")
        ),
        ("tiny vit CIFAR10", "vit_tiny_patch16_224", {}),
    ],
)
def test_karat_script(row, model, options, run, monkeypatch, tmp_path):
    done, argv = run("run_scripts/train_karat.sh", *row.split(), "--seed", "3")
    assert done.returncode == 0, done.stderr
    args, processes = main_arguments(argv, monkeypatch, tmp_path)
    assert (args.model, args.data_set, args.data_path, args.input_size) == (
        model,
        row.split()[2],
        str(tmp_path / "imagenet"),
        224,
    )
    assert {name: args.model_options.get(name) for name in options} == options
    if "karat" in model:
        order = {"modular_attn": True, "modular_mode": "phi1_w2", "karat_depth": None, **options}
        assert {name: args.model_options.get(name) for name in order} == order
        assert (args.model_options["hidden_dim"], args.model_options["base_fn"]) == (12, "ZeroModule")
    else:
        assert args.model_options == {}
    assert (processes * args.batch_size, args.lr, args.unscale_lr, args.epochs) == (
        128 if "IMNET" in row else 32,
        5e-4,
        False,
        100,
    )
    assert (args.opt, args.opt_eps, args.weight_decay, args.decay_rational, args.clip_grad, args.clip_mode) == (
        "adamw",
        1e-6,
        0.05,
        True,
        1.0,
        "norm",
    )
    assert (args.sched, args.warmup_epochs, args.warmup_lr, args.min_lr) == ("cosine", 5, 1e-6, 1e-5)
    assert (args.model_ema_decay, args.scale, args.ratio, args.hflip) == (0.99992, [0.08, 1], [0.67, 1.5], 0.5)
    assert (args.color_jitter, args.aa, args.smoothing) == (0.4, "rand-m15-n2-mstd1.0-inc1", 0.1)
    assert (args.mixup, args.cutmix, args.eval_crop_ratio, args.seed) == (0.8, 1.0, 0.9, 3)
    assert args.output_dir == f"output/{model}_{row.split()[1]}_{args.data_set}"


@pytest.mark.parametrize(
    "words, env, word",
    [
        ("tiny G3B", {}, "SIZE VARIANT DATASET"),
        ("large G3B CIFAR10", {}, "large"),
        ("tiny G3 CIFAR10", {}, "G3"),
        ("tiny haarB CIFAR10", {}, "haarB"),
        ("tiny G3B_phi2 CIFAR10", {}, "G3B_phi2"),
        ("tiny G3B STL10", {}, "STL10"),
        ("tiny G3B CIFAR10", {"GPUS": "3"}, "32"),
        ("tiny G3B IMNET", {"DATA_PATH": "nowhere"}, "DATA_PATH"),
    ],
)
def test_karat_script_refuses(words, env, word, run):
    done, argv = run("run_scripts/train_karat.sh", *words.split(), **env)
    assert refused(done) and word in done.stderr and argv is None


@pytest.mark.parametrize("script", FINETUNE)
def test_fine_tuning_scripts(script, run, monkeypatch, tmp_path):
    done, argv = run(f"run_scripts/{script}", DATA_PATH="")
    assert done.returncode == 0, done.stderr
    args, processes = main_arguments(argv, monkeypatch, tmp_path)
    assert timm.is_model(args.model) and args.finetune == "hf_hub:adamdad/kat_tiny_patch16_224"
    assert args.data_set.lower() in script and args.data_path == str(tmp_path / "data") and args.input_size == 224
    assert (processes * args.batch_size, args.lr, args.unscale_lr, args.epochs) == (32, 5e-4, False, 100)
    assert (args.opt, args.opt_eps, args.weight_decay, args.clip_grad, args.clip_mode) == (
        "adamw",
        1e-6,
        0.05,
        1.0,
        "norm",
    )
    assert (args.sched, args.warmup_epochs, args.warmup_lr, args.min_lr) == ("cosine", 5, 1e-6, 1e-5)
    assert (args.model_ema_decay, args.color_jitter, args.aa, args.smoothing) == (
        0.99992,
        0.4,
        "rand-m15-n2-mstd1.0-inc1",
        0.1,
    )
    assert (args.mixup, args.cutmix, args.eval_crop_ratio) == (0.8, 1.0, 0.9)
    assert args.decay_rational and (args.scale, args.ratio) == ([0.08, 1], [0.67, 1.5])
    assert args.hflip == (0 if args.data_set == "SVHN" else 0.5)


def test_fine_tuning_of_another_model_needs_its_checkpoint(run):
    done, argv = run("run_scripts/finetune_stl10.sh", MODEL="vit_tiny_patch16_224")
    assert refused(done) and "CHECKPOINT" in done.stderr and argv is None
    _, argv = run("run_scripts/finetune_stl10.sh", MODEL="vit_tiny_patch16_224", CHECKPOINT="a b.pth")
    assert argv[argv.index("--finetune") + 1] == "a b.pth"


@pytest.mark.parametrize("args", [(), ("eight",), ("0",), ("--model", "x")])
def test_dist_train_needs_a_number(args, run):
    done, argv = run("dist_train.sh", *args)
    assert refused(done) and "number of processes" in done.stderr and argv is None


def test_slurm(run):
    slurm = dict(
        SLURM_JOB_ID="123456", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[07-08]", SLURM_SUBMIT_DIR=str(ROOT)
    )
    done, argv = run("run_scripts/slurm.sh", "--model", "m", "--output-dir", "a b/%j", **slurm)
    assert done.returncode == 0 and "show hostnames node[07-08]" in done.stderr
    assert argv == [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=gpu",
        "--rdzv_backend=c10d",
        "--rdzv_id=123456",
        "--rdzv_endpoint=node07:13456",
        str(ROOT / "main.py"),
        "--resume",
        "auto",
        "--model",
        "m",
        "--output-dir",
        "a b/123456",
    ]
    assert refused(run("run_scripts/slurm.sh", **(slurm | {"SLURM_SUBMIT_DIR": "/"}))[0]) and refused(
        run("run_scripts/slurm.sh")[0]
    )


def test_deit_s_command_for_slurm(tmp_path, monkeypatch, capfd):
    import run_with_submitit

    monkeypatch.setenv("PATH", str(tmp_path))
    command = [
        "--model",
        "deit_base_patch16_384",
        "--batch-size",
        "32",
        "--finetune",
        "a b.pth",
        "--input-size",
        "384",
        "--use_volta32",
        "--nodes",
        "3",
        "--lr",
        "5e-6",
        "--job_dir",
        str(tmp_path / "jobs" / "%j"),
    ]
    assert run_with_submitit.main(command) == 2 and "no sbatch here" in capfd.readouterr().err
    (tmp_path / "sbatch").write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\n')
    (tmp_path / "sbatch").chmod(0o755)
    assert run_with_submitit.main(command) == 0
    assert capfd.readouterr().out.splitlines() == [
        "--nodes=3",
        "--gpus-per-node=8",
        "--time=2800",
        f"--output={tmp_path}/jobs/%j.txt",
        "--constraint=volta32gb",
        str(ROOT / "run_scripts/slurm.sh"),
        "--model",
        "deit_base_patch16_384",
        "--batch-size",
        "32",
        "--finetune",
        "a b.pth",
        "--input-size",
        "384",
        "--lr",
        "5e-6",
        "--output-dir",
        f"{tmp_path}/jobs/%j",
    ]
    assert (tmp_path / "jobs").is_dir()
    assert run_with_submitit.main(["--model", "deit_base_patch16_224", "--output_dir", "here"]) == 0
    assert capfd.readouterr().out.splitlines()[-4:] == ["--model", "deit_base_patch16_224", "--output_dir", "here"]


def tar(path: Path, files: dict[str, bytes], mode="w") -> bytes:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """ImageNet's three archives with two classes, two training and three validation images."""
    folder = tmp_path / "tars"
    folder.mkdir()
    synsets = np.array(
        [(1, "n01", "tench", "a fish", 0), (2, "n02", "shark, jaws", "a fish", 0), (3, "n00", "fish", "an animal", 2)],
        dtype=[(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")],
    )
    scipy.io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    devkit = {"meta.mat": (tmp_path / "meta.mat").read_bytes(), "ILSVRC2012_validation_ground_truth.txt": b"2\n1\n2\n"}
    inner = {f"{c}.tar": tar(tmp_path / f"{c}.tar", {f"{c}_1.JPEG": c.encode()}) for c in ("n01", "n02")}
    contents = {
        "train": (inner, "w"),
        "val": ({f"ILSVRC2012_val_0000000{i}.JPEG": b"%d" % i for i in (3, 1, 2)}, "w"),
        "devkit": ({f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in devkit.items()}, "w:gz"),
    }
    for part, (files, mode) in contents.items():
        name = imagenet.ARCHIVE_META[part][0]
        monkeypatch.setitem(
            imagenet.ARCHIVE_META, part, (name, hashlib.md5(tar(folder / name, files, mode)).hexdigest())
        )
    return folder


def tree(folder):
    return sorted(str(p.relative_to(folder)) for part in ("train", "val") for p in (folder / part).glob("*/*"))


def test_extract_imagenet_and_go_on_after_an_interruption(archives, tmp_path, capsys):
    (tmp_path / "out/val.unfinished/n01").mkdir(parents=True)  # of a run that was interrupted
    for _ in range(2):
        assert extract_imagenet.main([str(archives), "--out", str(tmp_path / "out")]) == 0
        assert tree(tmp_path / "out") == [
            "train/n01/n01_1.JPEG",
            "train/n02/n02_1.JPEG",
            "val/n01/ILSVRC2012_val_00000002.JPEG",
            "val/n02/ILSVRC2012_val_00000001.JPEG",
            "val/n02/ILSVRC2012_val_00000003.JPEG",
        ]
        assert not list((tmp_path / "out").glob("*.unfinished"))
    assert capsys.readouterr().out.count("was there already") == 2  # by the second run
    assert extract_imagenet.main([str(archives)]) == 0 and tree(archives) == tree(tmp_path / "out")


@pytest.mark.parametrize("part", ["train", "val", "devkit"])
@pytest.mark.parametrize("fault", ["lacks", "md5"])
def test_extract_imagenet_names_the_faulty_archive(part, fault, archives, capsys):
    path = archives / imagenet.ARCHIVE_META[part][0]
    path.write_bytes(path.read_bytes()[:-1]) if fault == "md5" else path.unlink()
    assert extract_imagenet.main([str(archives)]) == 2
    error = capsys.readouterr().err
    assert path.name in error and fault in error and error.count("\n") == 1
    assert not (archives / ("train" if part == "train" else "val")).exists()
