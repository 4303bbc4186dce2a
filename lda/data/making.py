"""Files and folders that several processes, containers and machines may make in one place at the same time.

One makes, the others wait (`alone`), as far as the locks of the file system reach. Nothing that is right depends on
them: whatever is made has a name of its own beside its place, is synced, and appears there by one rename. So where a
lock ends at its machine, two machines do the same work, and the later one finds it done.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import platform
import pwd
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lda.errors import UsageError, warn
from lda.files import make_folder, sync_folder

QUIET = 3.0  # seconds of waiting for another process that are not worth a line
DEAD = 3600.0  # seconds without a sign of life after which another machine's temporary file is one that was left behind
_POLL = 0.1  # seconds between two looks at a lock
_HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK}
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MODE = 0o666  # less the umask


@contextmanager
def alone(place: Path, doing: str) -> Iterator[None]:
    """Hold the lock of `place`, and first wait for whoever holds it, in this process or another, here or elsewhere.

    Its file is `.NAME.lock` beside `place`; the kernel releases the lock of a process that dies. `doing` says on the
    screen what the other one is about if waiting takes long: "packing 5 images".

    Raises:
        UsageError: the folder cannot be made, or nothing can be written in it.
    """
    path = place.with_name(f".{place.name}.lock")
    writable_folder(path.parent)
    descriptor = _acquired(path, doing)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # who waits for it sees that, and makes another
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may hold the same descriptor
        os.close(descriptor)


def writable_folder(folder: Path) -> None:
    """Make a folder with its parents. Raises UsageError if that, or writing in it, is impossible."""
    try:
        make_folder(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise unwritable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def unwritable(path: Path, error: OSError, what: str = "written") -> UsageError:
    """The line for what cannot be written (read), with whose it is if it is another user's."""
    whose = ""
    for place in (path, *path.parents):  # the first that can be looked at
        with suppress(OSError):
            owner = os.stat(place, follow_symlinks=False).st_uid
            if owner != os.geteuid():
                belongs = "it is" if place == path else f"{place} is"
                whose = f", {belongs} {_user(owner)}'s: every user has a cache of their own"
            break
    reason = "it is a link" if error.errno == errno.ELOOP else error.strerror or str(error)
    return UsageError(f"{path}: cannot be {what} ({reason}{whose}); name another folder or set LDA_CACHE_DIR")


# --- temporary names -------------------------------------------------------------------------------------------------
@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, removed at the end unless `publish` has moved it."""
    folder = _new_name(place)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_file(place: Path) -> Iterator[tuple[int, Path]]:
    """A new file beside `place`, as (descriptor, path); closed and removed at the end unless it was moved."""
    path = _new_name(place)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _MODE)
    try:
        yield descriptor, path
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


@contextmanager
def whole_folder(place: Path, doing: str) -> Iterator[Path | None]:
    """A new folder to be filled, which is at `place` afterwards, whole and on the disk; None if somebody else, who was
    waited for, has made it. See `alone` for `doing` and for what is raised."""
    with alone(place, doing):
        remove_left_over(place)
        if place.is_dir():
            yield None
            return
        with new_folder(place) as folder:
            yield folder
            publish(folder, place)


def publish(folder: Path, place: Path) -> None:
    """Move a folder of `new_folder` with all that is in it to `place`, whole and on the disk.

    Raises OSError if `place` holds something already.
    """
    os.sync()  # one call: to sync thousands of small files one by one takes minutes
    folder.replace(place)
    sync_folder(place.parent)


def publish_file(descriptor: int, path: Path, place: Path) -> None:
    """Move a file of `new_file` to `place`, whole and on the disk."""
    os.fsync(descriptor)
    path.replace(place)
    sync_folder(place.parent)


def remove_left_over(place: Path, *more: str) -> None:
    """Remove what killed processes left of their attempts to make `place`; the caller holds its lock.

    On this machine nobody else is at it then. Another machine may not see our lock: what is not of this machine stays
    until nothing has changed there for an hour. A sign of life is the modification time, see `touch`. `more`: how other
    temporary names begin that are made under this lock.
    """
    own, prefixes = _prefix(place), (f".{place.name}.tmp-", *more)
    lock = place.with_name(f".{place.name}.lock")
    with suppress(OSError):
        os.utime(lock)
        now = lock.stat().st_mtime  # by the clock of the file system, as all modification times are
        with os.scandir(place.parent) as entries:
            for entry in entries:
                temporary = entry.name.startswith(prefixes) and entry.name != lock.name
                if temporary and (entry.name.startswith(own) or now - _modified(entry) > DEAD):
                    _remove(entry)


def touch(path: Path) -> None:
    """Tell other machines that what is being made at this temporary name is not left over."""
    with suppress(OSError):
        os.utime(path)


@functools.cache
def machine() -> str:
    """8 hex digits for this machine since it was started; the same in its containers, which share its locks."""
    try:
        boot = _BOOT.read_text(encoding="utf-8")
    except OSError:
        boot = platform.node()
    return hashlib.sha256(boot.encode()).hexdigest()[:8]


def _new_name(place: Path) -> Path:
    return place.with_name(_prefix(place) + secrets.token_hex(8))


def _prefix(place: Path) -> str:
    return f".{place.name}.tmp-{machine()}-"


def _modified(entry: os.DirEntry[str]) -> float:
    return entry.stat(follow_symlinks=False).st_mtime


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(entry.path)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


# --- the lock --------------------------------------------------------------------------------------------------------
def _acquired(path: Path, doing: str) -> int:
    """A descriptor of the lock file, locked."""
    told, began = False, time.monotonic()
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, _MODE)
        except OSError as error:
            raise unwritable(path if os.path.lexists(path) else path.parent, error) from None
        try:
            if _lock(descriptor, path) and _still_named(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not told and time.monotonic() - began > QUIET:
            told = True
            print(f"waiting for another process that is {doing} (it holds {path})", file=sys.stderr, flush=True)
        time.sleep(_POLL)


def _lock(descriptor: int, path: Path) -> bool:
    """Try once. On Linux this lock holds between the machines of a network file system as well."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise unwritable(path, error) from None
        warn(f"{path.parent}: no locks on this file system; what starts at once works twice")
    return True


def _still_named(descriptor: int, path: Path) -> bool:
    """Whether the lock is on the file that others find there: somebody may have deleted it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
