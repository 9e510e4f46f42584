"""tools/plot_basis.py: every basis has a panel, and the picture is written."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kan_basis import BASES, FourierBasis
from kan_basis.wavelet import WAVELETS

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tools"))
import plot_basis  # noqa: E402


def test_picture_has_a_panel_for_every_basis_and_choice(tmp_path, monkeypatch):
    figures = []
    draw = plot_basis.plot
    monkeypatch.setattr(plot_basis, "plot", lambda *args: figures.append(draw(*args)) or figures[0])
    assert plot_basis.main(["--out", str(tmp_path / "bases.png"), "--draws", "2", "--range", "-3", "5"]) == 0
    titles = [panel.get_suptitle() for panel in figures[0].subfigs if panel.axes]
    variants = {"rational": ["rational A", "rational B"], "wavelet": [f"wavelet {name}" for name in WAVELETS]}
    assert titles == [title for name in BASES for title in variants.get(name, [name])]
    for axes in figures[0].get_axes():
        assert axes.get_xlim() == (-3, 5) and len(axes.lines) == 3  # 2 functions and the zero line
        assert all(torch.as_tensor(line.get_ydata()).isfinite().all() for line in axes.lines)
    with Image.open(tmp_path / "bases.png") as picture:
        assert min(picture.size) > 500


def test_curves_follow_the_seed_and_the_init():
    basis, x, state = FourierBasis(2), torch.linspace(-1, 1, 5, dtype=torch.float64), torch.get_rng_state()
    published, again, other, scaled = (
        plot_basis.curves(basis, init, 3, seed, 8, x)
        for init, seed in (("published", 0), ("published", 0), ("published", 1), ("scaled", 0))
    )
    assert published.shape == (3, 5) and torch.equal(published, again) and not torch.equal(published, other)
    torch.testing.assert_close(scaled, published / 4)  # sqrt(G fan_in)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--draws", "0"], "at least 1"),
        (["--range", "2", "1"], "increasing"),
        (["--out", "none/b.png"], "none/b.png"),
        (["--out", "b.doc"], "b.doc"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot_basis, "panels", lambda: {"fourier": FourierBasis()})
    with pytest.raises(SystemExit):
        plot_basis.main(arguments)
    assert message in capsys.readouterr().err
