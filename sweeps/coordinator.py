"""Sets a study up once, keeps one worker process per slot alive, and puts back on the list what got lost.

Imports no torch, so that the command answers at once. The coordinator holds nothing that is not in the study's storage
or folder: it may be killed at any moment, and several may work on one study.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError

from lda.errors import UsageError
from lda.files import read_json, write_json
from lda.runs import FORMAT, environment
from sweeps.crew.assignment import Assignment
from sweeps.crew.processes import WorkerPool
from sweeps.crew.slots import Slot
from sweeps.list.jobs import confirm_study, enqueue_confirmation, enqueue_first_points, entry_job
from sweeps.list.ledger import Budget, Entry, Kind, Ledger, entries
from sweeps.list.storage import create_or_load, masked, open_storage
from sweeps.plan.images import Data
from sweeps.plan.spec import StudySpec, differences, from_dict, same_study, to_dict
from sweeps.study_folder import StudyFolder
from sweeps.views.display import Display, Snapshot, snapshot
from sweeps.views.trial_files import Mirror

_POLL_SECONDS = 0.25
_UPKEEP_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """Everything a coordinator has to know.

    Attributes:
        study: name, of the study's folder and of its Optuna study.
        folder: runs/<study>.
        storage: URL, password and all.
        command: as typed, its storage URL masked; also how to go on after an interruption.
    """

    study: str
    spec: StudySpec
    folder: StudyFolder
    data: Data
    storage: str
    slots: tuple[Slot, ...]
    command: str


def running_study(study: str, url: str, folder: Path) -> tuple[StudySpec, Budget, list[Entry], list[Entry]]:
    """A study that exists: its spec as its coordinator resolved it, its budget, its search and confirmation so far.

    Raises UsageError when there is none.
    """
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        raise UsageError(f"no study {study!r} in {folder} yet; start it first")
    storage = open_storage(url, 60, 180)
    try:
        loaded = optuna.load_study(study_name=study, storage=storage)
    except KeyError:
        raise UsageError(f"no study {study!r} in {masked(url)} yet; start it first") from None
    if "spec" not in loaded.user_attrs:
        raise UsageError(f"study {study!r} is still being set up, try again in a moment")
    spec = from_dict(loaded.user_attrs["spec"])
    confirm: list[Entry] = []
    with contextlib.suppress(KeyError):  # the search is not over
        confirm = entries(optuna.load_study(study_name=confirm_study(study), storage=storage).get_trials())
    return spec, study_budget(spec), entries(loaded.get_trials()), confirm


def study_budget(spec: StudySpec) -> Budget:
    """The budget of a study's search; its wall clock begins now."""
    search = spec.search
    trials = len(spec.first_points) if search.sampler == "grid" else search.trials
    until = None if search.hours is None else time.time() + 3600 * search.hours
    return Budget(trials, search.retries, search.device_hours, until)


