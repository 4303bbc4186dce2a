"""One long-lived process per device: take an attempt, run its units, tell the score, again.

Started by the coordinator as `python -m sweeps.crew.worker`. Its stdin carries one line of JSON (`Assignment`) and then
stays open: when it closes, because the coordinator says stop or is gone, the worker ends its unit and exits. Its stdout
carries an `End` where the worker gives up by itself. What it finishes, fails or leaves behind is in the study's storage
and folders; it keeps nothing.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import IO

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState

from lda.code import this_code
from lda.command import open_streams
from lda.errors import UsageError
from lda.trainer import TrainingError
from sweeps.crew.assignment import STOP_SECONDS, Assignment, End
from sweeps.crew.attempt import Attempt, MachineError
from sweeps.crew.heartbeat import log
from sweeps.crew.post import Post, Stopped
from sweeps.list.archive import open_archive
from sweeps.list.attempts import Kind
from sweeps.list.jobs import Job, job_of
from sweeps.list.ledger import Budget, Ledger
from sweeps.list.storage import StorageError, close_storage, open_storage
from sweeps.list.study import confirm_study, confirmation_budget, distributions_of, search_budget, token_of
from sweeps.plan.pruning import PrunedError, build_pruner
from sweeps.plan.spec import StudySpec, from_dict
from sweeps.study_folder import EventKind, StudyFolder

_IDLE_SECONDS = 0.5
_OUTAGE_SECONDS = 3.0  # between attempts to reach a storage or disk that is away


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
        if assignment.code and assignment.code != this_code().digest:
            raise UsageError(
                "the code was changed while the study ran, and its next workers would run the new one; go back to the "
                "old one, or give --allow-mixed-code"
            )
        self.assignment = assignment
        self.spec = from_dict(assignment.spec)
        worker = f"{assignment.slot}-{uuid.uuid4().hex[:6]}"
        folder = StudyFolder(Path(assignment.folder))
        self.post = Post(folder, worker, self.spec.heartbeat_seconds, self.spec.grace_seconds, stop)
        self.storage = self._connect()
        budget = search_budget(self.spec, assignment.until)
        self.search = self.post.patiently(lambda: self._open(assignment.study, budget))
        self.archive = self.post.patiently(lambda: open_archive(self.storage, token_of(self.search.study)))
        self.confirm: Ledger | None = None
        self.distributions = distributions_of(self.spec)

    def _connect(self) -> BaseStorage:
        """The study's storage. The coordinator has reached it, so a failure is an outage: to be waited for."""
        while True:
            try:
                return open_storage(self.assignment.storage, self.spec.heartbeat_seconds, self.spec.grace_seconds)
            except StorageError as error:
                log(f"waiting for the storage: {error}")
                if self.post.wait(_OUTAGE_SECONDS):
                    raise Stopped from None

    def _open(self, name: str, budget: Budget) -> Ledger:
        epochs = self.spec.config(self.spec.targets[0], 0, {}).schedule.epochs
        study = optuna.load_study(
            study_name=name,
            storage=self.storage,
            sampler=build_sampler(self.spec, self.assignment.study, self.assignment.salt),
            pruner=build_pruner(self.spec.search.pruning, epochs),
        )
        return Ledger(self.storage, study, budget)

    def run(self) -> None:
        """Take attempts until stopped. Raises UsageError when the data or the study cannot be used.

        Raises what an attempt raised, a bug included, when that was told to the storage: what comes next then needs a
        fresh process, for a GPU may be in any state.
        """
        try:
            while not self.post.stopped:
                taken = self._take()
                if taken is None:
                    self.post.say(state="waiting for work")
                    self.post.wait(_IDLE_SECONDS)
                    continue
                self._attempt(*taken)
            self.post.leave()
        finally:
            close_storage(self.storage)

    def _take(self) -> tuple[Ledger, Trial] | None:
        trial = self.post.patiently(lambda: self.search.ask(self.distributions, self.post.worker))
        if trial is not None:
            return self.search, trial
        if self.confirm is None and self.spec.confirm.seeds:
            try:
                name, budget = confirm_study(self.assignment.study), confirmation_budget(self.spec)
                self.confirm = self.post.patiently(lambda: self._open(name, budget))
            except KeyError:
                return None  # the search is not over
        if self.confirm is None:
            return None
        confirm = self.confirm
        trial = self.post.patiently(lambda: confirm.ask({}, self.post.worker))
        return None if trial is None else (confirm, trial)

    def _attempt(self, ledger: Ledger, trial: Trial) -> None:
        """Run an attempt; whatever happens, the storage learns how it ended."""
        job = job_of(self.spec, trial)
        with (
            self.post.heartbeat(ledger.heartbeat(trial.number)),
            self.post.watchdog(
                lambda how: self.post.event("waiting", f"{job.title}: {how}"),
                lambda how: self._fail(ledger, trial, job, "lost", how),
                self.spec.stall_seconds,
            ),
        ):
            self.post.event("started", f"{job.title} started ({job.settings})")
            try:
                score = Attempt(self.post, self.assignment, self.spec, self.search, self.archive, trial, job).score()
                self.post.fence()
                self.post.patiently(lambda: ledger.study.tell(trial, score, skip_if_finished=True))
                self.post.event("complete", f"{job.title} complete: score {score:.1%}")
            except PrunedError as pruned:
                end = TrialState.PRUNED
                self.post.patiently(lambda: ledger.study.tell(trial, state=end, skip_if_finished=True))
                self.post.event("pruned", f"{job.title} pruned: {pruned}")
            except Stopped:
                self._fail(ledger, trial, job, "interrupted", "stopped by the user")
            except TrainingError as error:
                self._fail(ledger, trial, job, "final", str(error))
            except MachineError as error:
                self._fail(ledger, trial, job, "interrupted", str(error))
                raise
            except UsageError as error:
                self._fail(ledger, trial, job, "interrupted", str(error))
                raise
            except Exception as error:
                self._fail(ledger, trial, job, "error", _one_line(error))
                raise

    def _fail(self, ledger: Ledger, trial: Trial, job: Job, kind: Kind, reason: str) -> None:
        how: EventKind = "interrupted" if kind == "interrupted" else "failed"
        self.post.event(how, f"{job.title} {how}: {reason}")
        self.post.patiently(lambda: ledger.release(trial.number, kind, reason))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _watch_stdin(stop: threading.Event) -> None:
    """When stdin ends, ask the unit to stop, and make sure of it."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.buffer: its lock, held at exit, aborts the interpreter
        pass
    stop.set()
    time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _private_stdout() -> IO[bytes]:
    """The pipe to the coordinator; from now on what anything prints to stdout goes to the log, as stderr does."""
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return pipe


def main() -> int:
    """Entry point of the process. Exits with 0 stopped, 1 failed, 2 data or study cannot be used, 75 fenced."""
    open_streams()
    coordinator = _private_stdout()
    assignment, stop = Assignment.receive(sys.stdin.buffer), threading.Event()
    this_code()  # as it was imported, not as it may be in an hour
    threading.Thread(target=_watch_stdin, args=(stop,), daemon=True).start()
    try:
        Worker(assignment, stop).run()
    except Stopped:
        return 0
    except UsageError as error:
        log(f"error: {error}")
        End("unusable", str(error)).send(coordinator)
        return 2
    except Exception as error:
        log(traceback.format_exc())
        End("failed", _one_line(error)).send(coordinator)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
