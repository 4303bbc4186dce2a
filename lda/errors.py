"""What a user is told when their input is wrong: one line with the value, what was expected and the nearest choice."""

from __future__ import annotations

import contextlib
import difflib
import functools
import sys
from collections.abc import Iterable
from pathlib import Path

_LISTED = 15  # more choices than a line holds are not listed


class UsageError(ValueError):
    """A mistake of the user (argument, study file, data folder). Commands print its message and exit with 2."""


class DamagedError(UsageError):
    """A file that is not what was written: missing, empty, torn, truncated, zeroed, or no file. Whoever has other files
    to read warns of it and goes on without it."""


class AbsentError(UsageError):
    """A data set of which nothing is below the data root. Whoever has others to read may go on without it."""


class FolderInUseError(UsageError):
    """Another process works in this folder.

    Attributes:
        folder: the folder.
        host, pid: of the other process; "" and 0 where it has not said so yet.
    """

    def __init__(self, folder: Path, host: str = "", pid: int = 0) -> None:
        self.folder, self.host, self.pid = folder, host, pid
        who = f"process {pid} on {host}" if pid else "another process"
        super().__init__(f"{folder} is in use by {who}; wait until it has ended, stop it, or give another --output")


class FailedError(RuntimeError):
    """What was asked for cannot be done, through no mistake of the user. Commands print its message and exit with 1."""


@functools.cache
def warn(text: str) -> None:
    """Say `warning: text` in one line on stderr, the same text once a process."""
    with contextlib.suppress(OSError):  # stderr may be a log on a full disk: no reason to end what goes on
        print(f"warning: {text}", file=sys.stderr, flush=True)


def unknown(what: str, value: object, choices: Iterable[str]) -> str:
    """The line for a name that is not among `choices`, with the nearest valid one if any is near."""
    valid = list(choices)
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.4)
    near = near or [choice for choice in valid if choice.lower() == str(value).lower()]  # names are in small letters
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if len(valid) <= _LISTED:
        return f"unknown {what} {value!r}{hint}; expected one of: {', '.join(valid)}"
    nearest = difflib.get_close_matches(str(value), valid, n=5, cutoff=0.0)
    return f"unknown {what} {value!r}{hint}; {len(valid)} are valid, the nearest: {', '.join(nearest)}"
