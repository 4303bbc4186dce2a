"""The folder of a study, runs/<study>/, and what the sweep itself keeps there.

study.json                  the resolved study, its command and versions; written by the coordinator
trial-0007/trial.json       one configuration: parameters, state, score, units; of the database, see trial_files.py
trial-0007/<target>-s0/     one unit, written by lda.trainer
trial-baseline/             the plain baseline of the confirmation; trial-<method>/: where methods are compared without
                            a search, each under its own name
events.jsonl                what happened, one `Event` a line, appended by everyone
workers/<id>.json, .lock    what a worker does now; it holds the lock while it lives, so a free lock is a dead worker
workers/<host>-<slot>.log   what a worker printed
table.csv, figures/         of the finished study, see finish.py
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal

from lda.errors import UsageError, warn
from lda.files import read_json, write_json
from lda.runs import CONFIG, is_finished, made_by_this_code, training_of, unit_folders

FORMAT = 2
"""Version of study.json and of the attributes of an Optuna study; 1 had none."""

STUDY = "study.json"
EVENTS = "events.jsonl"
BASELINE = "trial-baseline"

EventKind = Literal[
    "started", "unit", "complete", "pruned", "failed", "interrupted", "waiting", "worker", "retry", "limit"
]
"""What happened: to a trial (started to interrupted), to a unit that is done or waits for room on its disk, to a worker
that ended by itself, to a trial that is tried again, or to a search that a limit of its study file ended."""


def check_format(found: object, where: str) -> None:
    """Raises UsageError for a study of another version; `where` names it."""
    if found != FORMAT:
        version = "an older version" if found is None else f"another version (format {found!r}, this one's is {FORMAT})"
        raise UsageError(f"{where} was made by {version} of this project; give another --output or study name")


def trial_name(number: int) -> str:
    """Folder of a trial: trial-0007. The number is that of the first attempt; retries share the folder."""
    return f"trial-{number:04d}"


def is_numbered(trial: str) -> bool:
    """Whether a folder is that of a trial of the search."""
    return trial.removeprefix("trial-").isdigit()


def unit_name(target: str, seed: int) -> str:
    """Folder of a unit inside its trial: market1501-s0."""
    return f"{target}-s{seed}"


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl. `worker` is the id of who tells it, empty for the coordinator."""

    time: datetime
    kind: EventKind
    text: str
    worker: str = ""

    def line(self) -> bytes:
        """As it stands in the file."""
        row = {"time": self.time.isoformat(timespec="seconds"), "worker": self.worker, "kind": self.kind}
        return json.dumps({**row, "text": self.text}).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Event | None:
        """What `line` wrote; None for a line that is damaged, as a full disk or a power cut leaves them."""
        try:
            row = json.loads(line)
            return cls(datetime.fromisoformat(row["time"]), row["kind"], str(row["text"]), str(row["worker"]))
        except (ValueError, LookupError, TypeError):
            return None


