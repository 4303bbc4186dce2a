"""The folder of a study, runs/<study>/, and what the sweep itself keeps there.

study.json                  the resolved study, its command and versions; written by the coordinator
trial-0007/trial.json       one configuration: parameters, state, score, units; a view of the database, see mirror.py
trial-0007/<target>-s0/     one unit, written by lda.trainer
trial-baseline/             the plain baseline of the confirmation
events.jsonl                what happened, one line each, appended by everyone
workers/<id>.json, .lock    what a worker does now; it holds the lock while it lives, so a free lock is a dead worker
workers/<host>-<slot>.log   what a worker printed
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from lda.files import read_json, write_json
from lda.runs import finished, read_unit, unit_folders

BASELINE = "trial-baseline"


def trial_name(number: int) -> str:
    """Folder of a trial: trial-0007. The number is that of the first attempt; retries share the folder."""
    return f"trial-{number:04d}"


def unit_name(target: str, seed: int) -> str:
    """Folder of a unit inside its trial: market1501-s0."""
    return f"{target}-s{seed}"


@dataclass(frozen=True)
class StudyFolder:
    """Paths, and the small files shared by the processes of a study."""

    path: Path

    @property
    def workers(self) -> Path:
        """Folder of the workers' status, locks and logs."""
        return self.path / "workers"

    def unit(self, trial: str, target: str, seed: int) -> Path:
        """Folder of one unit."""
        return self.path / trial / unit_name(target, seed)

    def finished_unit(self, unit: str) -> Path | None:
        """A unit of this study that is finished and has this hash, wherever it was run."""
        for trial in sorted(self.path.glob("trial-*")):
            for folder in unit_folders(trial):
                if not folder.is_symlink() and finished(folder) and read_unit(folder).unit == unit:
                    return folder
        return None

    def event(self, text: str, worker: str = "") -> None:
        """Append one line to events.jsonl; a line is far below the size that appends keep whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        row = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "worker": worker, "text": text}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def statuses(self) -> list[dict[str, Any]]:
        """What every worker here said last, and when it was last alive (seconds since the epoch), by worker."""
        found = []
        for path in sorted(self.workers.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # it left meanwhile
                found.append({**read_json(path), "alive": path.stat().st_mtime})
        return found

    def dead_workers(self) -> Iterator[str]:
        """Ids of workers that ended without a word; `forget_worker` removes what they left."""
        for path in sorted(self.workers.glob("*.lock")):
            try:
                with path.open("r+") as file:
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
        self._lock: IO[str] = made.open("w")
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