class Coordinator:
    """Runs one study to its end, or until told to stop."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.spec, self.folder = plan, plan.spec, plan.folder
        self.folder.workers.mkdir(parents=True, exist_ok=True)
        self.storage: BaseStorage = open_storage(plan.storage, plan.spec.heartbeat_seconds, plan.spec.grace_seconds)
        self.budget = study_budget(plan.spec)
        self.search = self._set_up_search()
        self.confirm: Ledger | None = None
        self.mirror = Mirror(self.folder, self.spec)
        self.workers = WorkerPool(plan.slots, self.folder, self._assignment)
        self.stop = threading.Event()
        self._outage = False
        self._known: tuple[list[Entry], list[Entry]] = (self.search.entries(), [])

    # --- setting up --------------------------------------------------------------------------------------------------

    def _set_up_search(self) -> Ledger:
        """Create the study, or check that the one that exists is the same."""
        self._check_same(read_json(path)["spec"] if (path := self.folder.path / "study.json").exists() else None)
        study, created = create_or_load(self.storage, self.plan.study, self._prepare_search)
        attributes = study.user_attrs
        # A study begun by this command is repeatable; whoever comes later must not repeat proposals.
        self._salt = "" if created else uuid.uuid4().hex
        self._check_same(attributes["spec"])
        if attributes["data_hash"] != self.plan.data.hashes:
            raise UsageError(
                f"the images in {self.plan.data.root} are not those that study {self.plan.study!r} was begun with; "
                "restore them, or give another --output"
            )
        study.set_user_attr("spec", to_dict(self.spec))  # budgets may have changed; --join and --status read them here
        ledger = Ledger(self.storage, study, self.budget)
        enqueue_first_points(self.spec, ledger)  # the budget or the list of points may have grown
        self._write_study()
        return ledger

    def _prepare_search(self, study: optuna.Study) -> None:
        study.set_metric_names(["selection score"])
        study.set_user_attr("spec", to_dict(self.spec))
        study.set_user_attr("data_hash", self.plan.data.hashes)
        study.set_user_attr("title", self.spec.title)
        enqueue_first_points(self.spec, Ledger(self.storage, study, self.budget))

    def _check_same(self, before: dict[str, Any] | None) -> None:
        """Raises UsageError naming what differs from the study as it was begun."""
        if before is None:
            return
        found = differences(same_study(from_dict(before)), same_study(self.spec))
        if found:
            raise UsageError(
                f"study {self.plan.study!r} in {self.folder.path} was begun with other settings: {'; '.join(found)}. "
                "Give the old ones, or another --output"
            )

    def _write_study(self) -> None:
        spec, search = self.spec, self.spec.search
        plain = to_dict(spec)
        machine = environment("")
        content = {
            "format": FORMAT,
            "study": self.plan.study,
            "title": spec.title,
            "protocol": spec.protocol,
            "targets": list(spec.targets),
            "preset": spec.preset,
            "data": self.plan.data.kind,
            "data_root": str(self.plan.data.root),
            "data_hash": self.plan.data.hashes,
            "selection": spec.selection,
            "seed": spec.seed,
            "confirm_seeds": list(spec.confirm_seeds),
            "space": plain["search"]["space"],
            "defaults": spec.defaults,
            "base": plain["base"],
            "sampler": search.sampler,
            "budget": {"trials": search.trials, "hours": search.hours, "device_hours": search.device_hours},
            "command": self.plan.command,
            "storage": masked(self.plan.storage),
            "commit": machine["commit"],
            "dirty": machine["dirty"],
            "versions": {"python": machine["python"], **machine["versions"]},
            "spec": plain,
        }
        write_json(self.folder.path / "study.json", content)

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Work until nothing is left to do. Returns False when interrupted.

        Raises UsageError when a worker finds the data or the settings unusable, StudyError when workers cannot start.
        """
        self._safely_upkeep("interrupted")  # what an earlier command left behind
        finished = False
        with self._signals(), Display(self.folder, self.spec.grace_seconds, self.look) as display:
            try:
                while not self.stop.is_set() and not finished:
                    self.workers.supervise(sum(len(entry.attempts) for known in self._known for entry in known))
                    finished = self._safely_upkeep("lost")
                    end = time.monotonic() + _UPKEEP_SECONDS
                    while time.monotonic() < end and not self.stop.is_set() and not finished:
                        display.refresh()
                        self.stop.wait(_POLL_SECONDS)
            finally:
                self.workers.stop()
                self._safely_upkeep("interrupted")
        return finished

    def _assignment(self, slot: Slot, incarnation: int) -> Assignment:
        return Assignment(
            study=self.plan.study,
            spec=to_dict(self.spec),
            storage=self.plan.storage,
            folder=str(self.folder.path),
            data_root=str(self.plan.data.root),
            data_hash=self.plan.data.hashes,
            data=self.plan.data.kind,
            slot=slot.index,
            threads=slot.threads,
            salt=f"{self._salt} {slot.index} {incarnation}",
            until=self.budget.until,
        )

    def look(self) -> Snapshot:
        """The study as of the last upkeep."""
        return snapshot(self.plan.study, self.spec, self.folder, self.budget, *self._known)

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

    def _safely_upkeep(self, kind: Kind) -> bool:
        """Upkeep that outlasts a storage that is away or a disk that is full: told once, tried on."""
        try:
            finished = self._upkeep(kind)
        except (optuna.exceptions.StorageInternalError, DBAPIError, OSError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            if not self._outage:
                print(f"storage or disk does not answer, trying on: {reason}", file=sys.stderr, flush=True)
            self._outage = True
            return False
        self._outage = False
        return finished

    def _upkeep(self, kind: Kind) -> bool:
        """Find what was lost, put it on the list again, bring the files up to date. True when the study is done."""
        ledgers = [self.search] if self.confirm is None else [self.search, self.confirm]
        for worker in self.folder.dead_workers():
            for ledger in ledgers:
                for number in ledger.release_worker(worker, kind, f"its worker {worker} died"):
                    self.folder.event(f"attempt {number} of {worker} ended with its worker")
            self.folder.forget_worker(worker)
        for ledger in ledgers:
            ledger.reap(self.spec.grace_seconds)
            for entry in ledger.requeue():
                self.folder.event(f"{entry_job(self.spec, entry).trial} will be tried again")
        known = self.search.entries()
        searched = self.budget.exhausted(known)
        if (
            searched
            and self.confirm is None
            and self.spec.confirm.seeds
            and any(e.last.state == TrialState.COMPLETE for e in known)
        ):
            self.confirm = self._set_up_confirmation(known)
        confirming = [] if self.confirm is None else self.confirm.entries()
        self._known = (known, confirming)
        self.mirror.update(known, confirming)
        return searched and all(entry.ended(self.budget.retries) for entry in confirming)

    def _set_up_confirmation(self, known: list[Entry]) -> Ledger:
        budget = Budget(trials=0, retries=self.budget.retries)

        def prepare(study: optuna.Study) -> None:
            enqueue_confirmation(self.spec, known, Ledger(self.storage, study, budget))

        name = confirm_study(self.plan.study)
        ledger = Ledger(self.storage, create_or_load(self.storage, name, prepare)[0], budget)
        enqueue_confirmation(self.spec, known, ledger)  # the search or the number of seeds may have grown
        return ledger


def report(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run analysis commands on a finished study. Returns one line per command that failed: the study is safe anyway."""
    failed = []
    for command in commands:
        done = subprocess.run([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            failed.append(f"{command[0]} failed: {reason}")
    return failed
