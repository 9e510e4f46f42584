"""Every flag of DeiT, KArAt, KAT and timm that the published commands use parses and has its effect.

The flags of Kolmogorov-Arnold functions are in test_karat_flags.py.
"""

import contextlib
import inspect
import io
import json
import math
import os
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from timm.data.auto_augment import AutoAugment, RandAugment
from torch import nn

import main
import transforms
from arguments import get_args_parser, parse
from checkpoint import Checkpoint
from losses import CosubLoss
from models.kat import KAT
from run_folder import RUN_FILES

DEIT = """
--batch-size --epochs --bce-loss --unscale-lr --model --input-size --drop --drop-path --model-ema --no-model-ema
--model-ema-decay --model-ema-force-cpu --opt --opt-eps --opt-betas --clip-grad --momentum --weight-decay --sched --lr
--lr-noise --lr-noise-pct --lr-noise-std --warmup-lr --min-lr --decay-epochs --warmup-epochs --cooldown-epochs
--patience-epochs --decay-rate --dr --color-jitter --aa --smoothing --train-interpolation --repeated-aug
--no-repeated-aug --train-mode --no-train-mode --ThreeAugment --src --reprob --remode --recount --resplit --mixup
--cutmix --cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode --teacher-model --teacher-path
--distillation-type --distillation-alpha --distillation-tau --cosub --finetune --attn-only --data-path --data-set
--inat-category --output_dir --device --seed --resume --start_epoch --eval --eval-crop-ratio --dist-eval --num_workers
--pin-mem --no-pin-mem --distributed --world_size --dist_url --run-name --run-id
"""
KAT_TIMM = """
DATA -b --amp --crop-pct --mean --std --output --log-wandb --initial-checkpoint --checkpoint --pretrained
--pretrained-path --model-ema-decay --aa --remode --reprob --drop-path --sched --model-kwargs --num-classes
--nb-classes --result --use-ema
"""

BASE = """--model kat_micro_patch8_32 --model-kwargs depth=1 embed_dim=32 num_heads=2 --input-size 32
--train-subset 64 --val-subset 20 --device cpu --num-workers 0 --epochs 10"""
RATE_1 = "--unscale-lr --lr 1 --warmup-epochs 0"
TEACHER = "--teacher-model kat_micro_patch8_32 --teacher-path @teacher.pth"
LAST, FOUR = "@run/checkpoint.pth", "--train-subset 4 --val-subset 4"


