"""A study at one moment, computed from its storage and its folder. Holds no state; display.py draws it."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.trial import TrialState

from sweeps.list.attempts import Configuration, fault
from sweeps.list.jobs import configuration_job, is_default
from sweeps.list.ledger import Budget, device_seconds
from sweeps.list.study import best_configurations
from sweeps.plan.spec import StudySpec
from sweeps.study_folder import Event, StudyFolder

_LAST_EVENTS = 5


@dataclass(frozen=True)
class WorkerRow:
    """One worker: what it does, and how many seconds ago it gave a sign of life (None: it runs on another disk)."""

    worker: str
    device: str
    state: str
    trial: str
    target: str
    seed: int | None
    epoch: str
    score: float | None
    images_per_second: float | None
    age: float | None


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment.

    Attributes:
        complete, pruned, failed, running: configurations of the search, of `budget`.
        retried: configurations with more than one attempt.
        confirmed: confirmation runs that ended, of `to_confirm`.
        elapsed: seconds since the first attempt began.
        remaining: expected seconds to the end, None before any unit has finished.
        device_seconds: training time so far.
        best: (trial, score, parameters) of the best complete trial beside the defaults.
        default: score of the defaults.
        compared: methods of a study that compares them.
    """

    study: str
    title: str
    complete: int
    pruned: int
    failed: int
    running: int
    budget: int
    retried: int
    confirmed: int
    to_confirm: int
    elapsed: float
    remaining: float | None
    device_seconds: float
    best: tuple[str, float, str] | None
    default: float | None
    compared: tuple[str, ...]
    workers: tuple[WorkerRow, ...]
    failures: tuple[str, ...]
    events: tuple[Event, ...]


def snapshot(
    study: str,
    spec: StudySpec,
    folder: StudyFolder,
    budget: Budget,
    search: list[Configuration],
    confirm: list[Configuration],
) -> Snapshot:
    """The study as its storage (`search`, `confirm`) and its folder tell it. `budget` is the search's."""
    states = Counter(c.last.state for c in search)
    given_up = [c for c in search + confirm if c.given_up(budget.retries)]
    rows = _workers(spec, folder, search + confirm)
    defaults = [] if spec.compare else [c for c in search if is_default(spec, c.params)]
    every = [*search, *(confirm if spec.compare else [])]
    starts = [attempt.datetime_start for c in every for attempt in c.attempts if attempt.datetime_start is not None]
    return Snapshot(
        study=study,
        title=spec.title,
        complete=states[TrialState.COMPLETE],
        pruned=states[TrialState.PRUNED],
        failed=sum(c.given_up(budget.retries) for c in search),
        running=states[TrialState.RUNNING],
        budget=_planned(budget, search),
        retried=sum(len(c.attempts) > 1 for c in search + confirm),
        confirmed=sum(c.ended(budget.retries) for c in confirm),
        to_confirm=len(confirm) or spec.num_confirmations(_planned(budget, search)),
        elapsed=(datetime.now() - min(starts)).total_seconds() if starts else 0.0,
        remaining=_remaining(spec, budget, search, confirm, sum(row.state == "running" for row in rows)),
        device_seconds=device_seconds(search + confirm),
        best=_best(spec, search),
        default=defaults[0].last.value if defaults else None,
        compared=spec.entrants,
        workers=rows,
        failures=tuple(f"{configuration_job(spec, c).title}: {fault(c.last)[1]}" for c in given_up),
        events=tuple(folder.events()[0][-_LAST_EVENTS:]),
    )


def _planned(budget: Budget, search: list[Configuration]) -> int:
    """Configurations the search will have tried; those begun under a larger budget count as well."""
    begun = sum(c.begun for c in search)
    return begun if budget.trials is None else max(budget.trials, begun)


def _best(spec: StudySpec, search: list[Configuration]) -> tuple[str, float, str] | None:
    if spec.compare:
        return None  # scores of different methods are no contest that a search should win
    for best in best_configurations(spec, search, 1):
        job = configuration_job(spec, best)
        return job.trial, best.last.value or 0.0, job.settings
    return None


def _remaining(
    spec: StudySpec, budget: Budget, search: list[Configuration], confirm: list[Configuration], workers: int
) -> float | None:
    """Mean seconds of a unit x units to go / workers; nothing is begun after the search's limits."""
    seconds: list[float] = [unit["seconds"] for c in search + confirm for unit in c.units.values()]
    if not seconds:
        return None
    each, now = statistics.fmean(seconds) / max(1, workers), time.time()
    begun = [c for c in search if c.begun]
    to_go = sum(len(spec.targets) - len(c.units) for c in [*begun, *confirm] if not c.ended(budget.retries))
    planned = _planned(budget, search)
    to_go += 0 if confirm else len(spec.targets) * spec.num_confirmations(planned)
    if budget.limit(search, now):
        return each * to_go
    unseen = each * len(spec.targets) * (planned - len(begun))
    return each * to_go + (unseen if budget.until is None else min(unseen, budget.until - now))


def _workers(spec: StudySpec, folder: StudyFolder, known: list[Configuration]) -> tuple[WorkerRow, ...]:
    """Workers with a status file here, then those that the storage alone knows of."""
    here = {status["worker"]: status for status in folder.statuses()}
    rows = [_row(status) for status in here.values()]
    for configuration in known:
        worker = configuration.last.user_attrs.get("worker", "?")
        if configuration.last.state == TrialState.RUNNING and worker not in here:
            job, done = configuration_job(spec, configuration), len(configuration.units)
            target = spec.targets[min(done, len(spec.targets) - 1)]
            rows.append(WorkerRow(worker, "", "running", job.trial, target, job.seed, "", None, None, None))
    return tuple(rows)


def _row(status: dict[str, Any]) -> WorkerRow:
    return WorkerRow(
        worker=status["worker"],
        device=status["device"],
        state=status["state"],
        trial=status.get("trial", ""),
        target=status.get("target", ""),
        seed=status.get("seed"),
        epoch=f"{status['epoch']}/{status['epochs']}" if "epoch" in status else "",
        score=status.get("score"),
        images_per_second=status.get("images_per_second"),
        age=max(0.0, time.time() - status["alive"]),
    )
