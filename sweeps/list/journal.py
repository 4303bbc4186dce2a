"""A journal file as a study's storage: Optuna's format, written so that a crash at any byte costs one record at most.

A record is a line of JSON, and counts once its line is whole: before that it was promised to nobody. So what a killed
process or a power cut left at the end (half a line, zeros) is cut off before the next record is written; Optuna's own
backend would write the next record into the same line and could read neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock

from lda.errors import UsageError

_LOCK_SECONDS = 30.0  # a record is written in milliseconds; who holds the lock for longer is stopped or on a dead link
_FOREIGN_SECONDS = 5  # the same of other programs, whose lock outlives them
_PAUSE_SECONDS = 0.2
_BEGINNING = b'{"op_code":'


class JournalError(UsageError):
    """The journal cannot be used as it is: damaged in the middle, no journal at all, or another file than before."""


class Journal(BaseJournalBackend):
    """The backend of Optuna's JournalStorage.

    Reading takes no lock: what is whole stays as it is. Appending holds `<path>.turn`, which the kernel frees with its
    holder, and beside it Optuna's `<path>.lock` for other programs (the dashboard).

    Args:
        path: the journal; made where it does not exist.
        reads_only: nothing is made or mended.

    Raises:
        JournalError: see there. OSError: it cannot be made or read.
    """

    def __init__(self, path: Path, reads_only: bool = False) -> None:
        self.path = path = path.absolute()  # Optuna's lock is a link to it
        self._starts = [0]  # of every record read so far, and of the next
        self._turn = FileLock(f"{path}.turn", timeout=_LOCK_SECONDS, poll_interval=0.005)
        self._foreign = JournalFileSymlinkLock(str(path), grace_period=_FOREIGN_SECONDS)
        if path.exists():
            self._check_kind()
        if reads_only:
            return
        if not path.exists():
            path.touch()
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        with self.locked(), path.open("r+b") as file:
            self._mend(file.fileno(), 0)

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Every whole record from this number on."""
        del self._starts[log_number_from + 1 :]  # read, but not taken in: its reader stopped at one of them
        for last in (False, True):
            with _as_outage():
                sound, _ = _sound(self._read(self._starts[-1]))
            records = [_record(line) for line in sound]
            if last or None not in records:
                break
            time.sleep(_PAUSE_SECONDS)  # a torn end was cut off and written over while this was reading
        for number, (line, record) in enumerate(zip(sound, records, strict=True), start=log_number_from + 1):
            if record is None:
                raise self._damaged(number, line)
            self._starts.append(self._starts[-1] + len(line))
        return [record for record in records if record is not None]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records; they are on the disk when it returns, and not at all when it raises."""
        lines = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        with _as_outage(), self.locked():
            file = os.open(self.path, os.O_RDWR)  # never made anew: records without those before mean nothing
            try:
                end = self._mend(file, self._starts[-1])
                try:
                    _write(file, lines, end)
                except OSError:
                    os.ftruncate(file, end)
                    raise
            finally:
                os.close(file)

    def _read(self, start: int) -> bytes:
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < start:
                raise JournalError(f"{self.path} became shorter while it was in use; start the study's commands again")
            file.seek(start)
            return file.read()

    def _check_kind(self) -> None:
        with self.path.open("rb") as file:
            head = file.read(len(_BEGINNING))
        if head.lstrip(b"\0") == head and not _BEGINNING.startswith(head):
            raise JournalError(f"{self.path} is no journal of Optuna's; give a new file, or the right one")

    def _damaged(self, number: int, line: bytes) -> JournalError:
        return JournalError(
            f"{self.path}: line {number} is damaged ({len(line)} bytes, no record), and what follows needs it. "
            f"Restore a copy; or go on from before it (finished units are kept): "
            f"head -n {number - 1} {self.path} > sound && mv sound {self.path}"
        )

    def _mend(self, file: int, start: int) -> int:
        """Make the file end with a whole line, where this was read up to byte `start`. Returns its size."""
        text = self._read(start)
        sound, rest = _sound(text)
        end = start + sum(map(len, sound))
        if not rest:
            return end
        if _record(rest) is not None:  # all but the end of its line
            _write(file, b"\n", end + len(rest))
            return end + len(rest) + 1
        kept = Path(f"{self.path}.torn")
        with kept.open("ab") as copy:
            copy.write(rest + b"\n")
        os.ftruncate(file, end)
        os.fsync(file)
        print(
            f"warning: {self.path}: its last record was torn ({len(rest)} bytes, now in {kept.name}) and is left out; "
            "all before it is whole",
            file=sys.stderr,
            flush=True,
        )
        return end

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes meanwhile. A lock that a dead process left is waited for 5 seconds at most, and said."""
        with self._turn:
            self._foreign.acquire()
            try:
                yield
            finally:
                with contextlib.suppress(RuntimeError):  # another program thought it stale
                    self._foreign.release()


def _sound(text: bytes) -> tuple[list[bytes], bytes]:
    """(lines up to the last one that is a record, what is behind it)."""
    *whole, torn = text.split(b"\n")
    lines = [*(line + b"\n" for line in whole), torn]
    count = len(lines)
    while count and not (lines[count - 1].endswith(b"\n") and _record(lines[count - 1]) is not None):
        count -= 1
    return lines[:count], b"".join(lines[count:])


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is none.

    One behind a torn one in the same line counts: Optuna's own backend left such lines, and nobody could read them.
    """
    start = 0 if line.startswith(_BEGINNING) else -1
    while True:
        try:
            record = json.loads(line[start:].decode()) if start >= 0 else None
        except ValueError:
            record = None
        if isinstance(record, dict) and {"op_code", "worker_id"} <= record.keys():
            return record
        if (start := line.find(_BEGINNING, start + 1)) < 0:
            return None


def _write(file: int, data: bytes, at: int) -> None:
    """Write and sync."""
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
    os.fsync(file)


@contextlib.contextmanager
def _as_outage() -> Iterator[None]:
    """A disk that is full or away, and a lock that is not let go of, are outages, as those of a database are."""
    try:
        yield
    except OSError as error:
        raise StorageInternalError(f"the journal does not answer: {error}") from error
