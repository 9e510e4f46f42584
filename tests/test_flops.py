"""tools/flops.py: the published figures to their last digit, and every formula once by hand."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401
from kan_basis import BASES, make_basis

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tools"))
import flops  # noqa: E402

pytest.importorskip("fvcore", reason="FLOPs are counted by fvcore, which is not installed")
N = 197


@pytest.fixture(scope="module")
def rows():
    """Of each model and flags counted once."""
    known = {}

    def counted(name, *argv):
        key = name, argv
        if key not in known:
            (args,) = flops.arguments_of([name], list(map(str, argv)))
            with torch.device("meta"):  # numbers do not matter, drawing them takes most of the time
                model = timm.create_model(name, num_classes=args.nb_classes, **args.model_options)
            known[key] = flops.count(model.to_empty(device="cpu"), args.input_size)
        return known[key]

    return counted


@pytest.mark.parametrize("size, vit, kat", [("tiny", 1.08, 1.13), ("small", 4.25, 4.35), ("base", 16.87, 17.06)])
def test_published_figures_of_kat(rows, size, vit, kat):
    """One model serves both: a KAT less its rationals is the ViT."""
    row = rows(f"kat_{size}_patch16_224")
    assert round(row["without_attention_products"] / 1e9, 2) == kat
    assert round((row["without_attention_products"] - row["kan"]) / 1e9, 2) == vit


@pytest.mark.parametrize(
    "size, grid, width, heads, activation, total",
    [("tiny", 3, 192, 3, 0.1677, 1.425), ("small", 3, 384, 6, 0.3353, 4.941), ("base", 1, 768, 12, 0.2682, 17.847)],
)
def test_published_figures_of_karat(rows, size, grid, width, heads, activation, total):
    """The published totals count 2 N C less for each block (see the docstring of the tool)."""
    row = rows(f"vit_{size}_patch16_224_karat", "--grid", grid, "--nb-classes", 10)
    assert row["kan"] == (3 * grid + 1) * N**2 * 12 * heads * 12 and round(row["kan"] / 1e9, 4) == activation
    assert row["with_attention_products"] - row["without_attention_products"] == 2 * N**2 * width * 12
    assert round((row["with_attention_products"] - 2 * N * width * 12) / 1e9, 3) == total


def test_published_parameters_and_the_vit(rows):
    vit, karat = (
        rows("vit_tiny_patch16_224", "--nb-classes", 10),
        rows("vit_tiny_patch16_224_karat", "--grid", 3, "--nb-classes", 10),
    )
    universal = rows("vit_tiny_patch16_224_karat", "--universal", "--nb-classes", 10)
    assert round(vit["with_attention_products"] / 1e9, 3) == 1.258 and vit["kan"] == 0
    assert karat["with_attention_products"] == vit["with_attention_products"] + karat["kan"]
    assert round(karat["parameters"] / 1e6, 4) == 6.2923 and round(universal["parameters"] / 1e6, 4) == 5.5902
    assert universal["with_attention_products"] == karat["with_attention_products"]
    assert karat["parameters"] - karat["trainable"] == 12 * 3 * 12 * N  # scale_base of the base function 0
    assert round(rows("vit_base_patch16_224_karat", "--grid", 1, "--nb-classes", 10)["parameters"] / 1e6, 4) == 87.5084


def test_functions_have_a_formula_each():
    expected = {"chebyshev": 9, "fourier": 9, "radial": 32, "rational": 21, "spline": 7 * 3 + 27, "wavelet": 5}
    assert {name: make_basis(name).flops for name in BASES} == expected
    assert make_basis("spline", grid=4, order=0).flops == 4


@pytest.mark.parametrize(
    "options, count",
    [
        ({}, 10 * 17 * 17 * 12),
        ({"modular_mode": "w1_phi2"}, 10 * 17 * 17 * 12),
        ({"base_fn": "nn.SiLU"}, 11 * 17 * 17 * 12),
        ({"karat_depth": 1}, 9 * 17**3),
        ({"modular_attn": False}, 9 * 2 * 17 * 17 * 12),
        ({"karat_depth": 3}, 17 * (10 * 17 * 12 + 9 * 144)),
        ({"basis_type": "wavelet", "hidden_dim": 4}, 6 * 17 * 17 * 4),
        ({"universal": True}, 10 * 17 * 17 * 12),
    ],
)
def test_operators(options, count):
    model = timm.create_model("vit_micro_patch8_32_karat", **options)
    assert flops.count(model, 32)["kan"] == 4 * 2 * count  # blocks, heads


def test_mixed_heads_some_blocks_and_other_activations():
    products = flops.count(timm.create_model("vit_micro_patch8_32"), 32)
    model = timm.create_model(
        "kat_micro_patch8_32_karat", mixed_head=True, karat_blocks="0,2", mlp_basis="fourier", mlp_grid=2
    )
    row, before = flops.count(model, 32), model(torch.ones(1, 3, 32, 32))
    elements = 17 * (64 + 256) * 4
    assert row["kan"] == 2 * 10 * 17 * 17 * 12 + 6 * elements
    assert row["with_attention_products"] - row["kan"] == products["with_attention_products"]
    assert row["without_attention_products"] - row["kan"] == products["without_attention_products"]
    assert torch.equal(model(torch.ones(1, 3, 32, 32)), before) and "forward" not in vars(model.blocks[0].mlp.act1)
    rational = flops.count(timm.create_model("kat_micro_patch8_32", degrees=(3, 2)), 32)
    assert rational["kan"] == 13 * elements


def test_attention_that_is_not_fused_counts_the_same():
    model = timm.create_model("vit_micro_patch8_32")
    fused = flops.count(model, 32)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert flops.count(model, 32) == fused


def test_models_side_by_side(tmp_path, capsys):
    names = ["vit_micro_patch8_32", "kat_micro_patch8_32", "vit_micro_patch8_32_karat"]
    assert (
        flops.main(
            [
                "--model",
                *names,
                "--input-size",
                "32",
                "--nb_classes",
                "10",
                "--grid",
                "1",
                "--mlp-basis",
                "spline",
                "--attn-only",
                "--json",
                str(tmp_path / "rows.json"),
            ]
        )
        == 0
    )
    header, *lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert "GFLOPs without attention products" in header and [line.split()[0] for line in lines] == names
    assert [row["model"] for row in rows] == names and [list(row) for row in rows] == [list(flops.COLUMNS)] * 3
    assert [row["kan"] for row in rows] == [0, 48 * 17 * 320 * 4, 4 * 17 * 17 * 12 * 8]
    assert all(row["trainable"] < row["parameters"] / 2 for row in rows)
    assert lines[1].split()[1] == f"{rows[1]['parameters'] / 1e6:.4f}"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--grid", "3"], "none of the models has the option grid"),
        (["--model-kwargs", "depth"], "KEY=VALUE"),
        (["--model-kwargs", "num_heads=3"], "cannot build vit_micro_patch8_32"),
        (["--input-size", "32", "--json", "none/rows.json"], "none/rows.json cannot be written"),
    ],
)
def test_what_cannot_be_counted_is_one_sentence(argv, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert flops.main(["--model", "vit_micro_patch8_32", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


def test_without_fvcore(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    assert flops.main(["--model", "vit_micro_patch8_32", "--input-size", "32"]) == 2
    error = capsys.readouterr().err
    assert error == "error: FLOPs are counted by fvcore, which is not installed: pip install fvcore\n"
