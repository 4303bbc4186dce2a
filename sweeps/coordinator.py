"""Keeps one worker process per slot alive, and puts back on the list what got lost, until nothing is left to do.

Imports no torch, so that the command answers at once. The coordinator holds nothing that is not in the study's storage
or folder: it may be killed at any moment, and several may work on one study.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import TrialState

from lda.code import this_code
from lda.files import make_folder
from lda.runs import environment
from sweeps.crew.assignment import Assignment
from sweeps.crew.processes import WorkerPool
from sweeps.crew.slots import Slot
from sweeps.gather import Gathered, gather, is_lost, missing, restore
from sweeps.importance import write_importance
from sweeps.list.archive import open_archive
from sweeps.list.attempts import Configuration, Kind, fault
from sweeps.list.jobs import configuration_job
from sweeps.list.ledger import Ledger
from sweeps.list.machines import is_sick
from sweeps.list.storage import OUTAGE, close_storage, masked, open_storage, patiently, reached, reason
from sweeps.list.study import TOKEN, open_confirmation, open_search, search_budget, shortfall, token_of
from sweeps.ownership import check_folder, check_storage
from sweeps.plan.images import Data
from sweeps.plan.spec import StudySpec, flat, to_dict
from sweeps.study_folder import StudyFolder
from sweeps.views.display import Display
from sweeps.views.snapshot import Snapshot, snapshot
from sweeps.views.trial_files import Mirror

_POLL_SECONDS = 0.25
_UPKEEP_SECONDS = 1.0
_AWAY: tuple[type[Exception], ...] = (*OUTAGE, OSError)  # a storage, or a disk
_GATHERING_SECONDS = 600.0  # an outage at the very end is waited for


@dataclass(frozen=True)
class Plan:
    """Everything a coordinator has to know.

    Attributes:
        study: name, of the study's folder and of its Optuna study.
        folder: runs/<study>.
        storage: URL, password and all.
        command: as typed, its storage URL masked; also how to go on after an interruption.
        mixed_code: go on also where the study was begun with other code.
    """

    study: str
    spec: StudySpec
    folder: StudyFolder
    data: Data
    storage: str
    slots: tuple[Slot, ...]
    command: str
    mixed_code: bool = False


class Coordinator:
    """Runs one study to its end, or until told to stop.

    Raises UsageError when the study was begun with other settings or images, or by another version.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.spec, self.folder = plan, plan.spec, plan.folder
        before = check_folder(plan.study, self.spec, self.folder, plan.storage)
        make_folder(self.folder.path)  # the default storage lies in it
        hours = self.spec.search.hours
        self.budget = search_budget(self.spec, None if hours is None else time.time() + 3600 * hours)
        self.storage: BaseStorage = open_storage(plan.storage, self.spec.heartbeat_seconds, self.spec.grace_seconds)
        try:
            with reached(plan.storage):
                created = self._begin(before)
        except BaseException:
            self.close()
            raise
        # A study begun by this command is repeatable; whoever comes later must not repeat proposals.
        self._salt = "" if created else uuid.uuid4().hex
        self.confirm: Ledger | None = None
        self.mirror = Mirror(self.folder, self.spec)
        self.workers = WorkerPool(plan.slots, self.folder, self._assignment)
        self.stop = threading.Event()
        self._outage = self._limit_told = False
        self._looked_over: set[str] = set()
        self._known: tuple[list[Configuration], list[Configuration]] = ([], [])

    def _begin(self, before: dict[str, Any] | None) -> bool:
        """Create the study, or check that the one in the storage is ours; then say so in the folder, whose study.json
        was `before`. Returns whether it was created."""
        plan = self.plan
        self.search, created = open_search(
            self.storage, plan.study, self.spec, self.budget, plan.data, self.folder.path, plan.mixed_code
        )
        check_storage(self.search.study, created, before, self.folder.path, plan.storage)
        token = token_of(self.search.study)
        self.archive = open_archive(self.storage, token)
        make_folder(self.folder.workers)
        self.folder.write_study(_content(plan, token))
        return created

    def run(self) -> bool:
        """Work until nothing is left to do. Returns False when interrupted.

        Raises UsageError when a worker finds the data or the settings unusable, StudyError when workers cannot start.
        """
        finished = False
        with self._signals(), Display(self.folder, self.spec.grace_seconds, self.look) as display:
            try:
                finished = self._safely_upkeep("interrupted")  # what an earlier command left behind
                while not self.stop.is_set() and not finished:
                    self.workers.supervise(sum(len(c.attempts) for known in self._known for c in known))
                    finished = self._safely_upkeep("lost")
                    end = time.monotonic() + _UPKEEP_SECONDS
                    while time.monotonic() < end and not self.stop.is_set() and not finished:
                        display.refresh()
                        self.stop.wait(_POLL_SECONDS)
            finally:
                self.workers.stop()
                self._safely_upkeep("interrupted")
        return finished

    def explain(self) -> None:
        """Write what the finished search says of its settings."""
        if not self.spec.compare:
            write_importance(self.search.study, self.folder)

    def gather(self) -> Gathered:
        """Bring every finished unit of the study here, before anything is drawn of them."""
        known = [*self._known[0], *self._known[1]]
        with reached(self.plan.storage):
            gathered = patiently(lambda: gather(self.spec, self.folder, self.archive, known), _GATHERING_SECONDS)
        self.mirror.update(*self._known)
        return gathered

    def close(self) -> None:
        """Let go of the storage."""
        close_storage(self.storage)

    def look(self) -> Snapshot:
        """The study as of the last upkeep."""
        return snapshot(self.plan.study, self.spec, self.folder, self.budget, *self._known)

    def _assignment(self, slot: Slot, incarnation: int) -> Assignment:
        return Assignment(
            study=self.plan.study,
            spec=to_dict(self.spec),
            storage=self.plan.storage,
            folder=str(self.folder.path),
            data_root=str(self.plan.data.root),
            contents=self.plan.data.contents,
            data=self.plan.data.kind,
            slot=self.workers.name(slot),
            threads=slot.threads,
            salt=f"{self._salt} {slot.index} {incarnation}",
            until=self.budget.until,
            code="" if self.plan.mixed_code else this_code().digest,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal stops in good order, the second kills the workers."""

        def on_signal(number: int, frame: object) -> None:
            if self.stop.is_set():
                self.workers.kill()
            self.stop.set()

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: to outlive its terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- upkeep ------------------------------------------------------------------------------------------------------

    def _safely_upkeep(self, kind: Kind) -> bool:
        """Upkeep that outlasts a storage that is away or a disk that is full: told once, tried on."""
        try:
            finished = self._upkeep(kind)
        except _AWAY as error:
            if not self._outage:
                print(f"storage or disk does not answer, trying on: {reason(error)}", file=sys.stderr, flush=True)
            self._outage = True
            return False
        self._outage = False
        return finished

    def _upkeep(self, kind: Kind) -> bool:
        """Find what was lost, put it on the list again, bring the files up to date. True when the study is done."""
        at = time.time()
        self._recover(kind)
        known = self.search.configurations()
        searched = self.budget.exhausted(known, at)
        if searched:
            self._tell_limit(known, at)
            to_confirm = any(_complete(c) for c in known) or not self.budget.trials
            if self.confirm is None and self.spec.confirm.seeds and to_confirm:
                self.confirm = open_confirmation(self.storage, self.plan.study, self.spec, known)
        confirming = [] if self.confirm is None else self.confirm.configurations()
        self._known = (known, confirming)
        self.mirror.update(known, confirming)
        return searched and (self.confirm is None or self.confirm.budget.exhausted(confirming, at))

    def _recover(self, kind: Kind) -> None:
        """End the attempts of workers that are gone, and enqueue another of whatever may be tried again."""
        ledgers = [self.search] if self.confirm is None else [self.search, self.confirm]
        for worker in self.folder.dead_workers():
            for ledger in ledgers:
                for number in ledger.release_worker(worker, kind, f"its worker {worker} died"):
                    self.folder.event("worker", f"attempt {number} of {worker} ended with its worker")
            self.folder.forget_worker(worker)
        for ledger in ledgers:
            ledger.reap(self.spec.grace_seconds)
            self._excuse_sick_workers(ledger)
            for again in ledger.requeue():
                self.folder.event("retry", f"{configuration_job(self.spec, again).trial} will be tried again")
            ledger.withdraw_twins()
            self._run_lost_again(ledger)
        self._kill_overtaken(ledgers)

    def _excuse_sick_workers(self, ledger: Ledger) -> None:
        """A worker that failed several configurations and finished none stops: its failures are its machine's. So are
        those of all workers here, where each has failed and none has finished anything."""
        slots = self.workers.open
        failed = dict(zip(slots, ledger.failures_of(*slots), strict=True))
        every = [attempt for attempts in failed.values() for attempt in attempts]
        all_sick = all(failed.values()) and is_sick(every)
        for name, attempts in failed.items():
            if attempts and (all_sick or is_sick(attempts)):
                why = fault(attempts[-1])[1]
                ledger.excuse(name, attempts)
                self.workers.close(name, why)
                failures = f"{len(attempts)} attempts in a row, which count as its machine's"
                self.folder.event("worker", f"worker {name} stops: finished nothing, failed {failures}: {why}")

    def _run_lost_again(self, ledger: Ledger) -> None:
        """Once a command: units that were finished here, whose files are gone and of which the storage has no copy."""
        if ledger.study.study_name in self._looked_over:
            return
        self._looked_over.add(ledger.study.study_name)
        for configuration in ledger.configurations():
            if configuration.last.state not in (TrialState.COMPLETE, TrialState.PRUNED):
                continue  # whoever goes on with it will see
            absent = restore(self.folder, self.archive, missing(self.spec, self.folder, [configuration]))
            if lost := [unit for unit in absent if is_lost(unit, self.folder, self.archive is None)]:
                ledger.again(configuration, without=[unit.target for unit in lost])
                places = ", ".join(unit.place for unit in lost)
                self.folder.event("retry", f"{places}: finished, but the files are gone: will be run again")

    def _kill_overtaken(self, ledgers: list[Ledger]) -> None:
        """A worker of this machine that is frozen, and whose attempt others have taken over, only holds its device."""
        running = {a.number for ledger in ledgers for a in ledger.trials() if a.state == TrialState.RUNNING}
        for status in self.folder.statuses():
            silent = time.time() - status["alive"] > self.spec.grace_seconds
            overtaken = silent and "attempt" in status and status["attempt"] not in running
            if overtaken and self.workers.kill_process(status.get("pid", 0)):
                self.folder.event("worker", f"{status['worker']} was frozen and its trial taken over: killed")

    def _tell_limit(self, known: list[Configuration], at: float) -> None:
        """Say once that a limit ended the search, where it did."""
        words = shortfall(self.budget, known, at)
        if words and not self._limit_told:
            self.folder.event("limit", words)
            self._limit_told = True


def _complete(configuration: Configuration) -> bool:
    return configuration.last.state == TrialState.COMPLETE


def _content(plan: Plan, token: str) -> dict[str, object]:
    """study.json: the resolved study, what follows from it, and what it ran on; each once."""
    spec, machine = plan.spec, environment("")
    return {
        "study": plan.study,
        TOKEN: token,
        **flat(spec),
        "selection": spec.selection,
        "defaults": spec.defaults,
        "confirm_seeds": list(spec.confirm_seeds),
        "data": plan.data.kind,
        "data_root": str(plan.data.root),
        "contents": plan.data.contents,
        "command": plan.command,
        "storage": masked(plan.storage),
        "code": machine["code"],
        "commit": machine["commit"],
        "dirty": machine["dirty"],
        "versions": {"python": machine["python"], **machine["versions"]},
    }
