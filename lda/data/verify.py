"""Decode every image of a data set once, with all cores, and remember the result by size and modification time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lda.command import cores, progress
from lda.data.decode import open_rgb
from lda.data.processes import map_processes
from lda.errors import UsageError

FORMAT = 1
CHUNK = 256  # images a process checks at a time
ALONE = 4096  # up to so many images, starting processes costs more than it saves
SMALL = 8  # pixels: a shorter side shows nothing of a person
EXIF_ORIENTATION = 0x0112


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
    memory = cache_dir / "verified" / f"{hashlib.sha256(folder.encode()).hexdigest()[:24]}.json"
    known = _remembered(memory)
    checks = {path: check for path in wanted if (check := known.get(str(path))) and _unchanged(path, check)}
    new = [path for path in wanted if path not in checks]
    if new:
        chunks = [new[start : start + CHUNK] for start in range(0, len(new), CHUNK)]
        with progress(f"{title}: decoding {len(new):,} images", len(new), quiet=len(new) <= CHUNK) as advance:
            done = map_processes(_check_chunk, chunks, 1 if len(new) <= ALONE else cores())
            for chunk, found in zip(chunks, done, strict=True):
                checks.update(zip(chunk, found, strict=True))
                advance(len(chunk))
        _remember(memory, {**known, **{str(path): checks[path] for path in new}})
    return checks


def _check_chunk(paths: Sequence[Path]) -> list[Check]:
    return [check_image(path) for path in paths]


def _unchanged(path: Path, check: Check) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (check.size, check.mtime_ns)


def _remembered(memory: Path) -> dict[str, Check]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
        checks = content["checks"] if content["format"] == FORMAT else {}
        return {path: Check(*values) for path, values in checks.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # never checked, or by another version: check again


def _remember(memory: Path, checks: dict[str, Check]) -> None:
    content = {"format": FORMAT, "checks": {path: dataclasses.astuple(check) for path, check in checks.items()}}
    partial = memory.with_suffix(f".{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(memory)
    except OSError as error:
        raise UsageError(
            f"{memory}: cannot be written ({error.strerror}); set LDA_CACHE_DIR to another folder"
        ) from None
