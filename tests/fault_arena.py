"""Where the faults of tests/faults.py play: the table they enter, machines, and what breaks them."""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from postgres import Server, binaries
from studies import Command

STEPS = 40
RETRIES = 2


class Skip(Exception):  # noqa: N818
    """This machine cannot inject the fault; the text says why."""


@dataclass
class Arena:
    """Where a fault plays: one or two machines (folders), one storage. `stack` is what to undo when all is examined."""

    folder: Path
    data_root: Path
    stack: ExitStack
    url: str | None = None

    def command(self, name: str = "a", **options: object) -> Command:
        """A command of machine `name`."""
        (self.folder / name).mkdir()
        spec = {"search": points(3), **options}
        base = {"steps_per_epoch": STEPS, **spec.pop("base", {})}  # type: ignore[dict-item]
        environment = {"LDA_STORAGE": self.url} if self.url else {}
        environment |= spec.pop("environment", {})  # type: ignore[arg-type, call-overload]
        return Command(self.folder / name, self.data_root, base=base, environment=environment, **spec)  # type: ignore[arg-type]

    def server(self) -> Server:
        """A PostgreSQL server for the fault's studies."""
        if binaries() is None:
            raise Skip("no PostgreSQL here: install the package postgresql")
        server = Server()
        self.stack.callback(server.remove)
        self.url = server.url
        return server


def points(count: int) -> dict[str, object]:
    """A search of so many configurations, the same whoever runs it and however often it is interrupted."""
    momenta = [0.9, *(round(0.5 + 0.4 * index / count, 4) for index in range(1, count))]  # the default and others
    return {"sampler": "grid", "trials": count, "space": {"bank_momentum": {"choices": momenta}}}


Play = tuple[int, list[Command], int]
"""(times injected, the machines' commands, 0 if the last command ended as it should) of a study run with a fault."""

FAULTS: dict[str, Callable[[Arena], Play]] = {}


def named(name: str) -> Callable[[Callable[[Arena], Play]], Callable[[Arena], Play]]:
    """Enter a fault in the table under this name."""

    def enter(function: Callable[[Arena], Play]) -> Callable[[Arena], Play]:
        FAULTS[name] = function
        return function

    return enter


def unit(command: Command, index: int, target: str = "market1501") -> Path | None:
    """A unit's folder by its trial's place among the trials, whose numbers have gaps; None before it starts."""
    found = sorted(path.parent for path in command.study.glob(f"trial-*/{target}-s0/metrics.jsonl"))
    return found[index] if len(found) > index else None


def training(command: Command, index: int, target: str = "market1501", steps: int = 5) -> Callable[[], bool]:
    """Holds once that unit has trained a few steps."""

    def holds() -> bool:
        folder = unit(command, index, target)
        return folder is not None and (folder / "metrics.jsonl").read_bytes().count(b"\n") >= steps

    return holds


# --- what the faults need --------------------------------------------------------------------------------------------


def injected(folder: Path, body: str) -> dict[str, str]:
    """Environment of a command whose workers run `body` before anything else: a sitecustomize.py of their own."""
    folder.mkdir()
    guarded = textwrap.indent(textwrap.dedent(body), "    ")
    (folder / "sitecustomize.py").write_text(f'import sys\nif "sweeps.crew.worker" in sys.orig_argv:\n{guarded}\n')
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}


def root(what: str) -> None:
    """Raises Skip where this is not root."""
    if os.getuid() != 0:
        raise Skip(f"{what} needs root")


def ip(*arguments: str) -> None:
    """Run an `ip` command of iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def namespace() -> Iterator[tuple[str, str]]:
    """A network namespace linked to this one. Yields its name and this side's address."""
    root("a network namespace")
    if shutil.which("ip") is None:
        raise Skip("no ip command here: install the package iproute2")
    name = f"lda-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        raise Skip(f"no network namespaces here: {error.stderr.strip()}") from None
    try:
        ip("link", "add", "lda0", "type", "veth", "peer", "name", "lda1", "netns", name)
        ip("addr", "add", "10.213.77.1/24", "dev", "lda0")
        ip("link", "set", "lda0", "up")
        for command in (["addr", "add", "10.213.77.2/24", "dev", "lda1"], ["link", "set", "lda1", "up"]):
            ip("netns", "exec", name, "ip", *command)
        ip("netns", "exec", name, "ip", "link", "set", "lo", "up")
        yield name, "10.213.77.1"
    finally:
        ip("netns", "delete", name)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """A file system of that size at `folder`, which vanishes with all that is on it."""
    root("mounting a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        raise Skip(f"no mounting here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
