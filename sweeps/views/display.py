"""What a study shows while it runs, and `--status` from anywhere. Reads files and storage, holds no state of its own.

`snapshot` computes, `live_view` and `status_line` draw. On a terminal the coordinator redraws one view; into a pipe or
a log it prints one line per event and a status line a minute.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.trial import TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lda.data.catalogue import title
from sweeps.list.jobs import best_entries, entry_job
from sweeps.list.ledger import Budget, Entry, device_seconds, fault
from sweeps.plan.spec import StudySpec
from sweeps.study_folder import StudyFolder

_STATUS_EVERY = 60.0
_PIPED_WIDTH = 140  # no terminal says how wide it is: names in the table stay whole
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
    workers: tuple[WorkerRow, ...]
    failures: tuple[str, ...]
    events: tuple[str, ...]


def snapshot(
    study: str, spec: StudySpec, folder: StudyFolder, budget: Budget, search: list[Entry], confirm: list[Entry]
) -> Snapshot:
    """The study as its storage (`search`, `confirm`) and its folder tell it."""
    states = Counter(entry.last.state for entry in search)
    given_up = [entry for entry in search + confirm if entry.given_up(budget.retries)]
    rows = _workers(spec, folder, search + confirm)
    best = best_entries(spec, search, 1)
    defaults = [entry for entry in search if entry.params == spec.defaults]
    starts = [a.datetime_start for e in search for a in e.attempts if a.datetime_start is not None]
    return Snapshot(
        study=study,
        title=spec.title,
        complete=states[TrialState.COMPLETE],
        pruned=states[TrialState.PRUNED],
        failed=sum(entry.given_up(budget.retries) for entry in search),
        running=states[TrialState.RUNNING],
        budget=budget.trials,
        retried=sum(len(entry.attempts) > 1 for entry in search + confirm),
        confirmed=sum(entry.ended(budget.retries) for entry in confirm),
        to_confirm=len(confirm) or _confirmations(spec),
        elapsed=(datetime.now() - min(starts)).total_seconds() if starts else 0.0,
        remaining=_remaining(spec, budget, search, confirm, len([row for row in rows if row.state == "running"])),
        device_seconds=device_seconds(search + confirm),
        best=(entry_job(spec, best[0]).trial, best[0].last.value or 0.0, entry_job(spec, best[0]).settings)
        if best
        else None,
        default=defaults[0].last.value if defaults else None,
        workers=rows,
        failures=tuple(f"{entry_job(spec, entry).title}: {fault(entry.last)[1]}" for entry in given_up),
        events=tuple(_last_events(folder)),
    )


def _confirmations(spec: StudySpec) -> int:
    """Confirmation runs to expect; how many are known for sure only when the search is over."""
    return (spec.confirm.top + 1 + (spec.base.get("method") != "baseline")) * spec.confirm.seeds


def _remaining(
    spec: StudySpec, budget: Budget, search: list[Entry], confirm: list[Entry], workers: int
) -> float | None:
    """Mean seconds of a unit x units to go / workers; no longer than the wall clock allows."""
    seconds: list[float] = [unit["seconds"] for entry in search + confirm for unit in entry.units.values()]
    if not seconds:
        return None
    per_entry = len(spec.targets)
    open_entries = [entry for entry in search + confirm if not entry.ended(budget.retries)]
    unseen = max(0, budget.trials - len(search)) + (0 if confirm else _confirmations(spec))
    to_go = sum(per_entry - len(entry.units) for entry in open_entries) + per_entry * unseen
    expected = statistics.fmean(seconds) * to_go / max(1, workers)
    return expected if budget.until is None else min(expected, max(0.0, budget.until - time.time()))


def _workers(spec: StudySpec, folder: StudyFolder, known: list[Entry]) -> tuple[WorkerRow, ...]:
    """Workers with a status file here, then those that the storage alone knows of."""
    here = {status["worker"]: status for status in folder.statuses()}
    rows = [_row(status) for status in here.values()]
    for entry in known:
        worker = entry.last.user_attrs.get("worker", "?")
        if entry.last.state == TrialState.RUNNING and worker not in here:
            job, done = entry_job(spec, entry), len(entry.units)
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


class EventLines:
    """The lines of events.jsonl from now on, each as one plain line."""

    def __init__(self, folder: StudyFolder) -> None:
        self._path = folder.path / "events.jsonl"
        self._seen = self._path.stat().st_size if self._path.exists() else 0

    def new(self) -> list[str]:
        """What happened since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._seen)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self._seen += len(complete)
        return [_line(row) for row in complete.splitlines()]


