"""What every command checks before it creates anything: its arguments and its environment, each mistake in one line.

The functions below are the `type=` of arguments (argparse then names the option), and `checked` uses them for what
comes from elsewhere. `~` is the home folder in every path, quoted or not. No torch, no numpy.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lda.errors import UsageError, unknown

T = TypeVar("T")

HIGHEST_SEED = 2**31 - 1
"""Of a run."""

HIGHEST_STUDY_SEED = 2**30 - 1
"""Of a study: the fresh seeds of its confirmation come after it."""

_LONGEST_NAME = 255  # bytes; of one folder or file, on every file system in use
_LONGEST_PATH = 4000  # bytes; Linux takes 4095, and names of ours come below


class ArgumentError(UsageError, argparse.ArgumentTypeError):
    """A wrong argument: argparse puts the option's name before its text."""


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UsageErrors of one line, and which looks at the environment first.

    To be used inside `lda.command.exit_code`.
    """

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse does, which keeps to itself that nothing could be written."""
        if message:
            (file or sys.stderr).write(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does. Raises UsageError for a mistake, also for an environment that no command can work in."""
        check_environment()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError: argparse's own ending is the whole usage and a line."""
        if message.startswith("unrecognized arguments: -"):
            options = [option for action in self._actions for option in action.option_strings]
            message = unknown("option", message.split()[2].partition("=")[0], options)
        elif message.startswith("unrecognized arguments: "):
            message = f"{message}; see --help"
        raise UsageError(message.removeprefix("argument "))


def check_environment() -> None:
    """Raises UsageError for an environment in which no command can work."""
    try:
        os.getcwd()
    except OSError:
        raise UsageError("the current folder does not exist any more; change to one that does") from None
    mask = os.umask(0o077)  # can only be read by setting it
    os.umask(mask)
    if mask & 0o700:
        raise UsageError(f"umask {mask:04o} takes from you what your own commands write; set for example: umask 022")


@contextmanager
def named(what: str) -> Iterator[None]:
    """An ArgumentError inside is told with this before it: the name of the option or variable that it comes from."""
    try:
        yield
    except ArgumentError as mistake:
        raise UsageError(f"{what}: {mistake}") from None


def checked(what: str, check: Callable[[str], T], value: str | Path) -> T:
    """What `check`, one of the functions below, makes of the value. Raises UsageError that begins with `what`."""
    with named(what):
        return check(str(value))


# --- numbers and names -----------------------------------------------------------------------------------------------


def whole(low: int, high: int) -> Callable[[str], int]:
    """Reads a whole number from `low` to `high`, ends included."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ArgumentError(f"expected a whole number from {low} to {high}, got {shown(text)}")
        return int(text)

    return read


def names(text: str) -> list[str]:
    """Names with commas between them, at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ArgumentError(f"expected names with commas between, got {shown(text)}")
    return found


def text(given: str) -> str:
    """Any text with something in it."""
    if not given.strip():
        raise ArgumentError("expected a text, got an empty one")
    return given


def shown(value: str) -> str:
    """A value in a message: quoted, and cut where it is longer than a line should be."""
    return repr(value if len(value) <= 80 else f"{value[:60]}... ({len(value)} characters)")


# --- paths -----------------------------------------------------------------------------------------------------------


def path(given: str) -> Path:
    """A path, `~` expanded. Nothing needs to be there."""
    if not given.strip():
        raise ArgumentError("expected a path, got an empty one")
    try:
        found = Path(given).expanduser()
    except RuntimeError:
        raise ArgumentError(f"{shown(given)}: no home folder is known by that name; write the path in full") from None
    longest = max((len(os.fsencode(part)) for part in found.parts), default=0)
    if longest > _LONGEST_NAME or len(os.fsencode(found)) > _LONGEST_PATH:
        raise ArgumentError(
            f"{shown(given)}: too long; a path may have {_LONGEST_PATH} bytes and a name in it {_LONGEST_NAME}"
        )
    try:
        os.lstat(found / "x")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ArgumentError(f"{found}: links that lead to each other without end") from None
    return found


def existing_folder(given: str) -> Path:
    """A folder that is there and can be read."""
    folder = path(given)
    if not os.path.isdir(folder):
        raise ArgumentError(f"{folder}: {_why_not(folder, 'folder')}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ArgumentError(f"{folder}: no permission to read this folder")
    return folder


def existing_file(given: str) -> Path:
    """A file that is there and can be read."""
    file = path(given)
    if not os.path.isfile(file):
        raise ArgumentError(f"{file}: {_why_not(file, 'file')}")
    if not os.access(file, os.R_OK):
        raise ArgumentError(f"{file}: no permission to read this file")
    return file


def output_folder(given: str) -> Path:
    """A folder that is there and can be written, or that can be made. It is not made here."""
    folder = path(given)
    _check_text(folder)
    place = _nearest(folder)
    if not os.path.isdir(place):
        why = _why_not(place, "folder")
        raise ArgumentError(f"{folder}: {why}" if place == folder else f"{folder}: cannot be made, {place} {why}")
    _check_writable(folder, place)
    return folder


def output_file(given: str) -> Path:
    """A file that can be written, in a folder that is there or can be made. Nothing is written here."""
    file = path(given)
    if os.path.isdir(file):
        raise ArgumentError(f"{file}: is a folder, expected a file")
    output_folder(str(file.parent))
    return file


def _nearest(folder: Path) -> Path:
    """The folder or the first of its parents that is there; a broken link is."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _check_writable(folder: Path, place: Path) -> None:
    if os.access(place, os.W_OK | os.X_OK):
        if place != folder:
            _check_makes_folders(folder, place)
        return
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        raise ArgumentError(f"{folder}: {place} lies on a disk that is mounted read-only")
    raise ArgumentError(f"{folder}: no permission to write in {place}")


def _check_makes_folders(folder: Path, place: Path) -> None:
    """Some file systems let root write and make nothing, /proc for one, and a quota tells when it is asked only."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".lda-", dir=place))
    except OSError as error:
        raise ArgumentError(f"{folder}: cannot be made in {place}: {(error.strerror or str(error)).lower()}") from None


def _check_text(folder: Path) -> None:
    """Paths of results go into databases and JSON: they have to be text."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ArgumentError(
            f"{str(folder)!a}: is no text in this locale; set PYTHONUTF8=1, or give a name without such signs"
        ) from None


def _why_not(place: Path, wanted: str) -> str:
    """Why a path is not what it should be, in words."""
    try:
        os.stat(place)
    except FileNotFoundError:
        return "is a link to nothing" if os.path.islink(place) else f"there is no such {wanted}"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    kind = "folder" if os.path.isdir(place) else "file"
    return f"is a {kind}, expected a {wanted}" if kind != wanted else f"is no ordinary {wanted}"
