"""Read or decode every image of a data set once, and remember what was found by size and modification time.

The memory is one file per folder below the cache: `verified/KEY.json` of decoded images, `verified/KEY-bytes.json` of
digests alone. It may be lost or damaged: then the images are read again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image, UnidentifiedImageError

from lda.command import cores, progress
from lda.data.decode import open_rgb
from lda.data.making import alone, remove_left_over, unwritable
from lda.data.processes import map_processes
from lda.errors import UsageError
from lda.files import atomic

FORMAT = 1
CHUNK = 256  # images a process checks at a time
ALONE = 4096  # up to so many images, starting processes costs more than it saves
ANNOUNCED = 2000  # new files from which reading them is worth a line on the screen
SMALL = 8  # pixels: a shorter side shows nothing of a person
EXIF_ORIENTATION = 0x0112


_Found = TypeVar("_Found", "Check", "Digest")


@dataclass(frozen=True, slots=True)
class Check:
    """What one image file holds.

    Attributes:
        size, mtime_ns: of the file when it was checked.
        digest: SHA-256 of the file's bytes.
        width, height: pixels as stored.
        mode: colour mode as stored, "RGB" for nearly all.
        turned: EXIF data say that it is to be turned.
        problem: why it cannot be decoded, "" if it can.
    """

    size: int
    mtime_ns: int
    digest: str
    width: int
    height: int
    mode: str
    turned: bool
    problem: str


def check_image(path: Path) -> Check:
    """Decode one image file to its last pixel. Raises UsageError only if the file cannot be opened at all."""
    try:
        stat, content = path.stat(), path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    width, height, mode, turned, problem = 0, 0, "", False, ""
    try:
        with Image.open(path) as image:
            (width, height), mode = image.size, image.mode
            turned = image.getexif().get(EXIF_ORIENTATION, 1) != 1
        open_rgb(path)
    except UsageError as error:
        problem = str(error)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        problem = f"{path}: cannot be decoded ({'not an image' if content else 'it is empty'}); unpack or copy it again"
    digest = hashlib.sha256(content).hexdigest()
    return Check(stat.st_size, stat.st_mtime_ns, digest, width, height, mode, turned, problem)


def check_images(paths: Iterable[Path], cache_dir: Path, title: str) -> dict[Path, Check]:
    """Check images that are new or have changed since they were last checked; returns the checks of all.

    Results are kept in one file per folder below `cache_dir`/verified. Raises UsageError for a file that cannot be
    opened.
    """
    wanted = list(dict.fromkeys(paths))
    folder = os.path.commonpath([path.parent for path in wanted]) if wanted else ""
    memory = _Memory(cache_dir, folder, "", Check)
    checks, new = memory.known(wanted)
    if new:
        with alone(memory.path, f"checking {len(new):,} images of {title}"):
            checks, new = memory.known(wanted)  # somebody else may have looked meanwhile
            chunks = [new[start : start + CHUNK] for start in range(0, len(new), CHUNK)]
            with progress(f"{title}: decoding {len(new):,} images", len(new), quiet=len(new) <= CHUNK) as advance:
                done = map_processes(_check_chunk, chunks, 1 if len(new) <= ALONE else cores())
                for chunk, found in zip(chunks, done, strict=True):
                    checks.update(zip(chunk, found, strict=True))
                    advance(len(chunk))
            memory.add({path: checks[path] for path in new})
    return checks


@dataclass(frozen=True, slots=True)
class Digest:
    """SHA-256 of a file's bytes, and the file's size and time when they were read."""

    size: int
    mtime_ns: int
    digest: str


def byte_digests(paths: Iterable[Path], folder: Path, cache_dir: Path, title: str) -> dict[Path, str]:
    """SHA-256 of every file's bytes; a file that has not changed since it was last read is not read again.

    `folder`: the data set's own, whose memory it is. Raises UsageError for a file that cannot be read.
    """
    wanted = list(dict.fromkeys(paths))
    memory = _Memory(cache_dir, os.fspath(folder), "-bytes", Digest)
    found, new = memory.known(wanted)
    if new:
        with alone(memory.path, f"reading {len(new):,} images of {title}"):
            found, new = memory.known(wanted)
            read: dict[Path, Digest] = {}
            try:
                with progress(
                    f"{title}: reading {len(new):,} new files", len(new), quiet=len(new) <= ANNOUNCED
                ) as advance:
                    for path in new:  # one by one: Ctrl-C need not wait for threads that read
                        read[path] = _read(path)
                        advance(1)
            finally:
                memory.add(read)  # the next one goes on from here
            found |= read
    return {path: found[path].digest for path in wanted}


def _read(path: Path) -> Digest:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            return Digest(stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def _check_chunk(paths: Sequence[Path]) -> list[Check]:
    return [check_image(path) for path in paths]


class _Memory(Generic[_Found]):
    """What was found in the files of one folder, in a file of the cache."""

    def __init__(self, cache_dir: Path, folder: str, suffix: str, kind: type[_Found]) -> None:
        key = hashlib.sha256(folder.encode()).hexdigest()[:24]
        self.path = cache_dir / "verified" / f"{key}{suffix}.json"
        self._kind: type[_Found] = kind

    def known(self, wanted: Sequence[Path]) -> tuple[dict[Path, _Found], list[Path]]:
        """What is known of the wanted files that have not changed since, and the others."""
        known = self._read()
        found = {path: old for path in wanted if (old := known.get(str(path))) and _unchanged(path, old)}
        return found, [path for path in wanted if path not in found]

    def add(self, found: Mapping[Path, _Found]) -> None:
        """Keep more; the caller holds the lock of `path`."""
        content = {**self._read(), **{str(path): value for path, value in found.items()}}
        remove_left_over(self.path, f".{self.path.name}.")
        try:
            with atomic(self.path) as file:
                json.dump(
                    {"format": FORMAT, "checks": {key: dataclasses.astuple(value) for key, value in content.items()}},
                    file,
                )
        except OSError as error:
            raise unwritable(self.path, error) from None

    def _read(self) -> dict[str, _Found]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            checks = content["checks"] if content["format"] == FORMAT else {}
            return {path: self._kind(*values) for path, values in checks.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}  # nothing was found yet, or by another version, or it is damaged: look again


def _unchanged(path: Path, found: Check | Digest) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (found.size, found.mtime_ns)
