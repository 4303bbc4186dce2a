"""How the commands of lda.data end: 0 done, 1 something is wrong or failed, 2 bad usage, 130 interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trees

from lda.command import exit_code
from lda.data import draw_splits
from lda.errors import UsageError


def _fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("outcome", "code", "told"),
    [
        (None, 0, ""),
        (0, 0, ""),
        (1, 1, ""),
        (UsageError("root: no folder"), 2, "error: root: no folder\n"),
        (OSError(28, "No space left on device", "a.png"), 1, "failed: [Errno 28] No space left on device: 'a.png'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    outcome: int | BaseException | None, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work = (lambda: _fail(outcome)) if isinstance(outcome, BaseException) else (lambda: outcome)
    assert exit_code(work) == code
    assert capsys.readouterr().err == told


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("command", ["doctor", "person_search"])
def test_ctrl_c_ends_with_130(command: str, tmp_path: Path) -> None:
    """Interrupted while it reads a file that never comes to an end."""
    root, output = tmp_path / "data", tmp_path / "output"
    if command == "doctor":
        trees.market1501(root)
        endless = sorted((root / "Market-1501-v15.09.15/query").glob("*.jpg"))[0]
        endless.unlink()
        options = ["--data-root", str(root), "--dataset", "market1501", "--verify"]
    else:
        endless = root / "annotation/Person.mat"
        endless.parent.mkdir(parents=True)
        (root / "Image/SSM").mkdir(parents=True)
        options = ["--input", str(root), "--output", str(output)]
    os.mkfifo(endless)
    process = subprocess.Popen(
        [sys.executable, "-m", f"lda.data.{command}", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    writer = _when_read(endless, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    os.close(writer)
    assert (process.returncode, errors.splitlines()[-1:]) == (130, ["interrupted"])
    assert "Traceback" not in errors
    assert not output.exists()


def _when_read(pipe: Path, process: subprocess.Popen[str]) -> int:
    """The writing end of a named pipe, as soon as somebody waits at the other end."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.02)
    raise AssertionError(f"never read: {process.communicate(timeout=10)}")


def test_ctrl_c_while_splits_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(draw_splits, "FOLDER", tmp_path)
    monkeypatch.setattr(draw_splits, "draw", lambda name: signal.raise_signal(signal.SIGINT))
    assert draw_splits.main(["--write"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert os.listdir(tmp_path) == []
