"""Operators for another number of tokens than they were trained for: through main.py, and through timm."""

import re

import pytest
import timm
import torch

import models  # noqa: F401
from checkpoint import CheckpointError
from checkpoint.fill import load_all, load_matching
from tests.data_helpers import photographs
from tests.test_main import call

NAME = "vit_micro_patch8_32_karat"


def micro(**options):
    return timm.create_model(NAME, **{"num_classes": 10, "depth": 2, **options}).eval()


def test_photographs_at_other_sizes_than_in_training(tmp_path, capfd):
    """Trained at 32 pixels, evaluated at 24 and 48: about the loss at 32, and less than with the nearest operators."""
    photographs(tmp_path, train=200, validation=100)
    run = """--model-kwargs depth=2 --data-set IMNET --input-size 32 --batch-size 50 --epochs 5 --lr 2e-3 --unscale-lr
        --warmup-epochs 1 --sched-on-updates --no-repeated-aug --aa none --color-jitter 0 --reprob 0 --mixup 0
        --cutmix 0 --drop-path 0 --clip-grad 1 --num-workers 0 --no-model-ema --eval-every 5 --check-images off
        --device cpu"""
    out = tmp_path / "out"
    assert call("--model", NAME, *run.split(), "--data-path", tmp_path, "--output-dir", out) == 0

    def evaluate(size, *flags):
        capfd.readouterr()
        file = ("--resume", out / "checkpoint.pth", "--input-size", size)
        assert call("--eval", *file, "--num-workers", "0", "--device", "cpu", *flags) == 0
        printed = capfd.readouterr().out
        assert ("resampled" in printed) == (size != 32)
        return [float(re.search(rf"{figure} ([\d.]+)", printed)[1]) for figure in ("Acc@1", "loss")]

    accuracy, loss = evaluate(32)
    assert accuracy > 20
    for size in (24, 48):
        (resampled, resampled_loss), (_, nearest_loss) = evaluate(size), evaluate(size, "--karat-resample", "nearest")
        assert resampled > accuracy - 8 and resampled_loss < loss + 0.15
        assert resampled_loss < nearest_loss - 0.01


@pytest.mark.parametrize(
    "options",
    [{}, dict(universal=True), dict(modular_attn=False), dict(modular_mode="w1_phi2"), dict(karat_depth=1)],
    ids=str,
)
def test_every_operator_loads_at_another_image_and_patch_size(options, tmp_path):
    state = micro(**options).state_dict()
    for other in (dict(img_size=48), dict(patch_size=16), dict(img_size=24, patch_size=4)):
        model = micro(**options, **other)
        lines = load_all(model, state, "file", resample=True)
        assert any("karat." in line or "attn.operator." in line for line in lines)
        assert model(torch.randn(2, 3, *model.patch_embed.img_size)).isfinite().all()
        again = micro(**options, **other)
        assert "not loaded" not in "".join(load_matching(again, state, "file"))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    torch.save(state, tmp_path / "file.pth")
    overlay = {"file": str(tmp_path / "file.pth"), "num_classes": 10}  # timm's way
    pretrained = micro(**options, **other, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in pretrained.state_dict().items())


def test_interpolation_is_chosen_and_averaged_weights_are_resampled_as_well(tmp_path, capfd):
    flags = f"""--model {NAME} --model-kwargs depth=1 --input-size 32 --epochs 1 --train-subset 50 --val-subset 20
        --num-workers 0 --device cpu""".split()
    assert call(*flags, "--output-dir", tmp_path) == 0
    losses = set()
    for mode in ("bicubic", "bilinear", "nearest"):
        file = ("--resume", tmp_path / "checkpoint.pth", "--input-size", "48")
        assert call("--eval", *file, "--karat-resample", mode, "--device", "cpu") == 0
        out = capfd.readouterr().out
        assert "EMA weights: Acc@1" in out and "blocks.0.attn.operator.project_out (2, 17, 12) -> (2, 37, 12)" in out
        losses.add(re.search(r"raw weights: .* loss ([\d.]+)", out)[1])
    assert len(losses) == 3
    assert call("--finetune", tmp_path / "checkpoint.pth", *flags, "--input-size", "64") == 0
    assert re.search("resampled: .*pos_embed.* blocks.0.attn.operator.layers.0.coefficients", capfd.readouterr().out)


def test_from_a_softmax_vit_the_operators_keep_their_initial_values():
    vit = timm.create_model("vit_micro_patch8_32", num_classes=10, depth=2).state_dict()
    model = micro()
    before = {name: value.clone() for name, value in model.state_dict().items() if ".operator." in name}
    lines = load_matching(model, vit, "vit")
    assert torch.equal(model.blocks[1].attn.qkv.weight, vit["blocks.1.attn.qkv.weight"])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert any(
        "not in the file, keep their initial values: blocks.{0-1}.attn.operator.project_out" in line for line in lines
    )


def test_operators_for_no_square_grid():
    state = {**micro().state_dict(), "blocks.0.attn.operator.layers.0.coefficients": torch.zeros(2, 12, 13, 6)}
    with pytest.raises(CheckpointError, match="operators for 13 tokens, which are not 1 and a square"):
        load_all(micro(), state, "file", resample=True)
