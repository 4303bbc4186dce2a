"""Weights & Biases: a view of the run folder. Whatever goes wrong with it is said in a line, and the run goes on.

All calls of wandb run in a child process (lda.tracking.child), one for all runs of a process. wandb waits without a
bound in many places (in `init` for a server that stalls, in `finish` for an upload, in its hook at exit for its own
service), in the calling thread, where no timeout of its own reaches; a process can always be killed. So:

- Logging is a write to a pipe that never blocks; what the pipe does not take waits in memory for the next call. Only
  pictures, tables and `finish` wait until W&B has taken everything.
- The child confirms each message. When it fails, ends or confirms nothing for LDA_WANDB_SECONDS (30), it is killed with
  wandb's service, and another child logs the whole run again, offline: every run keeps its messages until it is over.
  So after any failure there is one complete offline log, which `wandb sync` uploads. (wandb's own log of an online run
  is no substitute: there is none when `init` failed, and `wandb sync` skips those of online runs.)
- A process that failed online stays offline, and so do the other processes of its command (`share_failure`): one wait
  per command. After an error, and when it is stopped, a run waits 5 s for W&B and 5 s for each attempt to log offline:
  a worker that must stop has 20 s.

Offline unless an account is configured, never a prompt. An API key stays in the environment or file where wandb finds
it: no message, argument or configuration holds it.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lda.errors import UsageError
from lda.tracking.link import LinkError, Service, share_failure
from lda.tracking.modes import (
    Decision,
    account_configured,
    announcement,
    check_writable,
    log_folder,
    requested,
    resolve_mode,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RunLabels", "Tracker", "account_configured", "announcement", "log_folder", "resolve_mode", "share_failure"]

_ATTEMPTS = 3  # to log one run: online, offline, and offline again where somebody killed that child
_HURRY = 5.0  # seconds for each


@dataclass(frozen=True)
class RunLabels:
    """How a run is found on a dashboard.

    Attributes:
        group: `<study>/trial-0007`, the units of one trial.
        job_type: search, rerun, baseline, train or study.
        name: short, for example t0007-market1501-s0.
        tags: data (stand-in or real), study, target.
        folder: where the `wandb` directory lies; a study's units share one, so that one viewer shows all.
    """

    group: str = ""
    job_type: str = "train"
    name: str = ""
    tags: tuple[str, ...] = ()
    folder: Path | None = None


def _say(message: str) -> None:
    print(f"W&B: {message}", file=sys.stderr, flush=True)


_SERVICE = Service(_say)


class Tracker:
    """One W&B run. Every method is safe to call whatever state W&B is in."""

    def __init__(
        self, folder: Path, unit: str, config: Mapping[str, Any], labels: RunLabels, mode: str = "auto"
    ) -> None:
        self._messages: list[bytes] | None = None
        self._failures = 0
        decision = _requested(mode)
        if decision.mode == "disabled":
            return
        self._messages = []
        self._logs = _writable(labels.folder or folder)
        self._id = f"{unit}-{hashlib.sha256(labels.group.encode()).hexdigest()[:6]}"  # stable, and apart by study
        self._earlier = self._offline_logs()  # of this run before it was interrupted
        arguments = {
            "dir": str(self._logs.parent),
            "id": self._id,
            "group": labels.group or None,
            "job_type": labels.job_type,
            "name": labels.name or None,
            "tags": list(labels.tags),
            "config": dict(config),
        }
        _SERVICE.begin(decision.mode, self._logs)
        self._post("start", arguments, decision.mode)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log scalars; `row["step"]` is the x axis."""
        self._post("log", dict(row))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Set what a dashboard's run table shows."""
        self._post("summarise", dict(values))

    def log_image(self, key: str, picture: Path | NDArray[np.uint8], caption: str = "") -> None:
        """Attach a picture: a file, or pixels (H, W, 3)."""
        self._post("log_image", key, str(picture) if isinstance(picture, Path) else picture, caption, wait=True)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Attach a table."""
        self._post("log_table", key, list(columns), [list(row) for row in rows], wait=True)

    def finish(self, failed: bool = False) -> None:
        """Close the run and wait, within the bound, until W&B has all of it."""
        self._post("finish", failed, wait=True, hurry=_HURRY if failed else None)
        if self._messages is not None and self._failures:
            for part in self._offline_logs() - self._earlier - {Path(_SERVICE.folder).name}:
                shutil.rmtree(self._logs / part, ignore_errors=True)  # it is in the whole log, which uploads
        self._messages = None

    def _offline_logs(self) -> set[str]:
        return {path.name for path in self._logs.glob(f"offline-run-*-{self._id}")}

    def _post(self, method: str, *content: object, wait: bool = False, hurry: float | None = None) -> None:
        """Send one message, and everything again where W&B failed."""
        if self._messages is None:
            return
        try:
            message = pickle.dumps((method, content))
            self._messages.append(message)
            new = [message]
            while self._messages is not None:
                try:
                    link = _SERVICE.link()
                    link.post(new)
                    if wait:
                        link.settle(hurry)
                    return
                except LinkError as error:
                    self._fail(str(error))
                    new = self._messages or []
        except Exception as error:  # the promise of this module: W&B never fails a run
            self._messages = None
            _say(f"{method} failed ({type(error).__name__}: {error}); this run goes on without it")

    def _fail(self, reason: str) -> None:
        """The child is of no use any more: the next one logs everything again, unless this has happened too often."""
        self._failures += 1
        first = not _SERVICE.offline
        _SERVICE.drop(reason)
        if self._failures == _ATTEMPTS:
            self._messages = None
            _say(f"{reason}; this run goes on without it")
        elif first:
            _say(f"{reason}; logging offline in {self._logs}, `wandb sync` uploads later")


def _requested(mode: str) -> Decision:
    """As `requested`; a word that W&B does not know costs a line and no run, and the log is kept."""
    try:
        return requested(mode)
    except UsageError as error:
        _say(f"{error}; logging offline")
        return Decision("offline", str(error))


def _writable(folder: Path) -> Path:
    """The folder of the logs; the run's own where that of WANDB_DIR cannot be written."""
    logs = log_folder(folder)
    try:
        check_writable(logs.parent)
    except UsageError as error:
        _say(f"{error}; logging in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "wandb"
    return logs
