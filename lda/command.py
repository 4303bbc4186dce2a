"""What every command shares: how it ends, how it shows progress, and how many cores it may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lda.errors import FailedError, UsageError


def exit_code(work: Callable[[], int | None]) -> int:
    """Do `work`. 0 done, 1 failed (a disk that is full, a loss that is not finite), 2 bad usage, 130 interrupted.

    `work` may say by a code of its own that it is done and something is wrong.
    """
    try:
        return work() or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, FailedError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def cores() -> int:
    """Cores this process may use: a container or a batch job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`. A progress bar on a terminal, one line elsewhere, nothing if quiet; on stderr."""
    if quiet:
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        print(title, file=sys.stderr, flush=True)
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
