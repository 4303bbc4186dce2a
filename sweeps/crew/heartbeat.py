"""Signs of life of a running attempt, the fence around a worker that could not give any, and the watch over a hang."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable

from sweeps.list.storage import OUTAGE, reason

EXIT_FENCED = 75  # EX_TEMPFAIL: nothing is wrong with the worker, it only lost touch
EXIT_HUNG = 76


def log(text: str) -> None:
    """A line for the worker's log. The log may lie on a full disk: that must not end what reports it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _uptime() -> float:
    """Seconds of a clock that goes on while the machine sleeps (where there is one)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Watchdog:
    """Looks whether an attempt moves on while entered: a hang leaves the heart beating.

    Args:
        stalled: called once when nothing has moved for a sixth of `limit` seconds, with words.
        hung: called when nothing has for all of it; then the process ends.
    """

    def __init__(self, stalled: Callable[[str], None], hung: Callable[[str], None], limit: float) -> None:
        self._stalled, self._hung, self._limit = stalled, hung, limit
        self._moved = time.monotonic()
        self._told = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def moved(self) -> None:
        """A step, a batch, or a wait that is known of."""
        self._moved, self._told = time.monotonic(), False

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._limit / 20)):
            still = time.monotonic() - self._moved
            if still > self._limit:
                self._hung(f"no step for {still / 60:.0f} min")
                os._exit(EXIT_HUNG)
            if still > self._limit / 6 and not self._told:
                self._told = True
                self._stalled(f"no step for {still / 60:.0f} min")


class Heartbeat:
    """Records that an attempt is alive, every `interval` seconds while entered.

    When that fails for as long as `limit` seconds, others may have taken the attempt over: the process ends at once,
    before it writes anything more (fencing). The same happens when the whole process slept for that long.
    """

    def __init__(self, beat: Callable[[], None], interval: float, limit: float) -> None:
        self._beat, self._interval, self._limit = beat, interval, limit
        self._done = threading.Event()
        self._last = _uptime()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._record, self._watch)]

    def __enter__(self) -> Heartbeat:
        self._beat()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def check(self) -> None:
        """End the process if the attempt may be another's by now. Called before whatever must not be done twice."""
        if _uptime() - self._last > self._limit:
            log("fenced: no heartbeat could be recorded in time, the trial may be another's by now")
            os._exit(EXIT_FENCED)

    def _record(self) -> None:
        while not self._done.wait(self._interval):
            now = _uptime()
            try:
                self._beat()
            except OUTAGE as error:
                log(f"heartbeat not recorded, will try again: {reason(error)}")
                continue
            self._last = now  # the time before the call: when exactly the database took it is unknown

    def _watch(self) -> None:
        while not self._done.wait(min(0.2, self._interval)):
            self.check()
