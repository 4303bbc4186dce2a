"""Real studies at a tiny budget: the command in a process of its own, on the tiny stand-in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]

BASE: dict[str, Any] = {
    "epochs": 1, "steps_per_epoch": 4, "warmup_epochs": 0, "milestones": [],
    "image_height": 32, "image_width": 16, "ids_per_batch": 4, "images_per_id": 2, "pad": 2,
    "log_every": 1, "wandb": "disabled",
}  # fmt: skip


_STARTED: list[tuple[Command, subprocess.Popen[str]]] = []


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Import it, and a test that fails leaves no study running."""
    yield
    kill_all()


def kill_all() -> None:
    """End every study that was started and lives."""
    while _STARTED:
        command, process = _STARTED.pop()
        command.kill_everything(process)


@dataclass
class Command:
    """`python sweeps/run.py --study <folder>/mine.yaml` with output under the same folder."""

    folder: Path
    data_root: Path
    spec: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    repository: Path = REPOSITORY

    def __post_init__(self) -> None:
        search = {"sampler": "random", "trials": 2, "space": {"bank_momentum": {"low": 0.5, "high": 0.99}}}
        search |= {"pruning": {"rule": "none"}, **self.search}
        spec: dict[str, Any] = {"title": "Test", "cost": "seconds", "protocol": "protocol3", "confirm": {"seeds": 0}}
        spec |= {"targets": ["cuhk03", "market1501"], "heartbeat_seconds": 1, "grace_seconds": 5, **self.spec}
        content = {
            **spec,
            "search": search,
            "base": {**BASE, **self.base},
            "methods": {"lda": {"bank_warmup_updates": 0}},
        }
        (self.folder / "mine.yaml").write_text(yaml.safe_dump(content))

    @property
    def study(self) -> Path:
        """The study's folder."""
        return self.folder / "runs" / "mine"

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start the command; its output is kept in a file, see `output`."""
        arguments = ["--study", str(self.folder / "mine.yaml"), "--data-root", str(self.data_root)]
        arguments += ["--output", str(self.folder / "runs"), "--workers", "1", *options]
        with (self.folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                [*self.prefix, sys.executable, str(self.repository / "sweeps" / "run.py"), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        _STARTED.append((self, process))
        return process

    def run(self, *options: str, timeout: float = 240) -> int:
        """Run it to its end. Returns the exit code."""
        return self.start(*options).wait(timeout)

    @property
    def output(self) -> str:
        """What the newest start printed."""
        return (self.folder / "output.txt").read_text()

    def events(self) -> list[str]:
        """Everything that ever happened to the study."""
        return [json.loads(line)["text"] for line in (self.study / "events.jsonl").read_text().splitlines()]

    def trial(self, name: str) -> dict[str, Any]:
        """trial.json of one trial."""
        return json.loads((self.study / name / "trial.json").read_text())  # type: ignore[no-any-return]

    def results(self) -> dict[str, float]:
        """Finished unit -> when it was finished; one that is run again gets a new time."""
        found = sorted(self.study.glob("trial-*/*/result.json"))
        return {str(path.parent.relative_to(self.study)): path.stat().st_mtime for path in found}

    def workers(self) -> list[int]:
        """Process ids of the workers of this study that live."""
        return [pid for pid in _processes() if str(self.study) in log_of(pid)]

    def kill_everything(self, coordinator: subprocess.Popen[str]) -> None:
        """SIGKILL to the coordinator and its workers, as a power cut would."""
        pids = self.workers()
        coordinator.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        coordinator.wait()


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def log_of(pid: int) -> str:
    """Where a worker's stderr goes: its log in the study's folder. Other processes: nothing of interest."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return os.readlink(f"/proc/{pid}/fd/2") if b"sweeps.crew.worker" in command else ""
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def children_of(pid: int) -> list[tuple[int, str]]:
    """(id, command line) of every process below this one."""
    found, parents = [], {pid}
    for child in sorted(_processes()):
        try:
            parent = int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[1])
            command = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent in parents:
            parents.add(child)
            found.append((child, command))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 90, process: subprocess.Popen[str] | None = None) -> None:
    """Wait until it holds. Fails after `seconds`, or when the process that should bring it about has ended."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None or condition(), "the process ended before"
        time.sleep(0.05)
