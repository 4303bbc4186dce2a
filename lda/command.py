"""What every command shares: how it prints, ends and is interrupted, shows progress, and how many cores it may use."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lda.errors import FailedError, UsageError

_MOST_THREADS = 1024


def exit_code(work: Callable[[], int | None]) -> int:
    """Do `work`. 0 done, 1 failed (a disk that is full, a loss that is not finite), 2 bad usage, 130 interrupted.

    `work` may say by a code of its own that it is done and something is wrong. What it prints can be printed whatever
    the locale; a reader that has gone (`| head`) ends it without a word, and with 1.
    """
    open_streams()
    try:
        try:
            code = work() or 0
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here a full disk is still told
        return code
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except BrokenPipeError:
        return 1
    except (OSError, FailedError) as error:
        say(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        _drop_what_cannot_be_printed()


def say(line: str) -> None:
    """Print a line on stderr. Nobody may be there to be told: no reason to fail."""
    with contextlib.suppress(OSError):  # nobody can be told
        print(line, file=sys.stderr, flush=True)


# --- what is printed -------------------------------------------------------------------------------------------------

_IN_ASCII = {
    "\N{PLUS-MINUS SIGN}": "+-", "\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": "x", "\N{MIDDLE DOT}": "*", "\N{RIGHTWARDS ARROW}": "->",
    "\N{GREATER-THAN OR EQUAL TO}": ">=", "\N{LESS-THAN OR EQUAL TO}": "<=", "\N{LATIN SMALL LETTER SHARP S}": "ss",
    "\N{LEFT SINGLE QUOTATION MARK}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"', "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}  # fmt: skip


def open_streams() -> None:
    """Make stdin, stdout and stderr safe to use: open, and able to print any text in any locale."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:  # closed by our parent: the next file opened would take its place
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed when the interpreter began
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    codecs.register_error("lda.readable", _readable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lda.readable")


def _readable(error: UnicodeError) -> tuple[str, int]:
    """What to print for text that an encoding lacks: letters without accents, signs spelt out."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(sign: str) -> str:
    plain = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return _IN_ASCII.get(sign) or plain or ("" if unicodedata.combining(sign) else "?")


def _drop_what_cannot_be_printed() -> None:
    """The interpreter flushes once more when it ends, and would fail with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- being told to stop ----------------------------------------------------------------------------------------------


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does, and whichever comes second ends the process at once. What the parent
    chose to ignore (nohup, a shell's background) stays ignored.

    Yields what is set by then: an interrupt is raised anywhere, and Python swallows one that is raised in a destructor
    or a callback (of the import system, say), so whoever works on for long must look.
    """
    told = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        told.set()
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    found = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- cores -----------------------------------------------------------------------------------------------------------


def cores() -> int:
    """Cores this process may use: a container or a batch job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def openmp_threads() -> int | None:
    """The threads that OMP_NUM_THREADS asks for, of nested levels ("4,2") the outermost; None where it is not set.

    Raises UsageError for anything but whole numbers.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not given:
        return None
    levels = [level.strip() for level in given.split(",")]
    if not all(re.fullmatch("[0-9]{1,4}", level) and 1 <= int(level) <= _MOST_THREADS for level in levels):
        wanted = f"a whole number from 1 to {_MOST_THREADS}, or several with commas between"
        raise UsageError(f"OMP_NUM_THREADS: expected {wanted}, got {given!r}")
    return int(levels[0])


# --- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`. A progress bar on a terminal, one line elsewhere, nothing if quiet; on stderr."""
    if quiet:
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        say(title)
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
