"""The layers and models in another project: from a wheel, and through torch.hub."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm

import models  # noqa: F401
from tests.test_setup import lines_of

ROOT = Path(__file__).resolve().parent.parent
TOP = ("cuda", "datasets", "models", "utils")  # modules of this repository whose names others use, too
STRANGER = """
import importlib.util, shutil, sys

if importlib.util.find_spec("cupy"):
    import cupy
import datasets, utils
import kan_cuda.launch, kan_models, timm, torch
from kan_basis import GroupRational
from kan_basis import presets

assert datasets.MINE and utils.MINE and not {"models", "cuda.launch"} & set(sys.modules)
model = timm.create_model("kat_micro_patch8_32", num_classes=7)
assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
assert type(model).__module__ == "kan_models.kat" and "swish" in presets()
assert "rational_backward_kernel" in kan_cuda.launch.source("rational.cu")

layer, x = GroupRational(8, num_channels=64), torch.randn(16, 64, requires_grad=True)
want = [layer(x), *torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])]
assert all(t.isfinite().all() for t in want)
if any(map(shutil.which, ("c++", "g++", "clang++"))):
    compiled = torch.compile(layer, fullgraph=True)
    found = [compiled(x), *torch.autograd.grad(compiled(x).square().sum(), [x, *layer.parameters()])]
    torch.testing.assert_close(found, want)
    print("compiled")
"""
HUB = """
import sys
import torch

if sys.argv[2] == "before":
    import datasets, models, utils
load = lambda name, **kwargs: torch.hub.load(sys.argv[1], name, source="local", **kwargs)
assert load("kat_tiny_patch16_224", num_classes=10).head.out_features == 10
assert load("vit_micro_patch8_32_karat")(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
assert sys.argv[1] not in sys.path and "cuda.launch" not in sys.modules
import datasets, models, utils
assert datasets.MINE and models.MINE and utils.MINE
from kan_basis.group_rational import preset_coefficients
assert len(preset_coefficients("swish", (3, 2))[0]) == 4  # fitted by a module that is imported only now
print(*torch.hub.list("owner/repository:main", trust_repo=True))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, built from a copy, because the build leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and any(path.glob("*.py")):
            shutil.copytree(path, folder / "source" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix in (".py", ".toml", ".md", ".txt") or path.name == "LICENSE":
            shutil.copy(path, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    return next(folder.glob("*.whl"))


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def stranger(tmp_path):
    """Runs a script in a project that has modules of its own called datasets, models and utils."""
    for name in ("datasets", "models", "utils"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")

    def run(script: str, *arguments: str, **env: str) -> str:
        (tmp_path / "script.py").write_text(script)
        command = [sys.executable, "script.py", *arguments]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in files}
    (info,) = (name for name in packages if name.endswith(".dist-info"))
    assert packages == {"kan_basis", "kan_models", "kan_cuda", info}
    expected = {
        f"{package}/{path.name}"
        for package, folder in (("kan_basis", "kan_basis"), ("kan_models", "models"), ("kan_cuda", "cuda"))
        for path in (ROOT / folder).iterdir()
        if path.is_file()
    }
    assert {name for name in files if not name.startswith(info)} == expected


def test_the_wheel_requires_what_requirements_txt_lists(wheel):
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = set(re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE))
    extras = {line for line in required if "extra ==" in line}
    listed = {r.name: f"{r.name}{r.specifier}" for r in lines_of("requirements.txt")}
    assert {re.split(r"[><=]", line)[0] for line in required - extras} == {"torch", "timm", "numpy", "scipy", "einops"}
    assert required - extras <= set(listed.values())
    cupy = listed["cupy-cuda13x"]
    assert {re.sub("[ ;].*", "", line) for line in extras} == {cupy, cupy.replace("13x", "12x")}


def test_an_installed_wheel_works_in_another_project(wheel, stranger, tmp_path):
    pip("install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    assert not {f"{name}{end}" for name in TOP for end in ("", ".py")} & {p.name for p in (tmp_path / "site").iterdir()}
    output = stranger(STRANGER, PYTHONPATH=str(tmp_path / "site"))
    if "compiled" not in output:
        pytest.skip("torch.compile needs a C++ compiler; everything else was tested")


@pytest.mark.parametrize("imported", ["before", "after"])
def test_torch_hub_loads_every_model_and_shadows_nothing(imported, stranger, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "owner_repository_main").symlink_to(ROOT)  # as if it had been downloaded
    output = stranger(HUB, str(ROOT), imported, TORCH_HOME=str(tmp_path))
    names = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("models.")]
    assert sorted(output.splitlines()[-1].split()) == sorted(names)
    assert {"kat_tiny_patch16_224", "flash_kat_base_patch16_224", "vit_tiny_patch16_224_karat"} <= set(names)