def build(folder, command: str) -> SimpleNamespace:
    """What main.py builds from a command line: exit code, out, err, the arguments of run_epochs, those of wandb.init.

    Only --epochs 1 trains. In the command line "@" stands for the folder of the files, a leading NAME=VALUE sets the
    environment, and DATA moves the next word to the front.
    """
    words = command.replace("@", f"{folder}/").split()
    environment = dict(word.split("=") for word in words if re.match("[A-Z_]+=", word))
    words = [word for word in words if word.split("=")[0] not in environment]
    if "DATA" in words:
        place = words.index("DATA")
        words = [words[place + 1], *words[:place], *words[place + 2 :]]
    b = SimpleNamespace(wandb=None, at=folder)
    run_epochs = main.run_epochs

    def capture(*args):
        vars(b).update(inspect.signature(run_epochs).bind(*args).arguments)
        b.model, b.optimizer, b.groups = b.training.model, b.training.optimizer, b.training.optimizer.param_groups
        b.batches, b.steps = b.loader.loader, b.loader.loader.dataset.transform.transforms
        b.sampler = b.loader.sampler
        b.eval_steps = b.val_loader.loader.dataset.transform.transforms
        if b.epochs.stop == 1:
            run_epochs(*args)

    fake = SimpleNamespace(Settings=lambda **_: None, init=lambda **options: setattr(b, "wandb", options))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(main, "run_epochs", capture)
        patch.setitem(sys.modules, "wandb", fake)
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        for name, value in {"WANDB_MODE": "offline", **environment}.items():
            patch.setenv(name, value)
        b.code = main.main(words)
    b.out, b.err = out.getvalue(), err.getvalue()
    return b


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tree of images, iNaturalist files, a checkpoint after one epoch, weights of a micro model and of a teacher."""
    folder = tmp_path_factory.mktemp("flags")
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (folder / "tree" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40), (60 * i, 100, 0)).save(folder / "tree" / name / f"{i}.png")
    images = [{"file_name": f"train_val2018/Insecta/{c}/{c}.png"} for c in range(2)]
    for c in range(2):
        (folder / "inat/train_val2018/Insecta" / str(c)).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(folder / "inat" / images[c]["file_name"])
    for name, content in {
        "categories": [{"name": "ant", "genus": "A"}, {"name": "asp", "genus": "A"}],
        "val2018": {"images": images},
        "train2018": {"images": images, "annotations": [{"category_id": 0}, {"category_id": 1}]},
    }.items():
        (folder / "inat" / f"{name}.json").write_text(json.dumps(content))
    assert build(folder, f"{BASE} --epochs 1 --output-dir @run").code == 0
    torch.save(build(folder, f"{BASE} --seed 7").model.state_dict(), folder / "weights.pth")
    torch.save(build(folder, f"{BASE} --model-kwargs").model.state_dict(), folder / "teacher.pth")
    return folder


def rates(b, metric=None):
    """The learning rate of every epoch, stepped as run_epochs does; with RATE_1 the first is 1."""
    if not hasattr(b, "rates"):
        b.rates = []
        for epoch in b.epochs:
            b.rates.append(b.groups[0]["lr"])
            b.training.scheduler.step(epoch + 1, metric)
    return b.rates


def step(b):
    """Train an epoch; returns {name: (before, after)} of the parameters, and the images in each forward pass."""
    before, images = {name: p.detach().clone() for name, p in b.model.named_parameters()}, []
    b.model.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    with contextlib.redirect_stdout(io.StringIO()):
        main.train_one_epoch(b.training, b.loader, 0, 1, b.args, b.world)
    return {name: (before[name], p.detach()) for name, p in b.model.named_parameters()}, images


def same(model, weights):
    """Whether the model has these weights, given as a state dictionary or its file."""
    weights, state = torch.load(weights) if isinstance(weights, os.PathLike) else weights, model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


def mixed(b):
    return b.training.mixup(torch.randn(64, 3, 32, 32), torch.arange(64) % 10)[1]


def part(b, kind):
    return next((step for step in b.steps if isinstance(step, kind)), None)


def pins(b):
    """Whether a loader for a GPU would pin its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "PrefetchLoader", lambda loader, *_, **__: loader)
        return transforms.build_loader(b.batches.dataset, b.args, torch.device("cuda"), 0, is_train=True).pin_memory


def only_attention(b):
    free = {name for name, p in b.model.named_parameters() if p.requires_grad}
    return free == {
        name
        for name, _ in b.model.named_parameters()
        if ".attn." in name or name.split(".")[0] in ("pos_embed", "head")
    }


def timm_style(b):
    """Whether all defaults of timm's trainer that KAT's commands rely on hold."""
    decayed = [p.shape for group in b.groups if group["weight_decay"] for p in group["params"]]
    scheduler = b.training.scheduler
    return (
        b.classes == ["cat", "dog"]
        and "learning rate 0.0005 (not scaled, as in timm's and KAT's scripts" in b.out
        and (scheduler.warmup_lr_init, scheduler.lr_min) == (1e-5, 0)
        and rates(b)[0] == 1e-5
        and len(b.steps[0].interpolation) == 2
        and sorted(b.sampler) == [0, 1, 2, 3]
        and decayed.count((1, 6)) == 2
    )


