"""One long-lived process per device: take an attempt, run its units, tell the score, again.

Started by the coordinator as `python -m sweeps.crew.worker`. Its stdin carries one line of JSON (`Assignment`) and then
stays open: when it closes, because the coordinator says stop or is gone, the worker ends its unit and exits. What a
worker finishes, fails or leaves behind is in the study's storage and folders; it keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState

from lda.errors import UsageError
from lda.trainer import TrainingError
from sweeps.crew.assignment import EXIT_USAGE, STOP_SECONDS, Assignment
from sweeps.crew.attempt import Attempt
from sweeps.crew.heartbeat import Heartbeat, log
from sweeps.list.jobs import Job, confirm_study, job_of
from sweeps.list.ledger import Budget, Entry, Kind, Ledger
from sweeps.list.storage import StorageError, open_storage, patiently
from sweeps.plan.pruning import PrunedError, build_pruner
from sweeps.plan.space import distributions
from sweeps.plan.spec import StudySpec, from_dict
from sweeps.study_folder import StudyFolder, WorkerSign

_IDLE_SECONDS = 0.5
_OUTAGE_SECONDS = 3.0  # between attempts to reach a storage or disk that is away


class Stopped(BaseException):
    """The coordinator said stop, or is gone. No Exception: nothing below may take it for a failure of the unit."""


def build_sampler(spec: StudySpec, study: str, salt: str) -> BaseSampler:
    """The study's sampler with a seed of this worker's own: equal seeds would open with equal proposals."""
    seed = int.from_bytes(hashlib.sha256(f"{study} {spec.seed} {salt}".encode()).digest()[:4], "big")
    if spec.search.sampler == "tpe":
        return TPESampler(seed=seed)
    if spec.search.sampler == "gp":
        return GPSampler(seed=seed)
    return RandomSampler(seed=seed)  # also for grid, whose points are all enqueued


class Worker:
    """Runs attempts until it is stopped."""

    def __init__(self, assignment: Assignment, stop: threading.Event) -> None:
        self.assignment, self.stop = assignment, stop
        self.spec = from_dict(assignment.spec)
        self.folder = StudyFolder(Path(assignment.folder))
        self.id = f"{platform.node()}-{assignment.slot}-{uuid.uuid4().hex[:6]}"
        self.sign = WorkerSign(self.folder, self.id)
        search = self.spec.search
        self.storage = self._connect()
        self.budget = Budget(search.trials, search.retries, search.device_hours, assignment.until)
        if search.sampler == "grid":
            self.budget = Budget(0, search.retries)
        self.search = self._open(assignment.study, self.budget)
        self.search.study.pruner = build_pruner(search.pruning, self.spec.config(self.spec.targets[0], 0, {}).epochs)
        self.confirm: Ledger | None = None
        self.distributions = distributions(search.space)
        self._status: dict[str, Any] = {}
        self._status_written = 0.0

    def _connect(self) -> BaseStorage:
        """The study's storage. The coordinator has reached it, so a failure is an outage: to be waited for."""
        while True:
            try:
                return open_storage(self.assignment.storage, self.spec.heartbeat_seconds, self.spec.grace_seconds)
            except StorageError as error:
                log(f"waiting for the storage: {error}")
                if self.stop.wait(_OUTAGE_SECONDS):
                    raise Stopped from None

    def _open(self, name: str, budget: Budget) -> Ledger:
        sampler = build_sampler(self.spec, self.assignment.study, self.assignment.salt)
        return Ledger(self.storage, optuna.load_study(study_name=name, storage=self.storage, sampler=sampler), budget)

    def run(self) -> None:
        """Take attempts until stopped. Raises UsageError when the data or the study cannot be used."""
        while not self.stop.is_set():
            taken = self._take()
            if taken is None:
                self._say(state="waiting for work")
                self.stop.wait(_IDLE_SECONDS)
                continue
            self._attempt(*taken)

    def _take(self) -> tuple[Ledger, Trial] | None:
        trial = self._patiently(lambda: self.search.ask(self.distributions, self.id))
        if trial is not None:
            return self.search, trial
        if self.confirm is None and self.spec.confirm.seeds:
            try:
                self.confirm = self._open(confirm_study(self.assignment.study), Budget(0, self.spec.search.retries))
            except KeyError:
                return None  # the search is not over
        if self.confirm is None:
            return None
        confirm = self.confirm
        trial = self._patiently(lambda: confirm.ask({}, self.id))
        return None if trial is None else (confirm, trial)

    def _patiently(self, action: Callable[[], Any]) -> Any:
        return patiently(action, self.spec.grace_seconds)

    def _attempt(self, ledger: Ledger, trial: Trial) -> None:
        job = job_of(self.spec, trial)
        record = ledger.heartbeat(trial.number)

        def beat() -> None:
            if record is not None:
                record()
            self.sign.touch()

        limit = self.spec.grace_seconds - self.spec.heartbeat_seconds
        heart = Heartbeat(beat, self.spec.heartbeat_seconds, limit)
        with heart:
            self._event(f"{job.title} started ({job.settings})")
            self._guarded(ledger, trial, job, heart)

    def _guarded(self, ledger: Ledger, trial: Trial, job: Job, heart: Heartbeat) -> None:
        """Run the attempt; whatever happens, the storage learns how it ended."""
        try:
            score = self._attempt_of(trial, job, heart).score()
            heart.check()
            self._patiently(lambda: ledger.study.tell(trial, score, skip_if_finished=True))
            self._event(f"{job.title} complete: score {score:.1%}")
        except PrunedError as pruned:
            self._patiently(lambda: ledger.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True))
            self._event(f"{job.title} pruned: {pruned}")
        except Stopped:
            self._fail(ledger, trial, job, "interrupted", "stopped by the user")
        except TrainingError as error:
            self._fail(ledger, trial, job, "final", str(error))
        except UsageError as error:
            self._fail(ledger, trial, job, "interrupted", str(error))
            raise
        except Exception as error:
            # Anything else, a bug included: counted, told, tried again in a fresh process (a GPU may be in any state).
            traceback.print_exc()
            self._fail(ledger, trial, job, "error", f"{type(error).__name__}: {error}".strip().splitlines()[0])
            raise SystemExit(1) from None

    def _attempt_of(self, trial: Trial, job: Job, heart: Heartbeat) -> Attempt:
        def check() -> None:
            heart.check()
            if self.stop.is_set():
                raise Stopped

        return Attempt(
            assignment=self.assignment,
            spec=self.spec,
            folder=self.folder,
            trial=trial,
            job=job,
            check=check,
            say=self._say,
            event=self._event,
            patiently=self._patiently,
            default_scores=self._default_scores,
        )

    def _default_scores(self) -> dict[str, float]:
        """Target -> score of the defaults in the search, as far as they have been run."""
        entries: list[Entry] = self._patiently(self.search.entries)
        defaults = [entry.units for entry in entries if entry.params == self.spec.defaults]
        return {target: unit["score"] for units in defaults for target, unit in units.items()}

    def _fail(self, ledger: Ledger, trial: Trial, job: Job, kind: Kind, reason: str) -> None:
        self._event(f"{job.title} {'interrupted' if kind == 'interrupted' else 'failed'}: {reason}")
        self._patiently(lambda: ledger.release(trial.number, kind, reason))

    def _event(self, text: str) -> None:
        log(text)
        with contextlib.suppress(
            OSError
        ):  # a full disk; events and status are for people, a trial is not lost for them
            self.folder.event(text, self.id)

    def _say(self, **status: Any) -> None:
        """Tell the display; at most once a second, and at once when the state changes."""
        changed = "state" in status and status != {k: self._status.get(k) for k in status}
        self._status = status if changed else {**self._status, **status}
        if changed or time.monotonic() - self._status_written > 1.0:
            self._status_written = time.monotonic()
            device = os.environ.get("CUDA_VISIBLE_DEVICES") or "cpu"
            with contextlib.suppress(OSError):
                self.sign.write({"worker": self.id, "device": device, **self._status})


def _watch_stdin(stop: threading.Event) -> None:
    """When stdin ends, ask the unit to stop, and make sure of it."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.buffer: its lock, held at exit, aborts the interpreter
        pass
    stop.set()
    time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Entry point of the process. Exits with 0 stopped, 1 failed, 2 data or study cannot be used, 75 fenced."""
    assignment, stop = Assignment.receive(sys.stdin.buffer), threading.Event()
    threading.Thread(target=_watch_stdin, args=(stop,), daemon=True).start()
    try:
        worker = Worker(assignment, stop)
        worker.run()
    except Stopped:
        return 0
    except UsageError as error:
        log(f"error: {error}")
        return EXIT_USAGE
    worker.sign.remove()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
