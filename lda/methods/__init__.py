"""The methods: one file each, found by its name. Nothing outside a method's file names one, but for the two below.

A method of your own is one more file here, or in a folder that the environment variable `LDA_METHODS` names (several:
separated as in PATH). What the file holds: `lda/methods/base.py`. Methods import torch, this module does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lda import arguments
from lda.errors import UsageError, unknown
from lda.groups import Chosen, Setup
from lda.settings import settings_of

if TYPE_CHECKING:
    from lda.methods.base import Method

DEFAULT = "lda"
"""The method of a run that names none."""

CONTROL = "baseline"
"""The method that a study sets beside its own, on the same seeds."""

VARIABLE = "LDA_METHODS"
_HERE = Path(__file__).parent
_NO_METHODS = ("__init__", "base", "plain")  # what methods are made from


def names() -> list[str]:
    """Every method there is, in alphabetical order."""
    return sorted(_files())


def _files() -> dict[str, Path]:
    folders = [
        arguments.checked(VARIABLE, arguments.path, folder)
        for folder in os.environ.get(VARIABLE, "").split(os.pathsep)
        if folder
    ]
    found: dict[str, Path] = {}
    for folder in (_HERE, *folders):
        if not folder.is_dir():
            raise UsageError(f"{VARIABLE}: {str(folder)!r} is not a folder")
        for path in sorted(folder.glob("*.py")):
            if path.stem in _NO_METHODS:
                continue
            if path.stem in found:
                raise UsageError(
                    f"{path}: method {path.stem!r} is there already, in {found[path.stem]}; rename the file"
                )
            found[path.stem] = path
    return found


def find(name: str) -> type[Method]:
    """The class of a method. Raises UsageError for a name that is not there, or a file that holds no method."""
    files = _files()
    if name not in files:
        raise UsageError(f"method: {unknown('method', name, sorted(files))}")
    return _class_in(_module(name, files[name]), files[name])


def _module(name: str, path: Path) -> ModuleType:
    qualified = f"{__name__}.{name}"
    loaded = sys.modules.get(qualified)
    if path.parent == _HERE or (loaded is not None and loaded.__file__ == str(path)):
        return importlib.import_module(qualified)
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[qualified]
        raise
    return module


def _class_in(module: ModuleType, path: Path) -> type[Method]:
    from lda.methods.base import Method

    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise UsageError(f"{path}: expected one class that derives from lda.methods.base.Method, found {len(own)}")
    return own[0]


def owners(key: str) -> list[str]:
    """The methods that have a setting of this name."""
    return [name for name in names() if key in settings_of(find(name).Settings)]


def build(chosen: Chosen, setup: Setup) -> Method:
    """The method with fresh weights, drawn from the seed without touching the global generator.

    Raises UsageError when it cannot train on these sources.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        return find(chosen.name)(chosen.settings, setup)
