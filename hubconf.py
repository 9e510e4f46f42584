"""Entry points of torch.hub, one for each model: torch.hub.load(REPOSITORY, "kat_tiny_patch16_224", num_classes=10).

The folders are loaded under the names of the installed packages, kan_models and kan_cuda: `import models` or
`import utils` in the caller's code never finds the modules of this repository.
"""

import importlib.util
import pathlib
import sys

import timm

dependencies = ["torch", "timm"]
_ROOT = pathlib.Path(__file__).resolve().parent


def _load(name: str, folder: str) -> None:
    """Import a folder of this repository as the package `name`, unless a package of that name is imported already."""
    if name in sys.modules:
        return
    init = _ROOT / folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, init)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    if init.exists():
        spec.loader.exec_module(sys.modules[name])


for _name, _folder in (("kan_cuda", "cuda"), ("kan_basis", "kan_basis"), ("kan_models", "models")):
    _load(_name, _folder)
for _name in timm.list_models():
    if timm.model_entrypoint(_name).__module__.startswith("kan_models."):
        globals()[_name] = timm.model_entrypoint(_name)
