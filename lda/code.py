"""Which code runs: what a study compares before it mixes results, and what every run writes down. No torch."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_PACKAGES = ("lda-reid", "torch", "torchvision", "numpy", "pillow", "wandb", "optuna")


@dataclass(frozen=True)
class Code:
    """The code of this process, as it was when it was first asked.

    Attributes:
        digest: hash of the source files of `lda` and `sweeps`, and of the methods in the folders of LDA_METHODS: what a
            result may depend on. Tables, tests and documents are not part of it.
        commit: of the checkout; "" where there is none.
        dirty: whether the checkout has changes that are in no commit.
        versions: package -> version.
    """

    digest: str
    commit: str
    dirty: bool
    versions: dict[str, str]


@functools.cache
def this_code() -> Code:
    """The code of this process. Ask early: a checkout may change under a process that runs for days."""
    return Code(
        digest=_digest(_sources()),
        commit=_git("rev-parse", "HEAD"),
        dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
        versions={name: _version(name) for name in _PACKAGES},
    )


def describe(commit: str, dirty: bool) -> str:
    """A commit in print: `commit a1b2c3d with local changes`."""
    return (f"commit {commit[:7]}" if commit else "no commit") + (" with local changes" if dirty else "")


def _sources() -> Iterable[tuple[str, Path]]:
    """(name, file) of everything that is hashed; a name says nothing of where the checkout lies."""
    for package in (_HERE, _HERE.parent / "sweeps"):
        for path in sorted(package.rglob("*.py")):
            yield path.relative_to(_HERE.parent).as_posix(), path
    for own in filter(None, os.environ.get("LDA_METHODS", "").split(os.pathsep)):
        for path in sorted(Path(own).expanduser().glob("*.py")):
            yield f"LDA_METHODS/{path.name}", path


def _digest(sources: Iterable[tuple[str, Path]]) -> str:
    whole = hashlib.sha256()
    for name, path in sources:
        whole.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    """Output of git in the source tree, empty where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_HERE, capture_output=True, encoding="utf-8", errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
