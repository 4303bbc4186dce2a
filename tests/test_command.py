"""How commands end, whatever they do: the table of exit codes in the README, for every command it names."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from studies import Command

from lda import command, evaluate, train
from lda.errors import FailedError, UsageError
from sweeps import run


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


@pytest.mark.parametrize(
    ("given", "threads"),
    [(None, None), ("", None), ("  ", None), ("4", 4), ("4,2", 4), (" 3 , 2 ", 3), ("1024", 1024)],
)
def test_openmp_threads(given: str | None, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenMP itself reads the variable: the threads of nested levels, the outermost first."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert command.openmp_threads() == threads


@pytest.mark.parametrize("given", ["many", "0", "-1", "4,", "4,x", "1.5", "1025", "9" * 5000, "\u00b2"])
def test_threads_that_are_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    with pytest.raises(UsageError, match="OMP_NUM_THREADS: expected a whole number from 1 to 1024, or several"):
        command.openmp_threads()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, errors="strict"))
    text = "34.9 \u00b1 0.2 \u2013 \u00c9tude \u2192 Str\u00f6\u00dfe \u732b \udce9"
    assert command.exit_code(lambda: print(text)) == 0
    sys.stdout.flush()
    plain = {
        "ascii": "34.9 +- 0.2 - Etude -> Strosse ? ?",
        "latin-1": "34.9 \u00b1 0.2 - \u00c9tude -> Str\u00f6\u00dfe ? ?",
        "utf-8": "34.9 \u00b1 0.2 \u2013 \u00c9tude \u2192 Str\u00f6\u00dfe \u732b ?",
    }
    assert printed.getvalue().decode(encoding) == plain[encoding] + "\n"


class Swallows:
    """Interrupts this process in a destructor, where Python swallows what is raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_is_swallowed_ends_a_training_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_unit(*_: object, check: Callable[[], None], **__: object) -> NoReturn:
        Swallows()
        check()
        raise AssertionError("went on")

    monkeypatch.setattr("lda.unit.run_unit", run_unit)
    assert train.main(["--output", str(tmp_path / "run")]) == 130
    assert "interrupted; nothing is kept yet" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_is_swallowed_ends_a_study_all_the_same(
    tmp_path: Path, standin_tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def announcement(*_: object) -> str:
        Swallows()
        return "W&B: announced"

    study = Command(tmp_path, standin_tiny)
    monkeypatch.setattr("sweeps.run.announcement", announcement)
    monkeypatch.setattr("sweeps.run.share_failure", lambda: None)
    options = ["--data-root", str(standin_tiny), "--output", str(tmp_path / "runs"), "--workers", "1"]
    assert run.main(["--study", str(tmp_path / "mine.yaml"), *options]) == 130
    printed = capsys.readouterr()
    assert "W&B: announced" in printed.out
    assert "everything finished is kept. Go on with:" in printed.err
    assert study.workers() == []
