"""Packed images: every image of a list decoded and resized once, side by side in one memory-mapped file.

Decoding is the larger part of reading a batch, and every trial would repeat it. The file is shared by all workers and
runs on a machine through the page cache. Beside `NAME.u8` lies its manifest `NAME.json`: height, width, the sources
with size and modification time, and the SHA-256 of every chunk; a source that changed leads to a new file. NAME comes
from the paths and the size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
from numpy.typing import NDArray

from lda.command import cores, progress
from lda.data.decode import Chunk, write_chunk
from lda.data.processes import map_processes
from lda.data.records import ImageRecord
from lda.errors import UsageError

if TYPE_CHECKING:  # packing needs no torch, and loading it takes longer than packing a small set
    from torch import Tensor

FORMAT = 1
CHUNK = 64  # images a process decodes at a time
ALONE = 4096  # up to so many images, starting processes costs more than it saves
ANNOUNCED = 64 * 2**20  # bytes from which a packed file is worth a line on the screen
SPARE = 64 * 2**20  # bytes of the disk that packing leaves free

_Sources = list[list[Any]]  # [path, size, modification time in ns]


class PackedImages:
    """N images of one size. Opens its file on first use, in every process anew, so it travels to loader workers.

    Attributes:
        path: the packed file.
        shape: (N, 3, height, width).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self.path = path
        self.shape = shape
        self._array: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shape": self.shape, "_array": None}

    @property
    def array(self) -> NDArray[np.uint8]:
        """(N, 3, height, width) uint8, read-only, in the page cache rather than in this process."""
        if self._array is None:
            self._array = np.asarray(np.memmap(self.path, np.uint8, "r", shape=self.shape))
        return self._array

    def batch(self, indices: NDArray[np.int64] | Sequence[int]) -> Tensor:
        """The images at `indices` (B,) as a new uint8 tensor (B, 3, height, width)."""
        import torch

        return torch.from_numpy(self.array[np.asarray(indices, dtype=np.int64)])


def pack(records: Sequence[ImageRecord], height: int, width: int, cache_dir: Path) -> PackedImages:
    """Pack the images of `records`, in their order, to (height, width) pixels below `cache_dir`, or find them packed.

    Safe when several processes start at once: one packs, the others wait and use its file.

    Raises:
        UsageError: a source is missing or damaged (named), the disk has too little room, the cache cannot be written.
    """
    if not records:
        raise UsageError("no images to pack")
    sources = _sources([record.path for record in records])
    shape = (len(records), 3, height, width)
    name = hashlib.sha256("\n".join(source[0] for source in sources).encode()).hexdigest()[:24]
    path = cache_dir / "packed" / f"{name}-{height}x{width}.u8"
    if not _is_current(path, sources, shape):
        with _locked(path):
            if not _is_current(path, sources, shape):  # nobody else has made it meanwhile
                _write(path, sources, shape)
    return PackedImages(path, shape)


def verify(path: Path) -> bool:
    """True if a packed file's bytes are those its manifest states."""
    manifest = _manifest(path)
    if manifest is None:
        return False
    size = CHUNK * 3 * manifest["height"] * manifest["width"]
    with path.open("rb") as file:
        digests = [hashlib.sha256(content).hexdigest() for content in iter(lambda: file.read(size), b"")]
    return bool(digests == manifest["chunks"])


def _sources(paths: Sequence[Path]) -> _Sources:
    sources = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UsageError(f"{path}: cannot read this image ({error.strerror})") from None
        sources.append([str(path), stat.st_size, stat.st_mtime_ns])
    return sources


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a packed file; None if there is none or it cannot be read."""
    try:
        manifest: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return manifest if manifest["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_current(path: Path, sources: _Sources, shape: tuple[int, int, int, int]) -> bool:
    manifest = _manifest(path)
    if manifest is None or manifest.get("sources") != sources:
        return False
    return path.is_file() and bool(path.stat().st_size == np.prod(shape))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise UsageError(
            f"{path.parent}: cannot write packed images here ({error.strerror}); set LDA_CACHE_DIR to another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, sources: _Sources, shape: tuple[int, int, int, int]) -> None:
    """Write packed file and manifest, each under a temporary name first; the caller holds the lock."""
    count, _, height, width = shape
    size = int(np.prod(shape))
    for left_over in path.parent.glob(f".{path.name}.*"):  # of a process that was killed: nobody else writes now
        left_over.unlink()
    _check_room(path, size, shape)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    title = f"packing {count:,} images of {height} x {width} ({size / 2**30:.2f} GiB) into {path.parent}"
    chunks = (
        Chunk(partial, start, tuple(Path(source[0]) for source in sources[start : start + CHUNK]), height, width)
        for start in range(0, count, CHUNK)
    )
    digests = []
    try:
        with partial.open("wb") as file:
            file.truncate(size)
        with progress(title, count, quiet=size < ANNOUNCED) as advance:
            for done, digest in map_processes(write_chunk, chunks, 1 if count <= ALONE else cores()):
                digests.append(digest)
                advance(done)
        manifest = {"format": FORMAT, "height": height, "width": width, "sources": sources, "chunks": digests}
        os.replace(partial, path)
        partial.write_text(json.dumps(manifest), encoding="utf-8")
        os.replace(partial, path.with_suffix(".json"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); set LDA_CACHE_DIR to another folder") from None
    finally:
        partial.unlink(missing_ok=True)


def _check_room(path: Path, size: int, shape: tuple[int, int, int, int]) -> None:
    free = shutil.disk_usage(path.parent).free
    if size + SPARE > free:
        raise UsageError(
            f"packing {shape[0]:,} images of {shape[2]} x {shape[3]} needs {size / 2**30:.2f} GiB in {path.parent}, "
            f"{free / 2**30:.2f} GiB are free: make room or set LDA_CACHE_DIR to a folder on a larger disk"
        )
