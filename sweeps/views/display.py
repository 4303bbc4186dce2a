"""What a study shows while it runs, and `--status` from anywhere: a snapshot, drawn.

On a terminal the coordinator redraws one view; into a pipe or a log it prints one line per event and a status line a
minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lda.data.catalogue import title
from sweeps.study_folder import Event, EventKind, StudyFolder
from sweeps.views.snapshot import Snapshot, WorkerRow

_STATUS_EVERY = 60.0
_PIPED_WIDTH = 140  # no terminal says how wide it is: names in the table stay whole
_STYLES: dict[EventKind, str] = {"failed": "red", "worker": "red", "limit": "yellow", "waiting": "yellow"}
"""How an event is coloured; those not named are dim."""


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h, 5.1 days."""
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 129600 else f"{seconds / 86400:.1f} days"


def status_line(now: Snapshot) -> str:
    """The study's progress in one line."""
    ended = now.complete + now.pruned + now.failed
    parts = []
    if now.budget:
        parts.append(
            f"{ended} of {now.budget} trials ({now.pruned} pruned, {now.failed} failed, {now.retried} retried)"
        )
    if now.running:
        parts.append(f"{now.running} running")
    if now.to_confirm:
        word = "confirmed" if now.budget else "runs"
        parts.append(f"{word} {now.confirmed} of {now.to_confirm}")
    parts.append(f"{duration(now.elapsed)} so far")
    if now.remaining:
        parts.append(f"about {duration(now.remaining)} to go")
    parts.append(f"{now.device_seconds / 3600:.2f} device-hours")
    return ", ".join(parts)


def standing(now: Snapshot) -> str:
    """The best trial against the defaults."""
    if now.compared:
        return f"comparing {', '.join(now.compared)}"
    if now.default is None:
        return "no score of the defaults yet"
    if now.best is None:
        return f"defaults {now.default:.1%}, nothing else complete yet"
    trial, score, settings = now.best
    return f"best {score:.1%} ({trial}: {settings}), defaults {now.default:.1%} ({score - now.default:+.1%})"


def event_line(event: Event) -> str:
    """What happened, in one line with its time of day."""
    return f"{event.time:%H:%M:%S}  {event.text}"


def live_view(now: Snapshot, grace_seconds: float) -> Group:
    """The whole view for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("worker", "device", "trial", "target", "seed", "epoch", "score", "images/s", "heartbeat"):
        table.add_column(
            column, justify="right" if column in ("seed", "epoch", "score", "images/s", "heartbeat") else "left"
        )
    for row in now.workers:
        table.add_row(*_cells(row, grace_seconds))
    events = [Text(event_line(event), style=_STYLES.get(event.kind, "dim")) for event in now.events]
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
        self._folder = folder
        self._seen = folder.events()[1]
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
        events, self._seen = self._folder.events(self._seen)
        for event in events:
            print(event_line(event), flush=True)
        if time.monotonic() > self._status_due:
            self._status_due = time.monotonic() + _STATUS_EVERY
            print(status_line(self._look()), flush=True)


def print_status(now: Snapshot, grace_seconds: float) -> None:
    """`--status`: the view once, in colours on a terminal."""
    terminal = sys.stdout.isatty()
    Console(soft_wrap=not terminal, width=None if terminal else _PIPED_WIDTH).print(live_view(now, grace_seconds))
