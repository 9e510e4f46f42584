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
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


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
    problems, _ = check_env.check()
    assert problems == []


def test_missing_old_and_optional_packages_are_told_apart(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# comment\npytest>=1  # fine\npackaging>=99\nno-such-package\nfvcore>=99\n"
        'other-system; sys_platform == "no-such-system"\n'
    )
    problems, optional = check_env.check(path)
    assert problems[0] == "lacks no-such-package"
    assert problems[1].startswith("packaging ") and problems[1].endswith("(not >=99)")
    assert len(problems) == 2
    assert len(optional) == 1 and optional[0].startswith("fvcore")


def test_a_package_that_does_not_import_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "broken_build.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "requirements.txt").write_text("pytest")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(check_env.MODULES, "pytest", "broken_build")
    (problem,), _ = check_env.check(tmp_path / "requirements.txt")
    assert "RuntimeError: operator torchvision::nms does not exist" in problem


@pytest.mark.parametrize("wheel", ["cupy", "cupy-cuda12x", "cupy-cuda13x"])
def test_any_wheel_of_cupy_will_do(wheel, tmp_path, monkeypatch):
    folder = tmp_path / f"{wheel.replace('-', '_')}-14.9.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: 14.9.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert check_env.installed_version("cupy-cuda13x") == "14.9.0"


@pytest.mark.parametrize(
    "script", sorted((ROOT / "run_scripts").glob("*.sh")) + [ROOT / ".ci/run"], ids=lambda p: p.name
)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_runs_the_tests_as_a_user_does():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("bash run_scripts/test.sh")


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
                info = f"tiny-{version}.dist-info"
                wheel.writestr("tiny.py", "")
                wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{info}/RECORD", "")
        self.require("tiny>=1", "tiny==1.0")
        tools = "awk bash cat cut df dirname env flock ls mkdir rm sed tail tee uname".split()
        for tool in filter(shutil.which, tools):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.python("exec '" + sys.executable + '\' "$@"')

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
        env = {
            "PATH": str(self.bin),
            "HOME": str(self.root),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
            "KAT_DISK_GB": "0",
            **env,
        }
        return subprocess.run(
            ["bash", str(self.root / "run_scripts" / script), *args],
            cwd="/",
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
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

    project.require("tiny>=1.5", "tiny==2.0")
    run = project.run("setup.sh")
    assert run.returncode == 0 and "installing" in run.stdout and "anew" not in run.stdout
    assert project.tiny_version() == "2.0"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["half-installed package", "python gone"])
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
    project.require("pytest>=8\nfvcore>=99")
    run = project.run("setup.sh")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(
        f"setup: using {sys.executable} (it has all of requirements.txt (optional, absent: fvcore"
    )
    assert not (project.root / ".venv").exists()


def test_setup_says_what_is_wrong(project):
    run = project.run("setup.sh", KAT_DISK_GB="9999999")
    assert run.returncode == 1 and "GB of disk left" in run.stderr

    project.require("no-such-package")
    (project.root / ".venv").mkdir()
    (project.root / ".venv/precious").touch()
    run = project.run("setup.sh")
    assert run.returncode == 1 and "is no virtual environment" in run.stderr
    assert (project.root / ".venv/precious").exists()

    project.python("exit 1")
    run = project.run("setup.sh")
    assert run.returncode == 1 and "needs Python 3.10 to 3.14" in run.stderr


def test_quickstart_removes_nothing(project):
    """main.py moves an earlier run aside."""
    project.require("pytest>=8")
    (project.root / "main.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "if '--eval' in sys.argv:\n    print('top-1 97.50 %')\n    sys.exit()\n"
        "out = Path(sys.argv[sys.argv.index('--output-dir') + 1])\n"
        "assert {'mine.pth', 'checkpoint.pth'} <= {p.name for p in out.iterdir()}\n"
        "assert sys.argv[-2:] == ['--epochs', '1']\n"
        "for name in ('checkpoint.pth', 'best_checkpoint.pth', 'log.txt', 'curves.png'):\n    (out / name).touch()\n"
    )
    out = project.root / "my runs"
    out.mkdir()
    (out / "mine.pth").touch()
    (out / "checkpoint.pth").touch()
    for _ in range(2):
        run = project.run("quickstart.sh", "--epochs", "1", OUT="my runs")
        assert run.returncode == 0, run.stdout + run.stderr
        assert "top-1 97.50 %" in run.stdout and "my runs/best_checkpoint.pth" in run.stdout
