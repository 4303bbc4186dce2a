"""Packed images: every image of a list decoded and resized once, side by side in one memory-mapped file.

Decoding is the larger part of reading a batch, and every trial would repeat it. The file is shared by all workers and
runs on a machine through the page cache. Beside `NAME.u8` lies its manifest `NAME.json`: height, width, the sources
with size and modification time, and the SHA-256 of every chunk; a source that changed leads to a new file. NAME comes
from the paths and the size. A process compares the file with its manifest before it reads it for the first time, and
packs a damaged one again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lda.command import cores, progress
from lda.data.decode import Chunk, write_chunk
from lda.data.intact import Stamp, parts_hold, stamp
from lda.data.making import alone, new_file, publish_file, remove_left_over
from lda.data.processes import map_processes
from lda.data.records import ImageRecord
from lda.errors import FailedError, UsageError, warn
from lda.files import atomic

if TYPE_CHECKING:  # packing needs no torch, and loading it takes longer than packing a small set
    from torch import Tensor

FORMAT = 1
CHUNK = 64  # images a process decodes at a time
ALONE = 4096  # up to so many images, starting processes costs more than it saves
ANNOUNCED = 64 * 2**20  # bytes from which a packed file is worth a line on the screen
SPARE = 64 * 2**20  # bytes of the disk that packing leaves free

_KINDS = {"height": int, "width": int, "sources": list, "chunks": list}  # of what a manifest states

_Sources = list[list[Any]]  # [path, size, modification time in ns]


class PackedImages:
    """N images of one size. Opens its file on first use, in every process anew, so it travels to loader workers.

    Attributes:
        path: the packed file.
        shape: (N, 3, height, width).
        digest: of its chunks' SHA-256.
        sound: state of the file when it was found to have that digest; None: nobody has looked.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int, int], digest: str = "", sound: Stamp | None = None
    ) -> None:
        self.path = path
        self.shape = shape
        self.digest = digest
        self.sound = sound
        self._array: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_array": None}

    @property
    def array(self) -> NDArray[np.uint8]:
        """(N, 3, height, width) uint8, read-only, in the page cache rather than in this process.

        Raises FailedError if other images have been packed under this name since these were found sound.
        """
        if self._array is None:
            if self.sound and stamp(self.path) != self.sound and _digest_of(_sound_chunks(self.path)) != self.digest:
                raise FailedError(f"{self.path}: packed anew while it was in use, for its source images changed")
            self._array = np.asarray(np.memmap(self.path, np.uint8, "r", shape=self.shape))
        return self._array

    def batch(self, indices: NDArray[np.int64] | Sequence[int]) -> Tensor:
        """The images at `indices` (B,) as a new uint8 tensor (B, 3, height, width)."""
        import torch

        return torch.from_numpy(self.array[np.asarray(indices, dtype=np.int64)])


def pack(records: Sequence[ImageRecord], height: int, width: int, cache_dir: Path) -> PackedImages:
    """Pack the images of `records`, in their order, to (height, width) pixels below `cache_dir`, or find them packed.

    Safe when several processes and machines start at once: one packs, the others wait and use its file. A packed file
    that is damaged is packed again, with a warning.

    Raises:
        UsageError: a source is missing or damaged (named), the disk has too little room, the cache cannot be written.
    """
    if not records:
        raise UsageError("no images to pack")
    sources = _sources([record.path for record in records])
    shape = (len(records), 3, height, width)
    name = hashlib.sha256("\n".join(source[0] for source in sources).encode()).hexdigest()[:24]
    path = cache_dir / "packed" / f"{name}-{height}x{width}.u8"
    found = _find(path, sources, shape)
    if isinstance(found, PackedImages):
        return found
    with alone(path, f"packing {len(records):,} images"):
        found = _find(path, sources, shape)  # somebody else may have made it meanwhile
        if isinstance(found, PackedImages):
            return found
        if found:
            warn(f"{path}: {found}; packing the images again")
        return _write(path, sources, shape)