# (flags, values, check that holds with the flag and not without it, further arguments of both runs, arguments that
# replace the flag in the run without it)
TABLE = [
    ("--batch-size -b", "16", lambda b: b.batches.batch_size == 16 and len(b.loader) == 4),
    ("--epochs", "7", lambda b: b.epochs == range(7) and b.training.scheduler.t_initial == 7),
    ("--bce-loss", "", lambda b: isinstance(b.training.criterion, nn.BCEWithLogitsLoss) and mixed(b).min() == 0),
    (
        "--unscale-lr",
        "",
        lambda b: b.groups[0]["initial_lr"] == 1e-3 and "learning rate 0.001 (not scaled;" in b.out,
        "--lr 1e-3",
    ),
    (
        "--lr",
        "1e-3",
        lambda b: b.groups[0]["initial_lr"] == 1.25e-4 and "learning rate 0.000125 (base 0.001 x 64 / 512" in b.out,
    ),
    (
        "--model",
        "vit_micro_patch8_32",
        lambda b: not isinstance(b.model, KAT) and b.model.blocks[0].mlp.fc1.in_features == 32,
    ),
    (
        "--model-kwargs",
        "depth=3 num_heads=4",
        lambda b: len(b.model.blocks) == 3 and b.model.blocks[0].attn.num_heads == 4,
    ),
    (
        "--num-classes --nb-classes",
        "12",
        lambda b: b.model.head.out_features == b.training.num_classes == mixed(b).shape[1] == 12,
    ),
    (
        "--input-size",
        "48",
        lambda b: b.model.patch_embed.img_size == (48, 48) and next(iter(b.loader))[0].shape[2:] == (48, 48),
    ),
    ("--drop", "0.3", lambda b: b.model.head_drop.p == 0.3),
    (
        "--drop-path",
        "0.3",
        lambda b: [getattr(x.drop_path1, "drop_prob", 0) for x in b.model.blocks] == pytest.approx([0, 0.15, 0.3]),
        "--model-kwargs depth=3",
    ),
    ("--model-ema", "", lambda b: same(b.training.ema.module, b.model.state_dict()), "", "--no-model-ema"),
    ("--no-model-ema", "", lambda b: b.training.ema is None),
    ("--model-ema-decay", "0.9", lambda b: b.training.ema.get_decay(3) == b.training.ema.get_decay(10**7) == 0.9),
    ("--model-ema-force-cpu", "", lambda b: str(b.training.ema.device) == "cpu"),
    ("--opt", "sgd", lambda b: isinstance(b.optimizer, torch.optim.SGD)),
    ("--opt-eps", "1e-4", lambda b: {group["eps"] for group in b.groups} == {1e-4}),
    ("--opt-betas", "0.7 0.8", lambda b: {group["betas"] for group in b.groups} == {(0.7, 0.8)}),
    ("--momentum", "0.5", lambda b: {group["momentum"] for group in b.groups} == {0.5}, "--opt sgd"),
    ("--weight-decay", "0.3", lambda b: {group["weight_decay"] for group in b.groups} == {0, 0.3}),
    (
        "--clip-grad",
        "1e-3",
        lambda b: math.hypot(*((q - p).norm() for p, q in step(b)[0].values())) == pytest.approx(1e-3, rel=0.01),
        f"{RATE_1} --opt momentum --momentum 0 --weight-decay 0",
    ),
    (
        "--sched",
        "step",
        lambda b: rates(b)[-4:] == [0.5] * 4 and len(set(rates(b))) == 2,
        f"{RATE_1} --decay-rate 0.5 --decay-epochs 6",
    ),
    (
        "--lr-noise",
        "0.2 0.5",
        lambda b: [rate != 1 for rate in rates(b)] == [2 <= t < 5 for t in range(10)],
        f"{RATE_1} --sched step",
    ),
    ("--lr-noise-pct", "0.05", lambda b: 0.95 < min(rates(b)) < 1, f"{RATE_1} --sched step --lr-noise 0"),
    ("--lr-noise-std", "1e-3", lambda b: 0.99 < min(rates(b)) < 1, f"{RATE_1} --sched step --lr-noise 0"),
    ("--warmup-lr", "0.5", lambda b: rates(b)[:2] == [0.5, 0.75], "--unscale-lr --lr 1 --warmup-epochs 2"),
    (
        "--warmup-epochs",
        "2",
        lambda b: rates(b)[:3] == pytest.approx([0.5, 0.75, rates(b)[2]]) and rates(b)[2] > 0.9,
        "--unscale-lr --lr 1 --warmup-lr 0.5",
    ),
    ("--min-lr", "0.25", lambda b: 0.25 < rates(b)[9] < 0.3 and rates(b)[10] == 0.25, f"{RATE_1} --cooldown-epochs 1"),
    ("--cooldown-epochs", "3", lambda b: b.epochs == range(13) and rates(b)[10:] == [1e-5] * 3, RATE_1),
    ("--decay-epochs", "2", lambda b: rates(b)[:5] == pytest.approx([1, 1, 0.1, 0.1, 0.01]), f"{RATE_1} --sched step"),
    (
        "--patience-epochs",
        "1",
        lambda b: rates(b, 50.0)[:5] == pytest.approx([1, 1, 1, 0.1, 0.1]),
        f"{RATE_1} --sched plateau",
    ),
    (
        "--decay-rate --dr",
        "0.5",
        lambda b: rates(b)[:5] == [1, 1, 0.5, 0.5, 0.25],
        f"{RATE_1} --sched step --decay-epochs 2",
    ),
    ("--color-jitter", "0.4", lambda b: part(b, T.ColorJitter).brightness == pytest.approx((0.6, 1.4)), "--aa none"),
    ("--aa", "rand-m5-n3", lambda b: (policy := part(b, RandAugment)).num_layers == 3 and policy.ops[0].magnitude == 5),
    ("--ThreeAugment", "", lambda b: len(part(b, AutoAugment).policy) == 3 and part(b, T.ColorJitter)),
    ("--ThreeAugment", "", lambda b: b.loader.random_erasing is None),
    ("--reprob", "0.7", lambda b: b.loader.random_erasing.probability == 0.7, "--ThreeAugment"),
    ("--src", "", lambda b: part(b, T.RandomCrop).padding_mode == "reflect"),
    ("--train-interpolation", "bilinear", lambda b: b.steps[0].interpolation == T.InterpolationMode.BILINEAR),
    ("--train-interpolation", "random", lambda b: len(b.steps[0].interpolation) == 2, "--input-size 64"),
    ("--smoothing", "0.3", lambda b: mixed(b).min().item() == pytest.approx(0.03)),
    ("--smoothing", "0.3", lambda b: b.training.criterion.smoothing == 0.3, "--mixup 0 --cutmix 0"),
    ("--repeated-aug", "", lambda b: set(Counter(b.sampler).values()) == {1, 3}),
    ("--no-repeated-aug", "", lambda b: sorted(b.sampler) == list(range(64)), "", "--repeated-aug"),
    ("--train-mode", "", lambda b: step(b) and b.model.training, "", "--no-train-mode"),
    ("--no-train-mode", "", lambda b: step(b) and not b.model.training),
    ("--reprob", "0.7", lambda b: b.loader.random_erasing.probability == 0.7),
    ("--remode", "const", lambda b: not b.loader.random_erasing.per_pixel and not b.loader.random_erasing.rand_color),
    ("--remode", "rand", lambda b: b.loader.random_erasing.rand_color),
    ("--recount", "3", lambda b: b.loader.random_erasing.max_count == 3),
    ("--resplit", "", lambda b: b.loader.random_erasing.num_splits == 0),
    ("--mixup", "0.4", lambda b: b.training.mixup.mixup_alpha == 0.4),
    ("--mixup", "0", lambda b: b.training.mixup is None, "--cutmix 0"),
    ("--cutmix", "0.4", lambda b: b.training.mixup.cutmix_alpha == 0.4),
    ("--cutmix-minmax", "0.2 0.8", lambda b: b.training.mixup.cutmix_minmax == [0.2, 0.8]),
    ("--mixup-prob", "0", lambda b: (mixed(b) > 0.5).sum() == 64 and b.training.mixup.mix_prob == 0),
    ("--mixup-switch-prob", "0.2", lambda b: b.training.mixup.switch_prob == 0.2),
    ("--mixup-mode", "elem", lambda b: len(mixed(b).amax(1).unique()) > 20),
    ("--distillation-type", "hard", lambda b: b.training.criterion.kind == "hard", TEACHER),
    ("--distillation-type", "soft", lambda b: b.training.criterion.kind == "soft", TEACHER),
    (
        "--teacher-model",
        "kat_micro_patch8_32",
        lambda b: isinstance(b.training.criterion.teacher, KAT),
        "--distillation-type soft --teacher-path @teacher.pth",
        "--teacher-model vit_micro_patch8_32",
    ),
    (
        "--teacher-path",
        "@teacher.pth",
        lambda b: same(b.training.criterion.teacher, b.at / "teacher.pth"),
        "--distillation-type soft --teacher-model kat_micro_patch8_32",
    ),
    ("--distillation-alpha", "0.2", lambda b: b.training.criterion.alpha == 0.2, f"{TEACHER} --distillation-type soft"),
    ("--distillation-tau", "3", lambda b: b.training.criterion.tau == 3, f"{TEACHER} --distillation-type soft"),
    ("--cosub", "", lambda b: isinstance(b.training.criterion, CosubLoss) and step(b)[1] == [128]),
    (
        "--finetune --initial-checkpoint --pretrained-path",
        "@weights.pth",
        lambda b: same(b.model, b.at / "weights.pth"),
    ),
    ("--pretrained-path", "@weights.pth", lambda b: same(b.model, b.at / "weights.pth"), "--pretrained"),
    (
        "--pretrained",
        "",
        lambda b: same(b.model, b.at / "weights.pth"),
        "--model-kwargs depth=1 embed_dim=32 num_heads=2 "
        "pretrained_cfg_overlay={'file':'@weights.pth','num_classes':10}",
    ),
    ("--attn-only", "", only_attention),
    ("--data-path", "@tree", lambda b: b.classes == ["cat", "dog"], FOUR),
    ("--data-set", "DIGITS", lambda b: b.classes == list("0123456789"), f"--data-path @tree {FOUR}"),
    (
        "--inat-category",
        "genus",
        lambda b: b.classes == ["A"],
        "--data-set INAT --data-path @inat --train-subset 2 --val-subset 2",
    ),
    ("DATA", "@tree", timm_style, f"--input-size 64 {FOUR}"),
    ("--mean", "0.4 0.5 0.6", lambda b: (b.loader.mean.flatten() / 255).tolist() == pytest.approx([0.4, 0.5, 0.6])),
    ("--std", "0.4 0.5 0.6", lambda b: (b.val_loader.std.flatten() / 255).tolist() == pytest.approx([0.4, 0.5, 0.6])),
    ("--eval-crop-ratio --crop-pct", "0.5", lambda b: b.eval_steps[0].size == 128, "--input-size 64"),
    (
        "--output_dir --output",
        "@new",
        lambda b: set(RUN_FILES) <= set(os.listdir(b.args.output_dir or ".")),
        "--epochs 1",
    ),
    (
        "--device",
        "cpu",
        lambda b: next(b.model.parameters()).device.type == "cpu" and "No CUDA GPU" not in b.out,
        "",
        "--device cuda",
    ),
    (
        "--seed",
        "7",
        lambda b: (
            same(b.model, b.at / "weights.pth") and list(b.sampler) == list(build(b.at, f"{BASE} --seed 7").sampler)
        ),
    ),
    (
        "--resume",
        LAST,
        lambda b: b.epochs == range(1, 10) and same(b.model, torch.load(b.at / "run/checkpoint.pth")["model"]),
    ),
    ("--checkpoint", LAST, lambda b: b.code == 0 and "raw weights: Acc@1" in b.out, "--eval"),
    ("--start_epoch", "3", lambda b: b.training.optimizer.param_groups[0]["lr"] < 0.9, f"{RATE_1} --sched-on-updates"),
    ("--start_epoch", "6", lambda b: rates(b) == [1] * 4, "--unscale-lr --lr 1 --sched plateau"),
    ("--start_epoch", "0", lambda b: rates(b) == [1] * 10 and b.args.start_epoch == 0, f"{RATE_1} --sched plateau"),
    (
        "--start_epoch",
        "3",
        lambda b: len(rates(b)) == 7 and rates(b) == rates(build(b.at, f"{BASE} {RATE_1}"))[3:],
        RATE_1,
    ),
    (
        "--eval",
        "",
        lambda b: b.code == 0 and not hasattr(b, "training") and "raw weights: Acc@1" in b.out,
        f"--resume {LAST}",
    ),
    (
        "--use-ema",
        "",
        lambda b: "EMA weights: Acc@1" in b.out and "raw weights" not in b.out,
        f"--eval --resume {LAST}",
    ),
    ("--result", "", lambda b: json.loads(b.out.split("--result\n")[1])["img_size"] == 32, f"--eval --resume {LAST}"),
    ("--dist-eval", "", lambda b: [i for batch in b.val_loader.loader.batch_sampler for i in batch] == list(range(20))),
    ("--num_workers", "3", lambda b: b.batches.num_workers == b.val_loader.loader.num_workers == 3),
    ("--pin-mem", "", pins, "", "--no-pin-mem"),
    ("--no-pin-mem", "", lambda b: not pins(b)),
    (
        "--distributed",
        "",
        lambda b: b.code == 2 and build(b.at, f"WORLD_SIZE=1 {BASE} --distributed --world-size 1").code == 0,
    ),
    ("--world_size", "2", lambda b: b.code == 2 and "--world-size 2, but 1 process(es)" in b.err),
    (
        "--dist_url",
        "nosuch://place",
        lambda b: b.code == 2 and "cannot meet at --dist-url nosuch://place" in b.err,
        "WORLD_SIZE=2 RANK=0",
    ),
    ("--run-name", "me", lambda b: (b.wandb["name"], b.wandb["id"]) == ("me", None)),
    ("--run-id", "abc", lambda b: (b.wandb["id"], b.wandb["resume"]) == ("abc", "allow"), "--run-name me"),
    ("--log-wandb", "", lambda b: b.wandb["name"] == "new3", "--output @new3"),
    ("--amp", "", lambda b: b.training.amp == "bf16"),
]
TABLE = [(flag, *rest) for flags, *rest in TABLE for flag in flags.split()]
WITHOUT_EFFECT = {"--resplit", "--dist-eval"}  # as their help says
NEEDED = {
    "--teacher-model",
    "--teacher-path",
    "--distillation-type",
    "--checkpoint",
    "--dist_url",
    "--pretrained-path",
}  # without them main stops


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1]}".strip())
def test_flag_has_its_effect(folder, row):
    flag, values, holds, given, instead, *_ = (*row, "", "")
    assert holds(build(folder, f"{BASE} {given} {flag} {values}"))
    without = build(folder, f"{BASE} {given} {instead}")
    assert without.code == 0 or flag in NEEDED, without.err
    try:
        held = bool(holds(without))
    except (AttributeError, KeyError, IndexError, TypeError, OSError):  # what the check asks for is not there
        held = False
    assert held == (flag in WITHOUT_EFFECT), f"holds without {flag} as well"


