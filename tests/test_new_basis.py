"""A basis is one description: each one of the registry trains from its flags, and so does one of another project."""

import os
import re
import subprocess
import sys
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kan_flags
from arguments import parse
from checkpoint import read
from kan_basis import BASES, Basis, option, register
from models.kat import activations
from tests.kan_helpers import built, first
from tests.test_main import call, log

ROOT = Path(__file__).resolve().parent.parent
NAME = "kat_micro_patch8_32_karat"
LEGENDRE = '''
from dataclasses import dataclass

import torch
from kan_basis import Basis, option, register


@register("legendre")
@dataclass(frozen=True)
class LegendrePolynomials(Basis):
    """Legendre polynomials of tanh(s x)."""

    degree: int = option(3, "highest degree of the polynomials", minimum=1)
    steepness: float = option(1.0, "factor s of the input")
    linear = True

    @property
    def num_coefficients(self):
        return self.degree + 1

    @property
    def flops(self):
        return 5 * self.degree

    @property
    def formula(self):
        return f"sum over n = 0..{self.degree} of theta_n P_n(tanh({self.steepness} x))"

    def features(self, x, dim=-1):
        t = torch.tanh(self.steepness * x.to(torch.promote_types(x.dtype, torch.float32)))
        values = [torch.ones_like(t), t]
        for n in range(1, self.degree):
            values.append(((2 * n + 1) * t * values[-1] - n * values[-2]) / (n + 1))
        return torch.stack(values, dim)
'''


def test_a_basis_of_another_project(tmp_path, monkeypatch, capfd):
    """It trains in attention and MLP, is saved, evaluated and resumed; its options are flags."""
    (tmp_path / "legendre.py").write_text(LEGENDRE)
    out = tmp_path / "out"
    run = f"""--model {NAME} --model-kwargs depth=1 embed_dim=32 --epochs 1 --train-subset 40 --val-subset 20
        --batch-size 20 --num-workers 0 --no-model-ema --device cpu --output-dir {out}"""
    functions = "--basis-type legendre --degree 4 --mlp-basis legendre --mlp-degree 5 --mlp-steepness 0.5"
    command = [sys.executable, ROOT / "main.py", "--import", "legendre", *run.split(), *functions.split()]
    python_path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": python_path}, cwd=ROOT)
    weights = read(out / "checkpoint.pth").weights
    assert weights["blocks.0.attn.operator.layers.0.coefficients"].shape[-1] == 5
    assert weights["blocks.0.mlp.act1.weight_coefficients"].shape == (8, 6)
    assert weights["blocks.0.mlp.act1.weight_coefficients"].any()

    file, unknown = ("--resume", out / "checkpoint.pth", "--device", "cpu"), "unknown basis '"
    for flags in (("--eval", *file), ("--finetune", *file[1:]), ("--model", NAME, "--basis-type", "Legendre")):
        capfd.readouterr()
        try:
            assert call(*flags) == 2
        except SystemExit as end:
            assert end.code == 2
        *usage, error = capfd.readouterr().err.splitlines()
        assert (unknown in error and "legendre" in error.lower()) or "invalid choice: 'Legendre'" in error
        assert len(usage) <= 1

    # From here on the module is found in the current folder, as in the folder of another project.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(BASES, "legendre", None)  # restores the registry after the test
    del BASES["legendre"]
    known = ("--import", "legendre")
    assert call(*known, "--eval", *file) == 0
    assert f"Acc@1 {log(out)[0]['test_acc1']:.3f}" in capfd.readouterr().out
    assert call(*known, *file, "--mlp-degree", "4") == 2
    assert "the model of the checkpoint has mlp_degree=5, not 4: drop that option" in capfd.readouterr().err
    assert call(*known, "--model", NAME, "--basis-type", "legendre", "--model-kwargs", "steepness=x") == 2
    assert "steepness must be a number, not x" in capfd.readouterr().err
    repeated = functions.replace("type legendre", "type LegendrePolynomials")
    assert call(*known, *file, *repeated.split(), "--epochs", "2", "--output-dir", out) == 0
    assert [entry["epoch"] for entry in log(out)] == [0, 1]
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*known, "--help")
    text = " ".join(capfd.readouterr().out.split())
    assert end.value.code == 0
    for part in (
        "LegendrePolynomials,",
        "legendre,",
        "--degree N",
        "--steepness N",
        "--mlp-degree N",
        "--mlp-steepness N",
    ):
        assert part in text, part
    assert text.count("highest degree of the polynomials (LegendrePolynomials, default 3)") == 2


