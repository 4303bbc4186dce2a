"""The process that imports wandb: logs what arrives on its standard input and confirms each message.

    python -m lda.tracking.child [--offline]      started by lda.tracking.link, never by hand
    python -m lda.tracking.child --ask            print how wandb would log, as JSON

A message is its length (8 bytes, big endian) and a pickled pair (name of a method of _Logger, its arguments); an empty
one is the last. The answers are lines of JSON: {"ready"} once wandb is imported, {"done"} after every message,
{"problem": text} for a picture or table that cannot be made, {"failed": text} before it ends because wandb failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lda.tracking.modes import SECONDS
from lda.tracking.processes import children, kill

PROJECT = "lda-reid"
_POLL = 1.0  # seconds between looks whether the parent lives
_SETTINGS: dict[str, Any] = {
    "console": "off",
    "silent": True,
    "disable_git": True,  # env.json has it, and a dirty diff may hold anything
    "save_code": False,
    "x_disable_stats": True,
    "x_transaction_log_flush_interval": 2.0,  # a killed run keeps all but its last two seconds
}
_UPLOADS = ("filestream: fatal", "runfiles:", "filetransfer:", "runupserter: failed", "sender: failed")
"""How an error in the log of wandb's service begins when a part of a run will not be uploaded any more."""
_PLOTTED = {  # against the training step, and what of them stands in a run's summary
    "loss/*": "last", "gradient/*": "last", "gate/*": "last", "match/*": "last", "vae/*": "last", "router/*": "last",
    "vote/*": "last", "weights/*": "last", "align/*": "last",
    "feature/*": "last", "bank/*": "last", "val/*": "max,last", "lr": "last", "images_per_second": "last",
}  # fmt: skip


class _Logger:
    """The methods are what a message may ask for."""

    def __init__(self, offline: bool, report: Callable[..., None]) -> None:
        import wandb

        self._wandb, self._offline, self._report = wandb, offline, report
        self._run: Any = None

    def start(self, arguments: Mapping[str, Any], mode: str) -> None:
        """Begin a run, whose arguments are those of wandb.init. An earlier one must be over."""
        wandb = self._wandb
        mode = "offline" if self._offline else mode
        decided = self._decision()["mode"] if mode == "auto" else mode
        if decided == "disabled":
            return
        wanted = {**_SETTINGS, "init_timeout": 0.6 * float(os.environ[SECONDS])}  # its reason comes before our bound
        known = type(wandb.Settings()).model_fields
        # x_ settings are wandb's private ones and may go away
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
        if not _configured().project:
            arguments = {**arguments, "project": PROJECT}
        self._run = wandb.init(mode=decided, settings=settings, resume="allow", reinit="finish_previous", **arguments)
        for metric, summary in _PLOTTED.items():
            self._run.define_metric(metric, step_metric="step", summary=summary)
        self._report(folder=self._run.settings.sync_dir)

    def log(self, row: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.log(dict(row), step=row["step"])

    def summarise(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(dict(values))

    def log_image(self, key: str, picture: Any, caption: str) -> None:
        self._attach(key, lambda: self._wandb.Image(picture, caption=caption))

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._attach(key, lambda: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows]))

    def _attach(self, key: str, make: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            made = make()
        except Exception as error:  # of this one thing; the rest of the run is logged
            self._report(problem=f"{key} is not logged: {_described(error)}")
            return
        self._run.log({key: made})

    def finish(self, failed: bool) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=1 if failed else 0)
            if lost := _lost(Path(run.settings.log_internal)):
                raise ConnectionError(f"not all was uploaded ({lost})")

    def _decision(self) -> dict[str, str]:
        """How wandb logs: asked of wandb, whose ways of being logged in change with its version. No network."""
        wandb = self._wandb
        try:
            logged_in = wandb.login(prompt=False, verify=False)
        except wandb.errors.AuthenticationError as error:
            return {"mode": "offline", "reason": str(error).strip().splitlines()[0].rstrip(".")}
        configured = _configured()
        if configured.mode not in ("online", "run", "shared"):
            off = "disabled" if configured.mode == "disabled" else "offline"
            return {"mode": off, "reason": f"mode = {configured.mode} in W&B's settings file"}
        if logged_in:
            return {"mode": "online", "reason": configured.base_url}
        return {"mode": "offline", "reason": f"no account for {configured.base_url}"}


def _configured() -> Any:
    """wandb's settings from its files and environment."""
    from wandb.sdk import wandb_setup  # wandb.setup() would start its service

    return wandb_setup.singleton().settings


def _lost(log: Path) -> str:
    """The first thing that W&B's service gave up uploading; "" where it has nothing to say. `finish` returns all the
    same, and prints a warning at most; its log alone tells."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line of its crash, which ends its process
            entry = json.loads(line)
            if entry.get("level", "").startswith("ERROR") and entry.get("msg", "").startswith(_UPLOADS):
                return f"{entry['msg']} {entry.get('error', '')}".partition(" url=")[0].strip()
    return ""


def _described(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def main(arguments: Sequence[str]) -> int:
    """0 after the last message, 1 when wandb failed."""
    parent = os.getppid()
    incoming, outgoing = os.dup(0), os.dup(1)
    with Path(os.devnull).open("r+b") as nowhere:  # wandb's own process inherits these and may outlive this one
        os.dup2(nowhere.fileno(), 0)
        os.dup2(nowhere.fileno(), 1)

    def report(**answer: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent was killed; what it had sent is logged all the same
            os.write(outgoing, f"{json.dumps(answer)}\n".encode())

    if "--ask" in arguments:
        report(**_Logger(False, report)._decision())
        return 0
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        logger = _Logger("--offline" in arguments, report)
        report(ready=True)
        for message in _messages(incoming, parent):
            method, content = pickle.loads(message)
            getattr(logger, method)(*content)
            report(done=True)
        logger.finish(failed=True)  # of a parent that was killed: its run is not over
    except Exception as error:
        report(failed=_described(error))
        return 1
    return 0


def _messages(descriptor: int, parent: int) -> Iterator[bytes]:
    """Every message until the last, or until the parent is dead (another child of its may hold the pipe open)."""
    buffer = bytearray()
    while True:
        while len(buffer) >= 8 and len(buffer) >= (end := 8 + int.from_bytes(buffer[:8])):
            if end == 8:
                return
            yield bytes(buffer[8:end])
            del buffer[:end]
        if not select.select([descriptor], [], [], _POLL)[0]:
            if os.getppid() != parent:
                return
        elif received := os.read(descriptor, 1 << 20):
            buffer += received
        else:
            return


def _end_with(parent: int) -> None:
    """When the parent is dead, end within the bound of every wait, wherever wandb hangs."""
    while os.getppid() == parent:
        time.sleep(_POLL)
    time.sleep(float(os.environ[SECONDS]))
    kill(children(os.getpid()))
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