def test_every_documented_flag_is_in_the_table():
    assert {row[0] for row in TABLE} == set(DEIT.split() + KAT_TIMM.split())


@pytest.mark.parametrize("flag, values", {row[0]: row[1] for row in TABLE if re.search("[-_]", row[0][2:])}.items())
def test_both_spellings_parse_to_the_same(flag, values):
    def parsed(name, joint=" "):
        return vars(get_args_parser().parse_intermixed_args(f"{name}{joint}{values}".split()))

    dashed, underscored = "--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_")
    assert dashed != underscored and parsed(dashed) == parsed(underscored)
    if values and " " not in values:
        assert parsed(underscored, "=") == parsed(dashed, "=") == parsed(dashed)


@pytest.mark.parametrize(
    "processes, words, repeated",
    [
        (1, "", False),
        (2, "", True),
        (1, "--repeated-aug", True),
        (2, "--no-repeated-aug", False),
        (2, "DATA", False),
        (2, "DATA --repeated-aug", True),
    ],
)
def test_repeated_augmentation_is_for_several_processes(processes, words, repeated, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    args = parse(words.replace("DATA", str(tmp_path)).split()).args
    assert args.repeated_aug is repeated
    monkeypatch.setenv("WORLD_SIZE", "4")  # A resumed run keeps it.
    checkpoint = Checkpoint("x", {}, model=args.model, settings=args.plain())
    assert parse(["--resume", "x"], lambda _: checkpoint).args.repeated_aug is repeated


@pytest.mark.parametrize("shares", [False, True], ids=["classes", "shares"])
def test_cosub_loss_against_its_statement(shares):
    torch.manual_seed(1)
    outputs, classes = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 1])
    targets = torch.rand(3, 4, dtype=torch.float64) if shares else classes
    p = torch.sigmoid(outputs.detach()).tolist()
    total, gradient = 0.0, torch.zeros(6, 4, dtype=torch.float64)
    for i in range(3):
        for c in range(4):
            y = targets[i, c].item() if shares else float(classes[i] == c)
            for row, other in ((i, i + 3), (i + 3, i)):
                for t in (y, p[other][c]):  # the target, and what the other submodel says of the same image
                    total -= (t * math.log(p[row][c]) + (1 - t) * math.log(1 - p[row][c])) / (4 * 12)
                    gradient[row, c] += (p[row][c] - t) / (4 * 12)  # the other submodel is a constant in it
    loss = CosubLoss()(outputs, targets)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(outputs.grad, gradient, rtol=1e-10, atol=0)


def test_attn_only_trains_attention_position_and_classifier(folder):
    b = build(folder, f"{BASE} --attn-only --lr 1e-2 --unscale-lr --warmup-epochs 0 --weight-decay 0.5")
    assert only_attention(b)
    changed = {name for name, (before, after) in step(b)[0].items() if not torch.equal(before, after)}
    assert b.training.updates == 1
    attention = {f"blocks.0.attn.{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias")}
    assert changed == {"pos_embed", "head.weight", "head.bias"} | attention
