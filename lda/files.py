"""Files that appear complete or not at all and stay, folders of one process alone, JSON read with its errors named.

"On the disk" means that a power cut does not undo it: a file is synced, and so is every folder that names it. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from lda.errors import DamagedError, FolderInUseError, UsageError, warn

LOCK = ".lock"
"""In a folder that `held` holds; it names host and process of the holder."""

_UMASK = os.umask(0)  # can only be read by setting it
os.umask(_UMASK)

_HELD: set[Path] = set()  # a lock of fcntl keeps other processes away, not this one's other threads
_HELD_CHANGES = threading.Lock()

# What file systems answer where they cannot sync a folder, or have no locks.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` complete or not at all, whatever happens meanwhile, and is on the disk at
    the end, with the folders made for it. Text is UTF-8."""
    make_folder(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # a temporary file is its owner's alone; a run folder is not
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing; what was made is on the disk at the end."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk, where the file system knows such a thing."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Bring the content of a file that is closed, and its name, to the disk."""
    _sync(path, os.O_RDONLY)
    sync_folder(path.parent)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` atomically, keys in the given order. Raises ValueError for nan or infinity."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic(path) as file:
        file.write(text)


def remove_leftovers(folder: Path, patterns: Iterable[str]) -> None:
    """Remove what killed processes left of writing files of such names. Only for who holds the folder: else another may
    be writing them."""
    for path in folder.glob(".*.????????"):  # as tempfile draws them
        if any(fnmatch(path.name[1:-9], pattern) for pattern in patterns):
            path.unlink(missing_ok=True)


# --- why nothing can be written --------------------------------------------------------------------------------------

_CHUNK = 2**20
_REASONS = {
    errno.EDQUOT: "a quota is used up",
    errno.EROFS: "it is read-only",
    errno.EIO: "it answers with input/output errors",
    errno.ESTALE: "its server has lost it (stale file handle)",
}
_NOT_THE_DISK = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def cannot_write(folder: Path, needed: int) -> str:
    """Why no file of `needed` bytes can be written into a folder, as a clause that names it; "" where one can be.

    It is tried: a file of that size is written and removed, for free bytes say nothing of quotas, inodes and read-only
    disks. A folder that does not exist is judged by the nearest one above it that does.
    """
    folder = next((known for known in (folder, *folder.parents) if known.is_dir()), Path())
    try:
        disk = os.statvfs(folder)
        if disk.f_blocks and _free(disk) < needed:  # without filling up what others need
            return _full(folder, disk, needed)
        with tempfile.TemporaryFile(dir=folder) as file:
            chunk = os.urandom(min(_CHUNK, needed))  # a file system that compresses takes any number of zeros
            for start in range(0, needed, _CHUNK):
                file.write(chunk[: needed - start])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return _reason(folder, error, needed)
    return ""


def _free(disk: os.statvfs_result) -> int:
    return disk.f_bavail * disk.f_frsize


def _full(folder: Path, disk: os.statvfs_result, needed: int) -> str:
    if disk.f_files and not disk.f_favail:
        return f"the disk of {folder} has no inodes left for another file"
    return f"the disk of {folder} is full ({_free(disk) / 2**20:.1f} MiB free, {needed / 2**20:.1f} MiB needed)"


def _reason(folder: Path, error: OSError, needed: int) -> str:
    if error.errno in _NOT_THE_DISK:
        return ""
    if error.errno == errno.ENOSPC:
        with contextlib.suppress(OSError):
            return _full(folder, os.statvfs(folder), needed)
    known = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return f"the disk of {folder} cannot be written: {known}"


# --- a folder of one process alone -----------------------------------------------------------------------------------


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep every other process, on any host that shares the disk, from holding this folder meanwhile.

    The kernel lets go when the process ends, however it ends, and children do not inherit the lock. Within the process
    that holds a folder nothing else may open its `.lock`: the first descriptor of it that is closed ends the lock.

    Raises FolderInUseError naming the holder. Where the file system has no locks, warns and goes on.
    """
    make_folder(folder)
    place = folder.resolve()
    with _HELD_CHANGES:
        if place in _HELD:
            raise FolderInUseError(folder, platform.node(), os.getpid())
        _HELD.add(place)
    try:
        descriptor = _lock(folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a disk that is read-only now; the next one locks what lies there
                (folder / LOCK).unlink()
            os.close(descriptor)
    finally:
        with _HELD_CHANGES:
            _HELD.discard(place)


def _lock(folder: Path) -> int:
    """A descriptor of the folder's lock file, locked."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
                return descriptor
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warn(f"{folder}: its file system has no locks ({error.strerror}); run one command there at a time")
                return descriptor
            found = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
            os.close(descriptor)
            if not isinstance(error, BlockingIOError | PermissionError):
                raise
            pid, host = (int(found[0]), found[1]) if len(found) == 2 and found[0].isdigit() else (0, "")
            raise FolderInUseError(folder, host, pid) from None
        os.close(descriptor)  # its holder removed it between our opening and locking it


def _same(descriptor: int, path: Path) -> bool:
    """Whether the file under this name is the open one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


# --- reading ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DamagedError (a UsageError) naming the file when it is missing, damaged or no
    object, UsageError when it may not be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise UsageError(f"{path}: expected a JSON file: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: expected a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage_of_zip(path: Path) -> str:
    """What is wrong with a zip file (.npz, checkpoint.pt), whose every part has a checksum; "" where nothing is.

    torch.load compares no checksums: a block of zeros amid the weights goes unnoticed there.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # zipfile raises half a dozen types for a file that is damaged or no zip file
        return (str(error).splitlines() or [type(error).__name__])[0]
    return f"wrong checksum of {part}" if part else ""
