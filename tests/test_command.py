"""How commands end, whatever they do: the table of exit codes in the README, for every command it names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lda import command, evaluate, train
from lda.errors import FailedError, UsageError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UsageError("--x: expected y"), 2, "error: --x: expected y\n"),
        (FailedError("loss is nan"), 1, "failed: loss is nan\n"),
        (OSError(28, "No space left on device"), 1, "failed: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_every_end_has_its_code_and_one_line(
    error: BaseException | None, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        if error is not None:
            raise error

    assert command.exit_code(work) == code
    assert capsys.readouterr().err == line


def test_work_may_say_its_own_code_and_a_bug_is_no_exit_code() -> None:
    assert command.exit_code(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        command.exit_code(lambda: 1 // 0)


def interrupted(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "name", "main", "arguments"),
    [
        (evaluate, "parse_overrides", evaluate.main, ["--checkpoint", __file__, "--target", "prid"]),
        (train, "resolve", train.main, []),
    ],
    ids=["evaluate", "train"],
)
def test_ctrl_c_is_130(
    module: Any, name: str, main: Callable[[list[str]], int], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other commands have theirs in their own tests, most with a real signal."""
    monkeypatch.setattr(module, name, interrupted)
    assert main(arguments) == 130


def test_progress_is_one_line_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    with command.progress("drawing", 3) as advance:
        advance(3)
    with command.progress("drawing", 3, quiet=True) as advance:
        advance(3)
    assert capsys.readouterr().err == "drawing\n"


def test_cores_are_those_this_process_may_use() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here")
    allowed = next(line for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list:"))
    counts = [part.split("-") for part in allowed.split(":")[1].strip().split(",")]
    assert command.cores() == sum(int(part[-1]) - int(part[0]) + 1 for part in counts)
