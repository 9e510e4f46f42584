"""Print whether this Python has what requirements.txt lists above "# Optional", in one line; exit status 0 if it has.

Each package is imported, because versions alone prove little: a torchvision built for another torch fails at import.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    print(f"is Python {sys.version.split()[0]}, and 3.10 or newer is needed")
    sys.exit(1)

import re
import warnings
from importlib import import_module, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "pytest-xdist": "xdist"}


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def problem(name: str, least: str) -> str:
    """What is wrong with a package; "" if it is installed, not older than the version `least`, and can be imported."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"lacks {name}"
    if numbers(version) + [0] * len(numbers(least)) < numbers(least):
        return f"has {name} {version}, older than {least}"
    try:
        import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # A broken build can raise almost any exception.
        return f"has {name} {version}, which cannot be imported ({type(error).__name__}: {error})".replace("\n", " ")
    return ""


def problems(path: Path = ROOT / "requirements.txt") -> list[str]:
    """One sentence without its subject for each package that does not fit; lines have the form `name>=version`."""
    required = re.findall(r"^([\w.-]+)(?:>=([\d.]+))?", path.read_text().partition("\n# Optional")[0], re.MULTILINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [found for name, least in required if (found := problem(name, least))]


if __name__ == "__main__":
    found = sorted(problems(), reverse=True)  # the packages that it lacks come first
    print("; ".join(found).replace("; lacks ", ", ") or "has all of requirements.txt")
    sys.exit(bool(found))