@dataclass(frozen=True)
class StudyFolder:
    """Paths, and the small files shared by the processes of a study."""

    path: Path

    @property
    def workers(self) -> Path:
        """Folder of the workers' status, locks and logs."""
        return self.path / "workers"

    @property
    def table(self) -> Path:
        """The protocol table of the finished study."""
        return self.path / "table.csv"

    @property
    def figures(self) -> Path:
        """Folder of the finished study's figures."""
        return self.path / "figures"

    def finished_unit(self, unit: str) -> Path | None:
        """A unit of this study that is finished and has this hash, wherever it was run."""
        for trial in sorted(self.path.glob("trial-*")):
            for folder in unit_folders(trial):
                if not folder.is_symlink() and is_finished(folder, unit):
                    return folder
        return None

    def trained(self, training: str) -> list[Path]:
        """Units that learnt, or learn, what this training hash names: of this study, then of its neighbours.

        A hash names settings and images, not code: only what this very code trained.
        """
        beside = self.path.parent
        found = (path for inner in ("", "without-*/") for path in beside.glob(f"*/trial-*/*/{inner}{CONFIG}"))
        units = [config.parent for config in sorted(found)]
        same = [unit for unit in units if not unit.is_symlink() and training_of(unit) == training]
        known = [unit for unit in same if made_by_this_code(unit)]
        own = [unit for unit in known if unit.is_relative_to(self.path)]
        return own + [unit for unit in known if unit not in own]

    # --- study.json --------------------------------------------------------------------------------------------------

    def read_study(self) -> dict[str, Any] | None:
        """The content of study.json; None before the study was begun, and for a file that is damaged: it will be made
        again from the storage. Raises UsageError for another version's."""
        path = self.path / STUDY
        if not path.exists():
            return None
        try:
            content = read_json(path)
        except UsageError as error:
            warn(f"{error}; it is made again from the storage")
            return None
        check_format(content.get("format"), str(path))
        return content

    def has_trials(self) -> bool:
        """Whether any trial of any study lies here."""
        return any(self.path.glob("trial-*/*/"))

    def write_study(self, content: Mapping[str, Any]) -> None:
        """Write study.json."""
        write_json(self.path / STUDY, {"format": FORMAT, **content})

    # --- events ------------------------------------------------------------------------------------------------------

    def event(self, kind: EventKind, text: str, worker: str = "") -> None:
        """Append one line to events.jsonl; a line is far below the size that appends keep whole.

        Unbuffered: a line that a full disk cuts off is not written again later. The next one begins a line of its own.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        line = Event(datetime.now().astimezone(), kind, text, worker).line()
        with (self.path / EVENTS).open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write(b"\n" * torn + line)

    def events(self, start: int = 0) -> tuple[list[Event], int]:
        """(the events from byte `start` on, the byte after them). A line that is half written is left for later, one
        that is damaged is left out: events are for people."""
        try:
            with (self.path / EVENTS).open("rb") as file:
                file.seek(start)
                text = file.read()
        except OSError:  # none yet, or a disk that does not answer
            return [], start
        complete = text[: text.rfind(b"\n") + 1]
        found = (Event.read(line) for line in complete.splitlines())
        return [event for event in found if event is not None], start + len(complete)

    # --- workers -----------------------------------------------------------------------------------------------------

    def statuses(self) -> list[dict[str, Any]]:
        """What every worker here said last, and when it was last alive (seconds since the epoch), by worker."""
        found = []
        for path in sorted(self.workers.glob("*.json")):
            with contextlib.suppress(FileNotFoundError, UsageError):  # it left meanwhile, or its disk tore the file
                said = {"worker": path.stem, "device": "", "state": "?", **read_json(path)}
                found.append({**said, "alive": path.stat().st_mtime})
        return found

    def dead_workers(self) -> Iterator[str]:
        """Ids of workers that ended without a word; `forget_worker` removes what they left."""
        for path in sorted(self.workers.glob("*.lock")):
            try:
                with path.open("r+b") as file:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield path.stem
            except (FileNotFoundError, BlockingIOError):
                continue

    def forget_worker(self, worker: str) -> None:
        """Remove a worker's status and lock."""
        for suffix in (".json", ".lock"):
            (self.workers / f"{worker}{suffix}").unlink(missing_ok=True)


class WorkerSign:
    """A worker's lock, held while the process lives (the kernel lets go of it however the process ends), and status."""

    def __init__(self, folder: StudyFolder, worker: str) -> None:
        self._folder, self._worker = folder, worker
        folder.workers.mkdir(parents=True, exist_ok=True)
        made = folder.workers / f".{worker}.lock"
        self._lock: IO[str] = made.open("w", encoding="utf-8")
        fcntl.lockf(self._lock, fcntl.LOCK_EX)  # of the process: children do not inherit it
        os.replace(made, folder.workers / f"{worker}.lock")  # appears locked: no one can take it for a dead one's

    def write(self, status: dict[str, Any]) -> None:
        """Say what the worker does now."""
        write_json(self._folder.workers / f"{self._worker}.json", status)

    def touch(self) -> None:
        """Say that the worker lives, and nothing new."""
        with contextlib.suppress(OSError):  # before the first status, or a full disk; the storage has the real sign
            os.utime(self._folder.workers / f"{self._worker}.json")

    def remove(self) -> None:
        """Leave in good order."""
        self._folder.forget_worker(self._worker)
        self._lock.close()
