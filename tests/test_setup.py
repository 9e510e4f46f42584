import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from run_scripts import check_env

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def lines_of(name: str) -> list[Requirement]:
    return [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_pin_within_its_range(python):
    environment = {"python_version": python, "python_full_version": python + ".0"}
    pins = [p for p in lines_of("constraints.txt") if p.marker is None or p.marker.evaluate(environment)]
    for requirement in lines_of("requirements.txt"):
        pinned = [p for p in pins if p.name == requirement.name]
        assert len(pinned) == 1, requirement.name
        (pin,) = pinned[0].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version, prereleases=True), requirement.name


def test_this_environment_is_satisfied():
    assert check_env.problems() == []
    required = (ROOT / "requirements.txt").read_text().partition("\n# Optional")[0].splitlines()
    assert all(re.fullmatch(r"(#.*|[\w-]+>=[\d.]+)?", line) for line in required)  # the form that check_env reads


def test_missing_old_and_broken_packages_are_named_and_optional_ones_are_not(tmp_path, monkeypatch):
    (tmp_path / "broken_build.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(check_env.MODULES, "torchvision", "broken_build")
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# comment\npytest>=1\npackaging>=99\nno-such-package\ntorchvision>=0\n\n# Optional: x\nalso-absent>=1\n"
    )
    old, lacking, broken = check_env.problems(path)
    assert old.startswith("has packaging ") and old.endswith(", older than 99")
    assert lacking == "lacks no-such-package"
    assert broken.endswith("cannot be imported (RuntimeError: operator torchvision::nms does not exist)")


@pytest.mark.parametrize("script", [*sorted(ROOT.glob("run_scripts/*.sh")), ROOT / ".ci/run"], ids=lambda p: p.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_checks_the_code_and_runs_the_tests_as_a_user_does():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    *_, check, form, tests = (ROOT / ".ci/run").read_text().splitlines()
    assert check.endswith("-m ruff check .") and form.endswith("-m ruff format --check .")
    assert tests == "bash run_scripts/test.sh" and tests in (ROOT / ".github/workflows/test.yml").read_text()


def test_cuda_is_no_regular_package():
    # It would hide cuda.pathfinder and cuda.bindings, which CuPy and torch import.
    assert not (ROOT / "cuda/__init__.py").exists()


class Project:
    """A copy of the scripts, in a folder with a space, whose only requirement is a wheel made here: no network."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.wheels = folder / "a repo", folder / "bin", folder / "wheels"
        for path in (self.root, self.bin, self.wheels):
            path.mkdir()
        shutil.copytree(ROOT / "run_scripts", self.root / "run_scripts")
        for version in ("1.0", "2.0"):
            with zipfile.ZipFile(self.wheels / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
                for name, text in (
                    ("METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n"),
                    ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
                    ("RECORD", ""),
                ):
                    wheel.writestr(f"tiny-{version}.dist-info/{name}", text)
                wheel.writestr("tiny.py", "")
        self.require("tiny>=1", "tiny==1.0")
        for tool in filter(shutil.which, "awk bash cat df dirname env flock ls mkdir rm".split()):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.python(f"exec '{sys.executable}' \"$@\"")

    def require(self, requirements: str, constraints: str = "") -> None:
        (self.root / "requirements.txt").write_text(requirements + "\n")
        (self.root / "constraints.txt").write_text(constraints + "\n")

    def python(self, body: str) -> None:
        (self.bin / "python3").write_text("#!/bin/sh\n" + body + "\n")
        (self.bin / "python3").chmod(0o755)

    def tiny_version(self) -> str:
        code = "import tiny, importlib.metadata as m; print(m.version('tiny'))"
        return subprocess.check_output([self.root / ".venv/bin/python", "-c", code], text=True).strip()

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri()}
        env = {"PATH": str(self.bin), "HOME": str(self.root), "KAT_DISK_GB": "0", **pip, **env}
        command = ["bash", str(self.root / "run_scripts" / script), *args]
        return subprocess.run(
            command, cwd="/", env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_setup_makes_and_keeps_the_environment(project):
    run = project.run("setup.sh")
    assert run.returncode == 0, run.stderr
    assert f"using {project.root}/.venv/bin/python (python3 on PATH lacks tiny)" in run.stdout
    assert project.tiny_version() == "1.0"

    run = project.run("setup.sh")
    assert run.returncode == 0 and "installing" not in run.stdout

    project.require("tiny>=1.5", "tiny==3.0")  # nowhere to be had, as without a network
    run = project.run("setup.sh")
    assert run.returncode == 1 and "pip could not install the requirements" in run.stderr
    assert not (project.root / ".venv/setup_stamp").exists()

    (project.root / ".venv/kept").touch()
    project.require("tiny>=1.5", "tiny==2.0")
    run = project.run("setup.sh")
    assert run.returncode == 0 and "installing" in run.stdout and (project.root / ".venv/kept").exists()
    assert project.tiny_version() == "2.0"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["half-installed package", "no python"])
def test_setup_repairs_a_broken_environment(project, damage):
    assert project.run("setup.sh").returncode == 0
    if damage == "half-installed package":
        (project.root / ".venv/setup_stamp").unlink()
        next(project.root.glob(".venv/lib/*/site-packages/tiny.py")).unlink()
    else:
        (project.root / ".venv/bin/python").unlink()
    run = project.run("setup.sh")
    assert run.returncode == 0, run.stderr
    assert project.tiny_version() == "1.0"


def test_setup_uses_a_python_that_has_everything(project):
    project.require("pytest>=8\n\n# Optional: x\nfvcore>=99")
    run = project.run("setup.sh")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"setup: using {sys.executable} (it has all of requirements.txt)\n"
    assert not (project.root / ".venv").exists()


def test_setup_says_what_is_wrong(project):
    run = project.run("setup.sh", KAT_DISK_GB="9999999")
    assert run.returncode == 1 and "GB left" in run.stderr

    real = f"exec '{sys.executable}' \"$@\""
    project.python(f'case "$*" in *venv*) exit 1 ;; esac\n{real}')
    run = project.run("setup.sh")
    assert run.returncode == 1 and "cannot make a virtual environment" in run.stderr and "python3-venv" in run.stderr

    project.require("no-such-package")
    (project.root / ".venv/precious").touch()
    run = project.run("setup.sh")
    assert run.returncode == 1 and "is not a virtual environment" in run.stderr
    assert (project.root / ".venv/precious").exists()

    project.python("exit 1")
    run = project.run("setup.sh")
    assert run.returncode == 1 and "there is no Python 3.10 to 3.14" in run.stderr
