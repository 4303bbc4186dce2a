"""The worker processes of one machine: started, told their work, replaced when they die, stopped together."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from lda.errors import FailedError, UsageError
from sweeps.crew.assignment import STOP_SECONDS, Assignment, End
from sweeps.crew.heartbeat import EXIT_FENCED, EXIT_HUNG
from sweeps.crew.slots import Slot
from sweeps.study_folder import StudyFolder

_DEATHS_IN_VAIN = 3  # of workers in a row, beside one per slot, while no attempt was begun


class StudyError(FailedError):
    """The study cannot go on, through no mistake in its settings."""


class WorkerPool:
    """One process per slot.

    Args:
        assignment: what to tell the worker of a slot; the number counts the processes started.
    """

    def __init__(
        self, slots: Sequence[Slot], folder: StudyFolder, assignment: Callable[[Slot, int], Assignment]
    ) -> None:
        self._slots, self._folder, self._assignment = slots, folder, assignment
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._closed: dict[str, str] = {}
        self._command = uuid.uuid4().hex[:4]
        self._started = 0
        self._deaths_in_vain, self._attempts = 0, -1

    def supervise(self, attempts: int) -> None:
        """Start the workers that are missing. `attempts` counts those begun so far, by whomever.

        Raises UsageError when a worker found the data or the settings unusable, StudyError when workers keep dying
        before they begin anything, or all are closed.
        """
        if len(self._closed) == len(self._slots):
            reason = next(iter(self._closed.values()))
            raise StudyError(f"no worker of this machine can work: {reason}. Mend it; the same command goes on")
        for slot in self._slots:
            if self.name(slot) in self._closed:
                continue
            process = self._processes.get(slot.index)
            if process is not None:
                if process.poll() is None:
                    continue
                _hang_up(process)
                self._judge(slot, process, attempts)
            self._processes[slot.index] = self._start(slot)

    def _judge(self, slot: Slot, process: subprocess.Popen[bytes], attempts: int) -> None:
        """A worker ended: say so, or raise where another one would end the same way."""
        end = _last_word(process)
        if end is not None and end.kind == "unusable":
            raise UsageError(end.text)
        how = _how(end, process.returncode)
        self._deaths_in_vain = self._deaths_in_vain + 1 if attempts == self._attempts else 0
        self._attempts = attempts
        if self._deaths_in_vain >= _DEATHS_IN_VAIN + len(self._slots):
            raise StudyError(f"workers die before they begin: the last one {how} ({self._log(slot)})")
        self._folder.event("worker", f"worker {slot.index} {how}; starting it again")

    def _start(self, slot: Slot) -> subprocess.Popen[bytes]:
        with self._log(slot).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sweeps.crew.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,  # for its last word alone; what it prints goes to the log
                stderr=log,
                env={**os.environ, **slot.environment},
                start_new_session=True,  # Ctrl-C is the coordinator's to handle
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # dead already: supervise will see
            self._assignment(slot, self._started).send(process.stdin)
        self._started += 1
        return process

    def _log(self, slot: Slot) -> Path:
        return self._folder.workers / f"{platform.node()}-{slot.index}.log"

    @property
    def open(self) -> list[str]:
        """Names of the slots that work."""
        return [name for slot in self._slots if (name := self.name(slot)) not in self._closed]

    def close(self, name: str, reason: str) -> None:
        """Stop a slot for good."""
        self._closed[name] = reason
        for slot in self._slots:
            if self.name(slot) == name and (process := self._processes.pop(slot.index, None)) is not None:
                _end(process)

    def kill_process(self, pid: int) -> bool:
        """SIGKILL a worker of this pool, children included. Returns whether it was one."""
        for process in self._processes.values():
            if process.pid == pid and process.poll() is None:
                _kill(process)
                return True
        return False

    def name(self, slot: Slot) -> str:
        """host-index.command: another command on this machine may have a slot of this index, and another device."""
        return f"{platform.node()}-{slot.index}.{self._command}"

    def stop(self) -> None:
        """Close every worker's stdin, give its unit time to end, then use force."""
        for process in self._processes.values():
            _hang_up(process)
        end = time.monotonic() + STOP_SECONDS
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """SIGKILL what still runs, children included."""
        for process in self._processes.values():
            _kill(process)
            _last_word(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop one process in good order, or by force."""
    _hang_up(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    _kill(process)
    _last_word(process)


def _hang_up(process: subprocess.Popen[bytes]) -> None:
    """Close a worker's stdin: told to stop, or no longer there."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _last_word(process: subprocess.Popen[bytes]) -> End | None:
    """What a worker that has ended said last. It closes the pipe: a second call returns None."""
    assert process.stdout is not None
    if process.stdout.closed:
        return None
    with process.stdout as pipe:
        os.set_blocking(pipe.fileno(), False)  # a process that the worker left behind may hold the other end
        return End.receive(pipe.read() or b"")


def _how(end: End | None, code: int) -> str:
    """How a worker ended, in words."""
    if end is not None:
        return f"failed: {end.text}"
    if code < 0:
        return f"was killed by signal {-code}"
    words = {EXIT_FENCED: "lost touch with the storage", EXIT_HUNG: "hung and gave its trial away"}
    return words.get(code, f"ended with exit code {code}")
