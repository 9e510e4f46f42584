"""README, CONTRIBUTING and the pages under docs/: length, links, and the examples that a reader would copy."""

import re
import struct
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
from kan_basis import BASES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """The names under which a Markdown page's headings can be linked."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 150


@pages
def test_relative_links_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)
    assert links
    for link in links:
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pages
def test_lines_fit(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        exempt = line.startswith("|") or re.fullmatch(r"\s*https?://\S+", line)
        assert exempt or len(line) <= 120, f"{page.name}, line {number}"


def test_readme_examples_run():
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.M | re.S)
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == names["x"].shape and names["y"].dtype == names["x"].dtype
    assert names["model"].num_classes == 10


def test_the_basis_of_the_guide_is_one(monkeypatch):
    monkeypatch.setattr("kan_basis.basis.BASES", {**BASES})
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    names = {"__name__": "guide"}
    exec(block, names)
    basis, x = names["LegendreBasis"](order=2), torch.linspace(-2, 2, 9, dtype=torch.float64)
    t = x.tanh()
    torch.testing.assert_close(basis.features(x), torch.stack([t**0, t, (3 * t * t - 1) / 2], -1))
    assert basis.num_coefficients == 3 and basis.flops and basis.formula


def test_the_data_set_of_the_guide_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "DATASETS", {**datasets.DATASETS})
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 6), ("t10k", 2)):
        images, labels = np.arange(count * 784, dtype=np.uint8).tobytes(), bytes(range(count))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)
    blocks = re.findall(r"^```py\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    exec(next(block for block in blocks if "register_dataset" in block), {**vars(datasets)})
    args = Namespace(data_set="FashionMNIST", data_path=str(tmp_path), eval=False)
    train, val = datasets.DATASETS["FashionMNIST"](args, False)
    assert (len(train), len(val), train[3][1]) == (6, 2, 3) and train.images.shape == (6, 28, 28, 3)
    assert len(datasets.DATASETS["FashionMNIST"](Namespace(**{**vars(args), "eval": True}), False)) == 1
