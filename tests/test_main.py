"""main.py as a user calls it: in this process where one suffices, through torchrun where several are needed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import main
import training
from arguments import get_args_parser, parse
from checkpoint import Checkpoint
from engine import _binary_targets

ROOT = Path(__file__).resolve().parent.parent
MICRO = """--model kat_micro_patch8_32 --model-kwargs depth=2 embed_dim=32 num_heads=2 --input-size 32 --device cpu
--data-set DIGITS --num-workers 0 --batch-size 32 --warmup-epochs 1 --lr 1e-2 --clip-grad 1""".split()
SMALL = [*MICRO, "--train-subset", "160", "--val-subset", "51"]


def call(*arguments):
    return main.main([str(a) for a in arguments])


def torchrun(processes, *arguments, **kwargs):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(ROOT / "main.py"),
    ]
    return _run([*command, *map(str, arguments)], **kwargs)


def processes(count, *arguments):
    """Like torchrun, but faster: the processes are forked after the imports."""
    return _run([sys.executable, str(ROOT / "tests" / "processes.py"), str(count), *map(str, arguments)])


def _run(command, **kwargs):
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def assert_same_run(one: Path, two: Path):
    assert (one / "log.txt").read_bytes() == (two / "log.txt").read_bytes()
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, two))
        assert a["epoch"] == b["epoch"] and a["best"] == b["best"] and a["updates"] == b["updates"]
        for part in ("model", "model_ema"):
            assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
        assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
        assert all(
            torch.equal(v, b["optimizer"]["state"][i][k])
            for i, s in a["optimizer"]["state"].items()
            for k, v in s.items()
        )


@pytest.mark.parametrize(
    "options",
    [["--repeated-aug"], ["--sched-on-updates", "--num-workers", "1", "--grad-accum-steps", "2"]],
    ids=["epochs", "updates"],
)
def test_stopped_and_resumed_is_the_straight_run(tmp_path, monkeypatch, options):
    flags = [*SMALL, "--epochs", "3", "--drop", "0.1", *options]
    assert call(*flags, "--output-dir", tmp_path / "straight") == 0
    original, epochs = main.train_one_epoch, []

    def stop_in_second_epoch(training, loader, epoch, *rest):
        result = original(training, loader, epoch, *rest)
        epochs.append(epoch)
        if epochs == [0, 1]:
            raise KeyboardInterrupt  # after its updates, before its evaluation and its checkpoint
        return result

    monkeypatch.setattr(main, "train_one_epoch", stop_in_second_epoch)
    assert call(*flags, "--output-dir", tmp_path / "stopped") == 130
    assert len(log(tmp_path / "stopped")) == 1
    (tmp_path / "stopped" / "log.txt").open("a").write('{"epoch": 1, "tra')  # cut short, as by a crash
    assert (
        call(
            "--resume",
            "auto",
            "--output-dir",
            tmp_path / "stopped",
            "--num-workers",
            "1" if "--num-workers" in options else "0",
            "--device",
            "cpu",
        )
        == 0
    )
    assert epochs == [0, 1, 1, 2]
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_two_processes_killed_and_resumed(tmp_path):
    flags = [*SMALL, "--epochs", "3", "--no-repeated-aug"]
    assert torchrun(2, *flags, "--output-dir", tmp_path / "straight").returncode == 0
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "main.py"),
            *flags,
            "--epochs",
            "3",
            "--output-dir",
            str(stopped),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    while not (stopped / "checkpoint.pth").exists() and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = torch.load(stopped / "checkpoint.pth", weights_only=True)["epoch"]
    assert done < 2, "the run was over before it could be stopped"
    result = torchrun(2, *flags, "--output-dir", stopped, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "straight", stopped)


def test_evaluation_is_the_same_for_1_2_and_3_processes(tmp_path, capfd):
    assert call(*SMALL, "--epochs", "1", "--output-dir", tmp_path) == 0
    capfd.readouterr()
    evaluate = [
        "--eval",
        "--resume",
        tmp_path / "checkpoint.pth",
        "--val-subset",
        "101",
        "--batch-size",
        "8",
        "--num-workers",
        "0",
        "--device",
        "cpu",
    ]
    assert call(*evaluate) == 0
    pattern = r"(?:raw|EMA) weights: Acc@1 .* \(101 images\)"
    alone = re.findall(pattern, capfd.readouterr().out)
    assert len(alone) == 2
    for count in (2, 3):
        result = processes(count, *evaluate)
        assert re.findall(pattern, result.stdout) == alone, result.stdout + result.stderr


def test_eval_of_the_best_checkpoint_prints_the_training_s_figure(tmp_path, capfd):
    assert call(*SMALL, "--epochs", "2", "--output-dir", tmp_path, "--save-every", "1") == 0
    output = capfd.readouterr().out
    best = re.search(r"best top-1 ([\d.]+) % \((\w+) weights", output).groups()
    assert call("--eval", "--resume", tmp_path / "best_checkpoint.pth", "--device", "cpu") == 0
    assert f"top-1 {best[0]} % ({best[1]} weights)" in capfd.readouterr().out
    entries = log(tmp_path)
    assert [e["epoch"] for e in entries] == [0, 1]
    assert entries[-1]["max_accuracy"] == max(max(e["test_acc1"], e["test_ema_acc1"]) for e in entries)
    assert {"checkpoint-0001.pth", "checkpoint-0002.pth", "curves.png", "args.json", "speed.txt"} <= set(
        os.listdir(tmp_path)
    )
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "args.json").read_text())["versions"]["torch"] == torch.__version__
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]


def test_an_earlier_run_in_the_folder_is_kept_aside(tmp_path, capfd):
    for _ in range(3):
        assert (
            call(*SMALL, "--train-subset", "64", "--epochs", "1", "--save-every", "1", "--output-dir", tmp_path / "out")
            == 0
        )
    assert "held an earlier run: moved to" in capfd.readouterr().out
    for folder in ("out", "out/earlier-1", "out/earlier-2"):
        assert {"checkpoint.pth", "best_checkpoint.pth", "checkpoint-0001.pth", "log.txt", "curves.png"} <= set(
            os.listdir(tmp_path / folder)
        )
    assert (
        call(
            "--resume",
            tmp_path / "out" / "earlier-1" / "checkpoint.pth",
            "--epochs",
            "2",
            "--output-dir",
            tmp_path / "out",
            "--device",
            "cpu",
        )
        == 0
    )
    assert (tmp_path / "out" / "earlier-3").is_dir() and [e["epoch"] for e in log(tmp_path / "out")] == [1]
    (tmp_path / "file").touch()
    assert call(*SMALL, "--epochs", "1", "--output-dir", tmp_path / "file") == 2
    assert "cannot write into the output folder" in capfd.readouterr().err


def test_nothing_is_saved_without_output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*SMALL, "--epochs", "1") == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixup", "0", "--cutmix", "0", "--bce-loss"],
        ["--cutmix-minmax", "0.2", "0.8", "--mixup-mode", "elem"],
        ["--no-model-ema", "--opt", "lamb"],
        ["--model-ema-decay", "0.9", "--model-ema-force-cpu"],
        ["--three-augment", "--src"],
        ["--amp"],
        ["--sched", "plateau"],
        ["--sched", "none"],
        ["--sched", "step", "--lr-noise", "0.1", "0.9"],
        ["--sched", "multistep"],
        ["--grad-checkpointing", "--decay-rational"],
        ["--init", "variance_preserving", "--no-aug"],
        ["--opt", "sgd", "--momentum", "0.8", "--clip-mode", "agc"],
        ["--model_ema", "--data_set", "DIGITS"],
    ],
)
def test_options_train_and_resume(tmp_path, flags):
    assert call(*SMALL, *flags, "--train-subset", "64", "--epochs", "1", "--output-dir", tmp_path) == 0
    assert (
        call(*SMALL, *flags, "--train-subset", "64", "--epochs", "2", "--output-dir", tmp_path, "--resume", "auto") == 0
    )
    entries = log(tmp_path)
    assert len(entries) == 2 and all(e["train_loss"] == e["train_loss"] for e in entries)


def built(monkeypatch, *flags):
    """The Training that main.py builds for these flags."""
    seen = []

    def stop(training, *rest):
        seen.append(training)
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "train_one_epoch", stop)
    assert call(*SMALL, "--train-subset", "64", *flags) == 130
    return seen[0]


def test_bce_targets_under_mixup_name_two_classes_at_most(monkeypatch):
    training = built(monkeypatch, "--bce-loss", "--epochs", "1")
    _, targets = training.mixup(torch.randn(8, 3, 32, 32), torch.arange(8))
    assert 1 <= _binary_targets(targets, 10).sum(1).max() <= 2


def test_lr_noise_covers_its_share_of_the_epochs(monkeypatch):
    training = built(monkeypatch, "--lr-noise", "0.1", "0.9", "--epochs", "10")
    assert training.scheduler.noise_range_t == [1, 9]


def test_plateau_without_warm_up_starts_at_the_base_rate(monkeypatch):
    training = built(
        monkeypatch, "--sched", "plateau", "--warmup-epochs", "0", "--lr", "1e-3", "--unscale-lr", "--epochs", "3"
    )
    assert training.optimizer.param_groups[0]["lr"] == 1e-3


def test_explicit_settings_win_on_resume(tmp_path, monkeypatch):
    assert call(*SMALL, "--train-subset", "64", "--epochs", "1", "--sched", "plateau", "--output-dir", tmp_path) == 0
    assert call("--resume", tmp_path / "checkpoint.pth", "--opt", "sgd", "--epochs", "2") == 2
    training = built(
        monkeypatch,
        "--resume",
        str(tmp_path / "checkpoint.pth"),
        "--epochs",
        "2",
        "--weight-decay",
        "0.3",
        "--opt-betas",
        "0.9",
        "0.95",
        "--sched",
        "cosine",
        "--output-dir",
        str(tmp_path / "out"),
    )
    assert {g["weight_decay"] for g in training.optimizer.param_groups} == {0.0, 0.3}
    assert training.optimizer.param_groups[0]["betas"] == (0.9, 0.95) and training.optimizer.state


def test_a_run_from_pretrained_weights_resumes():
    settings = {"pretrained": True, "compile": True, "epochs": 7}
    checkpoint = Checkpoint("x", {}, model="kat_tiny_patch16_224", settings=settings)
    args = parse(["--resume", "x", "--output-dir", "y"], lambda _: checkpoint).args
    assert (args.pretrained, args.compile, args.epochs) == (False, True, 7)
    args = parse(["--resume", "x", "--eval", "--batch-size", "25"], lambda _: checkpoint).args
    assert (args.compile, args.epochs) == (False, 7)


def test_evaluation_needs_no_more_than_weights(tmp_path, capfd):
    assert call(*SMALL, "--epochs", "1", "--output-dir", tmp_path) == 0
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    torch.save({k: state[k] for k in ("model", "model_ema")}, tmp_path / "weights.pth")
    assert call(*SMALL, "--eval", "--resume", tmp_path / "weights.pth") == 0
    assert call(*SMALL, "--resume", tmp_path / "weights.pth") == 2
    assert "holds weights but no training to resume" in capfd.readouterr().err


@pytest.mark.parametrize("model", ["resnet10t", "vgg11"])
def test_other_timm_models_train(model):
    assert (
        call(
            *[f for f in SMALL if "=" not in f and f != "--model-kwargs"],
            "--model",
            model,
            "--train-subset",
            "8",
            "--batch-size",
            "4",
            "--val-subset",
            "4",
            "--epochs",
            "1",
            "--drop-path",
            "0",
            "--no-model-ema",
        )
        == 0
    )


def test_distillation_with_and_without_a_token(tmp_path):
    teacher = ["--teacher-model", "kat_micro_patch8_32", "--teacher-path", tmp_path / "teacher" / "checkpoint.pth"]
    plain = [f for f in SMALL if f not in ("depth=2", "embed_dim=32", "num_heads=2", "--model-kwargs")]
    assert call(*plain, "--epochs", "1", "--output-dir", tmp_path / "teacher") == 0
    for kind, model in (
        ("soft", "kat_micro_distilled_patch8_32"),
        ("hard", "kat_micro_distilled_patch8_32"),
        ("soft", "kat_micro_patch8_32"),
    ):
        assert call(*SMALL, "--model", model, "--epochs", "1", "--distillation-type", kind, *teacher) == 0


@pytest.mark.parametrize("count", [1, 2])
def test_nan_loss_stops_every_process_and_keeps_the_last_good_checkpoint(tmp_path, count, capfd):
    assert call(*SMALL, "--epochs", "1", "--no-repeated-aug", "--output-dir", tmp_path) == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    bad = [
        *SMALL,
        "--no-repeated-aug",
        "--resume",
        tmp_path / "checkpoint.pth",
        "--output-dir",
        tmp_path,
        "--epochs",
        "3",
        "--lr",
        "1e38",
        "--unscale-lr",
        "--clip-grad",
        "1e38",
    ]
    capfd.readouterr()
    if count == 1:
        assert call(*bad) == 1
        error = capfd.readouterr().err
    else:
        result = processes(2, *bad)
        assert result.returncode != 0
        error = result.stderr
    for rank in range(count):
        assert re.search(
            rf"stopped \(process {rank}\): the loss is not finite in epoch 2: rank 0 at step \d+", error
        ), error
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and len(log(tmp_path)) == 1


@pytest.mark.parametrize("images, flags", [(20, []), (3, []), (1, ["--mixup", "0", "--cutmix", "0"])])
def test_fewer_images_than_a_batch_train(images, flags, capfd):
    """Subsets with fewer images than the ten classes of the digits, too."""
    for augmentation in ([], ["--repeated-aug"]):
        assert call(*SMALL, "--train-subset", images, "--val-subset", "3", "--epochs", "1", *augmentation, *flags) == 0
        assert f"batch size {images - images % 2 or 1} instead of 32" in capfd.readouterr().out


def test_fewer_images_than_processes(tmp_path):
    few = [*SMALL, "--train-subset", "2", "--val-subset", "2", "--epochs", "1"]
    result = processes(3, *few, "--mixup", "0", "--cutmix", "0")
    assert result.returncode == 0 and "(2 images)" in result.stdout, result.stderr
    result = processes(3, *few)
    assert (
        result.returncode != 0
        and "too few for mixup and cutmix" in result.stderr
        and "ZeroDivisionError" not in result.stderr
    )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--eval"], "--eval needs --resume"),
        (["--resume", "auto"], "needs --output-dir"),
        (["--run-id", "x"], "needs --run-name"),
        (["--model", "kat_tinny_patch16_224"], "near it: .*kat_tiny_patch16_224"),
        (["--opt", "adamx"], "unknown optimizer 'adamx'; near it: .*adam"),
        (["--batch-size", "3"], "even --batch-size"),
        (["--distillation-type", "soft"], "needs --teacher-path"),
        (
            ["--distillation-type", "soft", "--teacher-path", "x.pth", "--data-path", "/nonexistent"],
            "--teacher-path: there is no checkpoint x.pth",
        ),
        (
            ["--model", "kat_tiny_patch16_224", "--input-size", "1000000000"],
            "cannot build kat_tiny_patch16_224: a tensor of [\\d,]+ GiB does not fit into memory",
        ),
        (["--teacher-path", "x.pth"], "needs --distillation-type"),
        (["--distillation-tau", "0"], "tau must be positive"),
        (["--clip-mode", "agc"], "needs --clip-grad"),
        (
            ["--compile", "--compile-mode", "reduce-overhead", "--grad-accum-steps", "2"],
            "overwrites them: leave it out",
        ),
        (["--no-model-ema", "--model-ema-decay", "0.9"], "do not go together"),
        (["--amp", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
        (["--model", "vit_tiny_patch16_224", "--init", "released"], "cannot build .*: it refuses weight_init=released"),
        (["--epochs", "-1"], "--epochs must be at least 0"),
        (["--device", "gpu"], "no device"),
        (["--model-kwargs", "num_groups=7", "--device", "cpu"], "7 groups"),
        (["--model-kwargs", "depth", "--device", "cpu"], "KEY=VALUE"),
        (["--model-kwargs", "num_heads=0"], "cannot build"),
        (["--lr", "nan"], "--lr must be"),
        (["--model", "vit_micro_patch8_32", "--model-kwargs", "norm_layer=foo"], "unknown 'foo'"),
        (["nowhere", "--data-set", "DIGITS"], "nowhere does not exist"),
        (["--attn-lr", "inf", "--model", "vit_micro_patch8_32_karat"], "must be finite"),
        (["--model", "kat_micro_patch8_32", "--input-size", "1"], "cannot build"),
        (["--model", "kat_micro_patch8_32", "--input-size", "33"], "33 is not a multiple of the patch size 8"),
        (["--drop-path", "2"], "between 0 and 1"),
        (["--std", "0", "0", "0"], "--std"),
        (["--eval", "--resume", "auto", "--output-dir", "/nonexistent"], "finds no checkpoint"),
        (["--opt-betas", "0.9", "--epochs", "1", *SMALL[2:]], "--opt adamw"),
        (["--resume", "missing.pth"], "there is no checkpoint missing.pth"),
        (["--model-kwargs", "widht=3", "--device", "cpu"], "cannot build .*widht"),
        (["--data-set", "IMNET", "--data-path", "/nonexistent"], "/nonexistent"),
        (["--resume", __file__], "not a checkpoint"),
    ],
)
def test_wrong_flags_get_a_sentence_and_exit_2(flags, sentence, capfd):
    assert call(*flags) == 2
    error = capfd.readouterr().err
    assert re.search(sentence, error) and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, place",
    [
        (["--eval"], "in _check"),
        ([*SMALL, "--data-set", "IMNET", "--data-path", "/nonexistent"], "in image_folders"),
        ([*SMALL, "--opt-betas", "0.9"], "IndexError"),
        ([*SMALL, "--output-dir", __file__], "NotADirectoryError|FileExistsError"),
    ],
)
def test_kan_debug_shows_where_a_sentence_comes_from(flags, place, monkeypatch, capfd):
    assert call(*flags) == 2
    sentence = capfd.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1
    monkeypatch.setenv("KAN_DEBUG", "1")
    assert call(*flags) == 2
    error = capfd.readouterr().err
    assert error.startswith("Traceback") and error.endswith(sentence) and re.search(place, error)


@pytest.mark.parametrize("function", ["optimizer_groups", "create_optimizer_v2", "create_scheduler_v2", "Mixup"])
@pytest.mark.parametrize("kind", [TypeError, RuntimeError, AttributeError, KeyError])
def test_a_bug_is_no_user_error(function, kind, monkeypatch):
    def broken(*args, **kwargs):
        raise kind("a bug")

    monkeypatch.setattr(training, function, broken)
    with pytest.raises(kind, match="a bug"):
        call(*SMALL, "--epochs", "1")


def test_wrong_spelling_is_answered_with_the_right_one(capfd):
    with pytest.raises(SystemExit) as caught:
        call("--batchsize", "3")
    assert caught.value.code == 2 and "did you mean --batch-size" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        call("--data-set", "CIFAR11")
    assert "CIFAR10" in capfd.readouterr().err


def test_both_spellings_defaults_and_read_only_arguments():
    a = parse(["--data_set", "CIFAR10", "--weight_decay=0.1", "--model_kwargs", "num_groups=4"]).args
    assert (a.data_set, a.weight_decay, a.model_options) == ("CIFAR10", 0.1, {"num_groups": 4})
    assert (a.batch_size, a.epochs, a.opt, a.sched, a.lr, a.output_dir, a.device) == (
        64,
        100,
        "adamw",
        "cosine",
        5e-4,
        "",
        "cuda",
    )
    with pytest.raises(AttributeError, match="read-only"):
        a.lr = 1
    sizes = [
        parse(["--model", name]).args.input_size
        for name in ("kat_micro_patch8_32", "kat_tiny_patch16_224", "vit_base_patch16_384")
    ]
    assert sizes == [32, 224, 384]
    with pytest.raises(SystemExit) as caught:
        get_args_parser().parse_args(["--help"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("device", "size", "flags", "mode"),
    [
        ("cuda", 1, [], "reduce-overhead"),
        ("cuda", 1, ["--grad-accum-steps", "2"], "default"),
        ("cuda", 2, [], "default"),
        ("cpu", 1, [], "default"),
        ("cuda", 1, ["--compile-mode", "default"], "default"),
        ("cuda", 2, ["--compile-mode", "max-autotune"], "max-autotune"),
    ],
)
def test_compile_mode(device, size, flags, mode):
    args = parse(["--data-set", "DIGITS", "--compile", *flags]).args
    assert training.compile_mode(args, main.World(0, size, torch.device(device))) == mode


@pytest.mark.parametrize("options, graphs", [((), 0), pytest.param(("--compile",), 2, marks=pytest.mark.slow)])
def test_compile_covers_evaluation(tmp_path, capfd, options, graphs):
    """Raw and EMA weights, full and smaller batches share one graph; training has another one."""

    def run(*flags):
        torch.compiler.reset()
        counters.clear()
        assert call(*flags) == 0
        lines = re.findall(r"(\w+) weights: Acc@1 ([\d.]+)  Acc@5 ([\d.]+)  loss ([\d.]+)", capfd.readouterr().out)
        return {f"{name} {i}": float(v) for name, *values in lines for i, v in enumerate(values)}

    trained = run(*SMALL, *options, "--epochs", "2", "--eval-every", "2", "--output-dir", tmp_path)
    assert counters["stats"]["unique_graphs"] == graphs
    evaluated = run("--eval", "--resume", tmp_path / "checkpoint.pth", "--device", "cpu", "--compile")
    assert counters["stats"]["unique_graphs"] == 1
    assert len(evaluated) == 6 and evaluated == pytest.approx(trained, abs=2e-5)


def test_learning_rate_line(capfd):
    flags = [*SMALL, "--train-subset", "64", "--epochs", "0", "--batch-size", "32", "--grad-accum-steps", "4"]
    call(*flags, "--lr", "1e-3")
    assert (
        "learning rate 0.00025 (base 0.001 x 128 / 512; global batch 128 = 32 images x 1 processes x 4 accumulated)"
        in capfd.readouterr().out
    )
    call(*flags, "--lr", "1e-3", "--unscale-lr")
    assert "learning rate 0.001 (not scaled; global batch 128" in capfd.readouterr().out


def test_wandb_never_stops_a_run(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert (
        call(*SMALL, "--train-subset", "64", "--epochs", "1", "--output-dir", tmp_path / "run", "--run-name", "test")
        == 0
    )
    assert "logging offline" in capfd.readouterr().out
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_other_model_or_optimizer_in_the_checkpoint(tmp_path, capfd):
    assert call(*SMALL, "--epochs", "1", "--output-dir", tmp_path) == 0
    capfd.readouterr()
    assert (
        call(
            "--resume",
            tmp_path / "checkpoint.pth",
            "--model",
            "vit_micro_patch8_32",
            "--device",
            "cpu",
            "--epochs",
            "2",
        )
        == 2
    )
    assert "the checkpoint is of kat_micro_patch8_32, not vit_micro_patch8_32: drop --model" in capfd.readouterr().err
    shutil.copy(tmp_path / "checkpoint.pth", tmp_path / "cut.pth")
    os.truncate(tmp_path / "cut.pth", 10_000)
    assert call("--eval", "--resume", tmp_path / "cut.pth") == 2
    assert "damaged" in capfd.readouterr().err
