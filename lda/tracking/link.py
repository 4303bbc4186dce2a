"""This process's end of the pipe to lda.tracking.child: sends without waiting, and waits within a bound."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lda.tracking.modes import SECONDS, environment, patience
from lda.tracking.processes import children, kill

_LOCAL_PATIENCE = 120.0  # a busy disk is no stall: reading wandb's 5,000 files, writing an offline log
_CLOSE = 5.0
_FAILED = "LDA_WANDB_FAILED"
_READ = ("HOME", "NETRC", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")  # by wandb, beside WANDB_*


class LinkError(Exception):
    """The child failed, ended or is silent; the text says which."""


class Link:
    """One child. It is sent messages (see lda.tracking.child) and confirms each.

    Attributes:
        folder: where wandb writes the run that was begun last, once it has.
    """

    def __init__(self, offline: bool, say: Callable[[str], None]) -> None:
        self._offline, self._say = offline, say
        self.folder = ""
        self._patience = patience()
        self._ready = False
        self._unsent, self._received = bytearray(), b""
        self._posted = self._confirmed = 0
        self._since, self._full = time.monotonic(), False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child lives
        command = [sys.executable, "-m", "lda.tracking.child", *(["--offline"] if offline else [])]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**environment(), SECONDS: str(self._patience)},
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
        except OSError as error:
            self._errors.close()
            raise LinkError(f"its process does not start ({error.strerror})") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)

    def post(self, messages: Sequence[bytes]) -> None:
        """Send without waiting. Raises LinkError when the child has failed or been silent for too long."""
        if self._posted == self._confirmed:
            self._since = time.monotonic()
        for message in messages:
            self._unsent += len(message).to_bytes(8) + message
        self._posted += len(messages)
        self._turn(self._bound())

    def settle(self, hurry: float | None = None) -> None:
        """Wait until everything is confirmed. Raises LinkError as `post` does; `hurry` is a smaller bound from now."""
        if hurry is not None:
            self._since = time.monotonic()
        while self._posted > self._confirmed:
            bound = self._bound() if hurry is None else min(hurry, self._patience)
            left = max(self._since + bound - time.monotonic(), 0.0)
            select.select([self._out], [self._in] if self._unsent else [], [], left)
            self._turn(bound)

    def _bound(self) -> float:
        network = self._ready and not self._offline
        return self._patience if network else max(self._patience, _LOCAL_PATIENCE)

    def _turn(self, bound: float) -> None:
        """Take in what has been answered, give what the pipe takes, and judge the silence."""
        self._receive()
        self._transmit()
        if self._posted > self._confirmed and time.monotonic() - self._since >= bound:
            raise LinkError(f"no answer for {bound:g} s")

    def _receive(self) -> None:
        while True:
            try:
                received = os.read(self._out, 1 << 16)
            except BlockingIOError:
                return
            if not received:
                raise LinkError(f"its process ended{self._last_words()}")
            self._since = time.monotonic()
            *lines, self._received = (self._received + received).split(b"\n")
            for line in lines:
                self._heed(json.loads(line))

    def _heed(self, answer: dict[str, Any]) -> None:
        self._ready |= "ready" in answer
        self._confirmed += "done" in answer
        if "folder" in answer:
            self.folder = answer["folder"]
        if "problem" in answer:
            self._say(answer["problem"])
        if "failed" in answer:
            raise LinkError(answer["failed"])

    def _transmit(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._in, self._unsent[: 1 << 16])]
                if self._full:  # it was: the child reads
                    self._full, self._since = False, time.monotonic()
        except BlockingIOError:
            self._full = True
        except BrokenPipeError:
            raise LinkError(f"its process ended{self._last_words()}") from None

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f" ({lines[-1]})" if lines else ""

    def close(self) -> None:
        """Let the child end by itself, but not for long: what had to be logged was confirmed."""
        self._unsent += bytes(8)
        with contextlib.suppress(LinkError, subprocess.TimeoutExpired):
            self._transmit()
            self._process.wait(min(self._patience, _CLOSE))
        self.kill()

    def kill(self) -> None:
        """End the child and W&B's own service, which it started."""
        kill([*children(self._process.pid), self._process.pid] if self._process.poll() is None else [])
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            file.close()  # type: ignore[union-attr]


def share_failure() -> None:
    """From now on this process and those that it starts wait once for W&B, not once each: where one has waited in vain,
    the next run of any of them is offline from its start."""
    folder = tempfile.mkdtemp(prefix="lda-wandb-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_FAILED] = str(Path(folder) / "failed")


def failure() -> str:
    """Why W&B has failed for another process of this command; "" where it has not."""
    try:
        return Path(os.environ[_FAILED]).read_text(encoding="utf-8")
    except (KeyError, OSError):
        return ""


def _share(reason: str) -> None:
    if _FAILED in os.environ:
        with contextlib.suppress(OSError):  # the command has ended, or the disk is full: then each waits
            Path(os.environ[_FAILED]).write_text(reason, encoding="utf-8")


class Service:
    """The link of this process, made when first needed and shared by its runs, so that wandb is imported once.

    Attributes:
        offline: set once W&B has failed online: this process does not try, and wait, again.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.offline, self._say = False, say
        self._link: Link | None = None
        self._environment: dict[str, str] = {}
        self._owner = 0

    def link(self) -> Link:
        """Raises LinkError when no child can be started."""
        if self._link is None:
            self._link = Link(self.offline, self._say)
            if self._owner != os.getpid():
                self._owner = os.getpid()
                atexit.register(self.close)
        return self._link

    def begin(self, mode: str, logs: Path) -> None:
        """Before a run: what W&B reads from the environment may have changed, another process may have waited for it.

        Args:
            logs: where the run is logged.
        """
        now = {
            key: value for key, value in os.environ.items() if key.startswith(("WANDB_", "LDA_WANDB_")) or key in _READ
        }
        if now != self._environment:
            self.close()
            self._environment, self.offline = now, False
        if mode != "offline" and not self.offline and (reason := failure()):
            self.close()
            self.offline = True
            self._say(f"{reason}; logging offline in {logs}, `wandb sync` uploads later")
        if self._link is not None:
            self._link.folder = ""

    @property
    def folder(self) -> str:
        """Where wandb writes the run that was begun last; "" until it has said so."""
        return self._link.folder if self._link is not None else ""

    def drop(self, reason: str) -> None:
        """End a link that failed; the next one is offline."""
        first, self.offline = not self.offline, True
        if first and not Path(self.folder).name.startswith("offline-"):
            _share(reason)
        if self._link is not None:
            self._link.kill()
        self._link = None

    def close(self) -> None:
        """At the end of this process: never longer than the bound."""
        if self._link is not None and self._owner == os.getpid():
            self._link.close()
        self._link = None
