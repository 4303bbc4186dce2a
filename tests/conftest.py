"""Fixtures shared by several test files."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trees

# A job in the background of a shell ignores Ctrl-C, and so would every process that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the sets of Protocol-2 and 3 and CUHK02, a few persons each (see tests/trees.py). Read only."""
    root = tmp_path_factory.mktemp("tiny-sets")
    trees.protocol_sets(root)
    return root


@pytest.fixture(scope="session")
def standin_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in at scale tiny, generated once per test session. Read only."""
    root = tmp_path_factory.mktemp("standin") / "tiny"
    subprocess.run(
        [sys.executable, "-m", "lda.data.standin", "--scale", "tiny", "--output", str(root)],
        check=True,
        capture_output=True,
    )
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test writes reaches the user's cache directory."""
    monkeypatch.setenv("LDA_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
