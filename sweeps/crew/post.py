"""What a worker says and hears: events and status for people, signs of life for the storage, the word to stop."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sweeps.crew.heartbeat import Heartbeat, Watchdog, log
from sweeps.list.storage import patiently
from sweeps.study_folder import EventKind, StudyFolder, WorkerSign

T = TypeVar("T")

_STATUS_SECONDS = 1.0


class Stopped(BaseException):
    """The coordinator said stop, or is gone. No Exception: nothing below may take it for a failure of the unit."""


class Post:
    """A worker's place in its study. Whatever the worker does, down to a training step, speaks and listens here.

    Args:
        worker: id of the worker.
        heartbeat_seconds, grace_seconds: how often it says that it lives, and how long it may be silent.
        stop: set when the worker must end.
    """

    def __init__(
        self, folder: StudyFolder, worker: str, heartbeat_seconds: float, grace_seconds: float, stop: threading.Event
    ) -> None:
        self.folder, self.worker = folder, worker
        self._heartbeat_seconds, self._grace_seconds = heartbeat_seconds, grace_seconds
        self._stop = stop
        self._sign = WorkerSign(folder, worker)
        self._heart: Heartbeat | None = None
        self._watchdog: Watchdog | None = None
        self._status: dict[str, Any] = {}
        self._status_written = 0.0

    # --- saying ------------------------------------------------------------------------------------------------------

    def event(self, kind: EventKind, text: str) -> None:
        """Add a line to the study's events and to the worker's log."""
        log(text)
        with contextlib.suppress(OSError):  # a full disk; events are for people, a trial is not lost for them
            self.folder.event(kind, text, self.worker)

    def say(self, **status: Any) -> None:
        """Tell the display what is done now; at most once a second, and at once when the state changes."""
        changed = "state" in status and status != {key: self._status.get(key) for key in status}
        self._status = status if changed else {**self._status, **status}
        if changed or time.monotonic() - self._status_written > _STATUS_SECONDS:
            self._status_written = time.monotonic()
            device = os.environ.get("CUDA_VISIBLE_DEVICES") or "cpu"
            with contextlib.suppress(OSError):  # as for events
                self._sign.write({"worker": self.worker, "pid": os.getpid(), "device": device, **self._status})

    @contextlib.contextmanager
    def heartbeat(self, record: Callable[[], None] | None) -> Iterator[None]:
        """Give signs of life while entered; `record` makes them in the storage, where that keeps any."""

        def beat() -> None:
            if record is not None:
                record()
            self._sign.touch()

        with Heartbeat(beat, self._heartbeat_seconds, self._grace_seconds - self._heartbeat_seconds) as heart:
            self._heart = heart
            try:
                yield
            finally:
                self._heart = None

    @contextlib.contextmanager
    def watchdog(self, stalled: Callable[[str], None], hung: Callable[[str], None], limit: float) -> Iterator[None]:
        """Watch over a hang while entered; see `Watchdog`."""
        with Watchdog(stalled, hung, limit) as watchdog:
            self._watchdog = watchdog
            try:
                yield
            finally:
                self._watchdog = None

    def leave(self) -> None:
        """Leave in good order."""
        self._sign.remove()

    # --- hearing -----------------------------------------------------------------------------------------------------

    @property
    def stopped(self) -> bool:
        """Whether the worker must end."""
        return self._stop.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait, but not for longer than until the worker must end. Returns whether it must."""
        return self._stop.wait(seconds)

    def fence(self) -> None:
        """End the process if the attempt may be another's by now. Called before whatever must not be done twice."""
        if self._heart is not None:
            self._heart.check()

    def check(self) -> None:
        """As `fence`; raises Stopped when the worker must end. Called at every step and before every write, which also
        says that the attempt moves on."""
        self.fence()
        if self._watchdog is not None:
            self._watchdog.moved()
        if self.stopped:
            raise Stopped

    def patiently(self, action: Callable[[], T]) -> T:
        """Call the storage until it answers, for as long as the worker may be silent."""
        return patiently(action, self._grace_seconds)