def test_registering_a_basis_that_the_command_line_cannot_take():
    switch = dataclass(frozen=True)(type("Switch", (Basis,), {"__annotations__": {"on": bool}, "on": option(True, "")}))
    for name, cls, sentence in (
        ("switch", switch, "option on of the switch basis is a switch: use a string with choices"),
        ("Bessel", Basis, "the name of a basis must be in lower case, not 'Bessel'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            register(name)(cls)
        assert name not in BASES


def another_value(field: Field) -> Any:
    """A value that is not the default of an option."""
    if choices := field.metadata.get("choices"):
        return next(value for value in sorted(choices()) if value != field.default)
    if isinstance(field.default, tuple):
        return tuple(value + 1 if isinstance(value, int) else 1.5 * value for value in field.default)
    return field.default + 1 if isinstance(field.default, int) else 1.5 * field.default


@pytest.mark.parametrize("name", BASES)
def test_every_basis_trains_from_its_flags(name):
    cls = BASES[name]
    flags, expected = [f"--basis-type {cls.__name__} --mlp-basis {name} --mlp-groups 4"], {}
    for use in ("attention", "mlp"):
        expected[use] = {field.name: another_value(field) for field in cls.options(use).values()}
        for flag, field in cls.options(use).items():
            value = expected[use][field.name]
            words = map(str, value) if isinstance(value, tuple) else [str(value)]
            flags.append(f"--{flag.replace('_', '-')} {' '.join(words)}")
    model = built(" ".join(flags) + " --model-kwargs depth=1 embed_dim=32", NAME)
    bases = {"attention": [first(model).layers[0].basis], "mlp": [act.basis for act in activations(model).values()]}
    assert len(bases["mlp"]) == 2
    for use, options in expected.items():
        for basis in bases[use]:
            assert type(basis) is cls and {option: getattr(basis, option) for option in options} == options
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    loss = F.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    functions = re.compile(r"operator\.layers\.0\.(coefficients|scale_basis)|act[12]\.weight_")
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    learned = {key for key in before if functions.search(key)}
    assert learned <= moved and len(learned) >= 4
    assert all(value.isfinite().all() for value in model.parameters())


# Each spelling of a flag that the papers' code or an earlier version of this repository has, and the option it sets.
SPELLINGS = [
    ("--basis_type FourierBasis --grid 3", dict(basis_type="FourierBasis", grid=3)),
    (
        "--basis-type spline --order 2 --grid_range -1 1",
        dict(basis_type="SplineBasis", order=2, grid_range=[-1.0, 1.0]),
    ),
    ("--basis_type WaveletBasis --wavelet_type dog", dict(basis_type="WaveletBasis", wavelet_type="dog")),
    (
        "--basis_type RationalBasis --rational_order 3 2 --rational_version A",
        dict(basis_type="RationalBasis", rational_order=[3, 2], rational_version="A"),
    ),
    ("--base_fn nn.SiLU --base_not_trainable", dict(base_fn="nn.SiLU", base_trainable=False)),
    ("--basis_not_trainable --universal", dict(basis_trainable=False, universal=True)),
    ("--blockwise", dict(universal=False)),
    (
        "--modular_attn --modular_mode w1_phi2 --hidden_dim 4 5 6 7",
        dict(modular_attn=True, modular_mode="w1_phi2", hidden_dim=[4, 5, 6, 7]),
    ),
    ("--depth 2", dict(karat_depth=2, modular_attn=False)),
    ("--mixed_head --num_attention 1", dict(mixed_head=True, num_attention=1)),
    ("--karat_blocks 0-1 --project_l1", dict(karat_blocks="0-1", project_l1=True)),
    (
        "--output_scale sqrt --karat_init scaled --karat_init_scale 0.5",
        dict(output_scale="sqrt", karat_init="scaled", karat_init_scale=0.5),
    ),
    ("--init variance_preserving", dict(weight_init="variance_preserving")),
    (
        "--mlp-groups 4 --mlp-degrees 3 2 --mlp-numerator-groups 2 --mlp-version B",
        dict(mlp_groups=4, mlp_degrees=[3, 2], mlp_numerator_groups=2, mlp_version="B"),
    ),
    (
        "--mlp-basis Spline --mlp-grid 5 --mlp-order 2 --mlp-grid-range -1 1",
        dict(mlp_basis="spline", mlp_grid=5, mlp_order=2, mlp_grid_range=[-1.0, 1.0]),
    ),
    ("--mlp-basis wavelet --mlp-wavelet dog", dict(mlp_basis="wavelet", mlp_wavelet="dog")),
]


@pytest.mark.parametrize("flags, options", SPELLINGS, ids=[flags for flags, _ in SPELLINGS])
def test_published_spellings(flags, options):
    for spelling in (flags, re.sub(r"--\S+", lambda flag: flag[0].replace("_", "-"), flags)):
        args = parse(["--model", NAME, "--input-size", "32", *spelling.split()]).args
        assert args.model_options == options


def test_the_flags_stay_a_short_file_without_names_of_options():
    lines = Path(kan_flags.__file__).read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    options = {option for cls in BASES.values() for use in ("attention", "mlp") for option in cls.options(use)}
    named = [option for option in options if re.search(rf"--{option.replace('_', '-')}\b", "\n".join(lines))]
    assert named == []
