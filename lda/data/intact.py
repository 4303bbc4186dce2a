"""Whether files that were made here still hold what was written: a power cut, a full disk or a copy may change that.

Their SHA-256 is written when they are made and compared before their first use in every process. After that the file's
state (`stamp`) is compared, which costs a look at its directory entry.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lda.command import cores
from lda.files import atomic, sha256_of

FORMAT = 1

Stamp = tuple[int, int, int, int]
"""(device, inode, size, modification time in ns) of a file."""

Digests = dict[str, str]
"""Path below some folder, with "/" -> SHA-256 of the file's bytes."""

_SOUND: dict[str, tuple[Stamp, str]] = {}
"""File -> its state when this process last read it, and the digest of its bytes or of their parts."""


def stamp(path: Path | str) -> Stamp:
    """The state of a file. Raises OSError if there is none."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes; read once in a process as long as its state stays. Raises OSError."""
    name = os.fspath(path)
    now = stamp(name)
    known = _SOUND.get(name)
    if known is None or known[0] != now:
        known = _SOUND[name] = now, sha256_of(Path(name))
    return known[1]


def damaged(folder: Path, digests: Digests) -> list[str]:
    """The files below `folder` that are missing, unreadable or not what `digests` says."""
    root = os.fspath(folder)
    return [name for name, digest in digests.items() if _digest(os.path.join(root, name)) != digest]


def digests_of(folder: Path, names: Iterable[str]) -> Digests:
    """The digests of files below `folder`. Raises OSError."""
    root = os.fspath(folder)
    return {name: file_digest(os.path.join(root, name)) for name in names}


def parts_hold(path: Path, size: int, digests: list[str]) -> bool:
    """Whether the parts of `size` bytes of a large file have these SHA-256; read by several threads, once in a process.

    Raises OSError.
    """
    now, whole = stamp(path), hashlib.sha256("".join(digests).encode()).hexdigest()
    if _SOUND.get(os.fspath(path)) == (now, whole):
        return True
    if -(-now[2] // size) != len(digests):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        with ThreadPoolExecutor(min(cores(), 8)) as pool:  # hashing and reading leave the interpreter to other threads
            parts = pool.map(lambda index: hashlib.sha256(os.pread(descriptor, size, index * size)).hexdigest(),
                             range(len(digests)))  # fmt: skip
            holds = all(found == wanted for found, wanted in zip(parts, digests, strict=True))
    finally:
        os.close(descriptor)
    if holds:
        _SOUND[os.fspath(path)] = now, whole
    return holds


# --- lists of digests ------------------------------------------------------------------------------------------------
def read_lists(path: Path) -> dict[str, Digests]:
    """The lists in a file of `write_lists`; empty if it is missing, damaged or another version's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = content["files"] if content["format"] == FORMAT else {}
        return {name: {file: digest[:] for file, digest in digests.items()} for name, digests in lists.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def write_lists(path: Path, lists: Mapping[str, Digests]) -> None:
    """Write lists of digests, by name. Raises OSError."""
    with atomic(path) as file:
        json.dump({"format": FORMAT, "files": lists}, file, indent=0)


def _digest(name: str) -> str:
    try:
        return file_digest(name)
    except OSError:
        return ""