def _line(row: bytes) -> str:
    event = json.loads(row)
    return f"{datetime.fromisoformat(event['time']):%H:%M:%S}  {event['text']}"


def _last_events(folder: StudyFolder) -> list[str]:
    path = folder.path / "events.jsonl"
    rows = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return [_line(row) for row in rows[-_LAST_EVENTS:]]


# --- drawing ---------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h, 5.1 days."""
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 129600 else f"{seconds / 86400:.1f} days"


def status_line(now: Snapshot) -> str:
    """The study's progress in one line."""
    ended = now.complete + now.pruned + now.failed
    parts = [f"{ended} of {now.budget} trials ({now.pruned} pruned, {now.failed} failed, {now.retried} retried)"]
    if now.running:
        parts.append(f"{now.running} running")
    if now.to_confirm:
        parts.append(f"confirmed {now.confirmed} of {now.to_confirm}")
    parts.append(f"{duration(now.elapsed)} so far")
    if now.remaining:
        parts.append(f"about {duration(now.remaining)} to go")
    parts.append(f"{now.device_seconds / 3600:.2f} device-hours")
    return ", ".join(parts)


def standing(now: Snapshot) -> str:
    """The best trial against the defaults."""
    if now.default is None:
        return "no score of the defaults yet"
    if now.best is None:
        return f"defaults {now.default:.1%}, nothing else complete yet"
    trial, score, settings = now.best
    return f"best {score:.1%} ({trial}: {settings}), defaults {now.default:.1%} ({score - now.default:+.1%})"


def live_view(now: Snapshot, grace_seconds: float) -> Group:
    """The whole view for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("worker", "device", "trial", "target", "seed", "epoch", "score", "images/s", "heartbeat"):
        table.add_column(
            column, justify="right" if column in ("seed", "epoch", "score", "images/s", "heartbeat") else "left"
        )
    for row in now.workers:
        table.add_row(*_cells(row, grace_seconds))
    events = [Text(line, style="red" if " failed" in line or "died" in line else "dim") for line in now.events]
    failures = [Text(f"given up: {line}", style="red") for line in now.failures]
    heading = Text.assemble((now.study, "bold"), f"  {now.title}")
    return Group(heading, Text(status_line(now)), Text(standing(now)), table, *failures, *events)


def _cells(row: WorkerRow, grace_seconds: float) -> list[str | Text]:
    if row.age is None:
        age = Text("elsewhere", style="dim")
    else:
        age = Text(f"{row.age:.0f} s", style="bold red" if row.age > grace_seconds else "green")
    running = row.state == "running"
    return [
        row.worker,
        row.device,
        row.trial if running else Text(row.state, style="dim"),
        title(row.target) if running else "",
        "" if row.seed is None else str(row.seed),
        row.epoch,
        "" if row.score is None else f"{row.score:.1%}",
        "" if row.images_per_second is None else f"{row.images_per_second:.0f}",
        age,
    ]


class Display:
    """Shows a study on stdout: redrawn on a terminal, event lines elsewhere. Use as a context manager."""

    def __init__(self, folder: StudyFolder, grace_seconds: float, look: Callable[[], Snapshot]) -> None:
        self._look, self._grace_seconds = look, grace_seconds
        self._events = EventLines(folder)
        self._status_due = time.monotonic() + _STATUS_EVERY
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()

    def refresh(self) -> None:
        """Show what is new. Called a few times a second."""
        if self._live is not None:
            self._live.update(live_view(self._look(), self._grace_seconds), refresh=True)
            return
        for line in self._events.new():
            print(line, flush=True)
        if time.monotonic() > self._status_due:
            self._status_due = time.monotonic() + _STATUS_EVERY
            print(status_line(self._look()), flush=True)


def print_status(now: Snapshot, grace_seconds: float) -> None:
    """`--status`: the view once, in colours on a terminal."""
    terminal = sys.stdout.isatty()
    Console(soft_wrap=not terminal, width=None if terminal else _PIPED_WIDTH).print(live_view(now, grace_seconds))
