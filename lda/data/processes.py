"""Work on many images with all cores: a process pool that cannot be left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from lda.errors import UsageError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def map_processes(function: Callable[[_Job], _Result], jobs: Iterable[_Job], processes: int) -> Iterator[_Result]:
    """`map(function, jobs)` in `processes` processes, in order; in this one if `processes` is 1.

    An exception, Ctrl-C or the end of this process ends the others. The function must be importable; its module is
    what a process imports, so keep torch out of it. Raises UsageError if a process dies.
    """
    if processes == 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")  # a forked child could inherit the locks of other threads
    with ProcessPoolExecutor(processes, context, initializer=follow_parent) as pool:
        try:
            yield from pool.map(function, jobs)
        except BrokenProcessPool:
            raise UsageError(
                "a worker process died: out of memory, or started from a script without `if __name__ == '__main__':`"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def follow_parent() -> None:
    """In a worker process (spawn, forkserver): leave Ctrl-C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
