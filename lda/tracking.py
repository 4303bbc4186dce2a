"""Weights & Biases: a view of the run folder. The only module that imports wandb.

Offline unless an account is configured, never a prompt, never a wait for the network. Whatever goes wrong with W&B is
said once on stderr, and the run goes on: its truth lies in its folder.
"""

from __future__ import annotations

import hashlib
import netrc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

_PROJECT = "lda-reid"
_ONLINE_TIMEOUT = 20.0  # seconds; an account is configured, but there may be no network


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


def account_configured() -> bool:
    """Whether W&B could log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


Mode = Literal["online", "offline", "disabled"]


def resolve_mode(requested: str) -> Mode:
    """`auto` is online with an account, else offline; WANDB_MODE overrules `auto`."""
    if requested == "auto":
        requested = os.environ.get("WANDB_MODE") or ("online" if account_configured() else "offline")
    return cast(Mode, requested if requested in ("online", "offline") else "disabled")


class Tracker:
    """One W&B run. Every method is safe to call whatever state W&B is in."""

    def __init__(
        self, folder: Path, unit: str, config: Mapping[str, Any], labels: RunLabels, mode: str = "auto"
    ) -> None:
        self._run: Any = None
        resolved = resolve_mode(mode)
        if resolved != "disabled":
            self._guarded("start", lambda: self._start(folder, unit, config, labels, resolved))

    def _start(self, folder: Path, unit: str, config: Mapping[str, Any], labels: RunLabels, mode: Mode) -> None:
        import wandb  # 1-2 s: not for runs that do not want it

        directory = labels.folder or folder
        directory.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_git": True,  # env.json has it, and a dirty diff may hold anything
            "x_disable_stats": True,
            "init_timeout": _ONLINE_TIMEOUT,
            "login_timeout": 1.0,
            "x_transaction_log_flush_interval": 2.0,  # a killed run keeps all but its last two seconds
        }
        known = type(wandb.Settings()).model_fields
        arguments: dict[str, Any] = {
            "project": _PROJECT,
            "dir": directory,
            "id": f"{unit}-{hashlib.sha256(labels.group.encode()).hexdigest()[:6]}",  # stable, and apart by study
            "group": labels.group or None,
            "job_type": labels.job_type,
            "name": labels.name or None,
            "tags": list(labels.tags),
            "config": dict(config),
            "resume": "allow",
            "reinit": "finish_previous",
            # x_ settings are wandb's private ones and may go away
            "settings": wandb.Settings(**{key: value for key, value in settings.items() if key in known}),
        }
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except wandb.Error as error:
            if mode != "online":
                raise
            _say(f"not reachable ({_first_line(error)}); logging offline, `wandb sync` uploads later")
            self._run = wandb.init(mode="offline", **arguments)
        for metric in ("loss/*", "feature/*", "val/*", "lr", "images_per_second"):
            self._run.define_metric(metric, step_metric="step")

    def log(self, row: Mapping[str, Any]) -> None:
        """Log scalars; `row["step"]` is the x axis."""
        self._guarded("log", lambda: self._run.log(dict(row), step=row["step"]))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Set what a dashboard's run table shows."""
        self._guarded("summary", lambda: self._run.summary.update(dict(values)))

    def log_image(self, key: str, picture: Path | NDArray[np.uint8], caption: str = "") -> None:
        """Attach a picture: a file, or pixels (H, W, 3)."""

        def send() -> None:
            import wandb

            source = str(picture) if isinstance(picture, Path) else picture
            self._run.log({key: wandb.Image(source, caption=caption)})

        self._guarded("image", send)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Attach a table."""

        def send() -> None:
            import wandb

            self._run.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._guarded("table", send)

    def finish(self, failed: bool = False) -> None:
        """Close the run."""
        self._guarded("finish", lambda: self._run.finish(exit_code=1 if failed else 0))
        self._run = None

    def _guarded(self, what: str, action: Callable[[], object]) -> None:
        """Do it; on any failure of W&B say so once and stop using it for this run."""
        if self._run is None and what != "start":
            return
        try:
            action()
        except Exception as error:  # the promise of this module: W&B never fails a run
            self._run = None
            _say(f"{what} failed ({type(error).__name__}: {_first_line(error)}); this run goes on without it")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _say(message: str) -> None:
    print(f"W&B: {message}", file=sys.stderr)
