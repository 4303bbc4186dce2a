"""From an image file to pixels. Imported by worker processes: no torch here."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lda.errors import UsageError


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive images of a packed file: `paths` go to positions `start`, `start + 1`, ... of `file`."""

    file: Path
    start: int
    paths: tuple[Path, ...]
    height: int
    width: int


def open_rgb(path: Path) -> Image.Image:
    """An image file as RGB, turned upright as its EXIF data say. Raises UsageError naming a file that is damaged."""
    try:
        with Image.open(path) as image:
            upright: Image.Image = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... for damaged files
        if isinstance(error, FileNotFoundError):
            raise UsageError(f"{path}: no such image file") from None
        reason = "it is empty" if _is_empty(path) else str(error) or type(error).__name__
        raise UsageError(f"{path}: cannot be decoded ({reason}); unpack or copy it again") from None


def decode(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """(3, height, width) uint8 RGB, resized with antialiased bicubic interpolation as the field's tools do.

    Raises UsageError naming the file if it is missing or damaged.
    """
    image = open_rgb(path).resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def write_chunk(chunk: Chunk) -> tuple[int, str]:
    """Decode a chunk into its place of the packed file. Returns (images, SHA-256 of their bytes)."""
    images: NDArray[Any] = np.stack([decode(path, chunk.height, chunk.width) for path in chunk.paths])
    content = images.tobytes()
    descriptor = os.open(chunk.file, os.O_WRONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "wb") as file:  # of a descriptor: it truncates nothing
        file.seek(chunk.start * 3 * chunk.height * chunk.width)
        file.write(content)
    return len(images), hashlib.sha256(content).hexdigest()


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False