def verify(path: Path) -> bool:
    """True if a packed file's bytes are those its manifest states."""
    return bool(_sound_chunks(path))


def _find(path: Path, sources: _Sources, shape: tuple[int, int, int, int]) -> PackedImages | str:
    """The packed images if they are current and sound; else why they are damaged, "" if they are only not there."""
    try:
        manifest = _manifest(path)
        if manifest is None or (manifest["sources"], manifest["height"], manifest["width"]) != (sources, *shape[2:]):
            return ""
        now = stamp(path)
        if now[2] != np.prod(shape):
            return f"holds {now[2]:,} bytes instead of {np.prod(shape):,}"
        if not parts_hold(path, _chunk_bytes(manifest), manifest["chunks"]):
            return "does not hold what was packed"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return PackedImages(path, shape, _digest_of(manifest["chunks"]), now)


def _sound_chunks(path: Path) -> list[str]:
    """The chunks' digests if the file holds what they say, else none."""
    try:
        manifest = _manifest(path)
        sound = manifest is not None and parts_hold(path, _chunk_bytes(manifest), manifest["chunks"])
        return manifest["chunks"] if manifest and sound else []
    except (OSError, ValueError):
        return []


def _chunk_bytes(manifest: dict[str, Any]) -> int:
    return CHUNK * 3 * int(manifest["height"]) * int(manifest["width"])


def _digest_of(chunks: list[str]) -> str:
    return hashlib.sha256("".join(chunks).encode()).hexdigest()


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
    """The manifest of a packed file; None if there is none of this version. Raises ValueError if it is damaged."""
    try:
        manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return None
        whole = all(isinstance(manifest[key], kind) for key, kind in _KINDS.items())
        if (
            whole
            and min(manifest["height"], manifest["width"]) > 0
            and all(isinstance(x, str) for x in manifest["chunks"])
        ):
            return dict(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ValueError("its manifest is damaged")


def _write(path: Path, sources: _Sources, shape: tuple[int, int, int, int]) -> PackedImages:
    """Write packed file and manifest, each under a temporary name first; the caller holds the lock."""
    count, _, height, width = shape
    size = int(np.prod(shape))
    remove_left_over(path, f".{path.name}.", f".{path.stem}.json.")
    _check_room(path, size, shape)
    title = f"packing {count:,} images of {height} x {width} ({size / 2**30:.2f} GiB) into {path.parent}"
    try:
        with new_file(path) as (descriptor, partial):
            os.truncate(descriptor, size)
            digests = _write_chunks(partial, sources, shape, title)
            publish_file(descriptor, partial, path)
        manifest = {"format": FORMAT, "height": height, "width": width, "sources": sources, "chunks": digests}
        with atomic(path.with_suffix(".json")) as file:
            json.dump(manifest, file)
        return PackedImages(path, shape, _digest_of(digests), stamp(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); set LDA_CACHE_DIR to another folder") from None


def _write_chunks(partial: Path, sources: _Sources, shape: tuple[int, int, int, int], title: str) -> list[str]:
    count, _, height, width = shape
    chunks = (
        Chunk(partial, start, tuple(Path(source[0]) for source in sources[start : start + CHUNK]), height, width)
        for start in range(0, count, CHUNK)
    )
    digests = []
    with progress(title, count, quiet=count * 3 * height * width < ANNOUNCED) as advance:
        for done, digest in map_processes(write_chunk, chunks, 1 if count <= ALONE else cores()):
            digests.append(digest)
            advance(done)
    return digests


def _check_room(path: Path, size: int, shape: tuple[int, int, int, int]) -> None:
    free = shutil.disk_usage(path.parent).free
    if size + SPARE > free:
        raise UsageError(
            f"packing {shape[0]:,} images of {shape[2]} x {shape[3]} needs {size / 2**30:.2f} GiB in {path.parent}, "
            f"{free / 2**30:.2f} GiB are free: make room or set LDA_CACHE_DIR to a folder on a larger disk"
        )
