"""Does this Python satisfy requirements.txt, and do its packages import together?

    python run_scripts/check_env.py [requirements.txt]

Prints one line; exit status 0 if satisfied, else 1. Needs only the standard library and `packaging` (or pip, which carries it).
Versions alone prove little: a torch and a torchvision that do not belong together fail at import
("operator torchvision::nms does not exist"), and so does SciPy built for another NumPy. So every required package is imported.
"""

import re
import sys
import warnings
from importlib import import_module, metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        print("lacks pip and packaging")
        sys.exit(1)

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = {"cupy", "fvcore", "wandb"}  # everything runs without them
MODULES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
}  # where the module is not named like the package
CUPY = re.compile(r"cupy(-cuda\d+x|-rocm-[\d-]+)?")  # any wheel of CuPy will do: which one depends on torch's CUDA


def read_requirements(path: Path) -> list[Requirement]:
    """Requirements of a file that apply to this Python and machine."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in path.read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return [r for r in requirements if r.marker is None or r.marker.evaluate()]


def installed_version(name: str) -> str | None:
    if CUPY.fullmatch(name):
        names = (dist.metadata["Name"] or "" for dist in metadata.distributions())
        name = next((n for n in names if CUPY.fullmatch(n.lower())), name)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_error(name: str) -> str | None:
    try:
        import_module(MODULES.get(name, name.replace("-", "_")))
    except (Exception, SystemExit) as e:  # a broken build raises anything: ImportError, OSError, RuntimeError
        first_line = (str(e).splitlines() or [""])[0]
        return f"{type(e).__name__}: {first_line}"[:200]
    return None


def check(path: Path = ROOT / "requirements.txt") -> tuple[list[str], list[str]]:
    """What is wrong, and which optional packages are absent or too old; both empty if everything is there."""
    missing, wrong, optional, present = [], [], [], []
    for requirement in read_requirements(path):
        name = "cupy" if CUPY.fullmatch(requirement.name) else requirement.name
        version = installed_version(requirement.name)
        if version is None:
            (optional if name in OPTIONAL else missing).append(name)
        elif not requirement.specifier.contains(version, prereleases=True):
            (optional if name in OPTIONAL else wrong).append(f"{name} {version} (not {requirement.specifier})")
        elif name not in OPTIONAL:
            present.append((name, version))
    problems = (["lacks " + ", ".join(missing)] if missing else []) + wrong
    if not problems:  # imports take seconds: only when all versions are right
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors = ((name, version, import_error(name)) for name, version in present)
            problems = [f"{name} {version} does not import ({error})" for name, version, error in errors if error]
    return problems, optional


def main() -> int:
    problems, optional = check(*map(Path, sys.argv[1:2]))
    without = f" (optional, absent: {', '.join(optional)})" if optional else ""
    print("; ".join(problems) or "has all of requirements.txt" + without)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
