"""One image of the stand-in: who is on it, where and when, as the bytes of its file.

Every image is drawn from a generator of its own, keyed by (seed, data set, person, moment), so one seed gives the same
decoded pixels on any number of processes.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from lda.data.standin.domains import DOMAINS, sample_person
from lda.data.standin.layouts import LAYOUTS, Plan, Shot, pixel_factor
from lda.data.standin.pedestrians import Person
from lda.data.standin.scenes import camera_of, photograph, stable_rng

Chunk = tuple[str, tuple[Shot, ...]]
"""A data set and some of its images: what a process draws at a time."""


def plans(scale: str, seed: int, names: Iterable[str] = tuple(LAYOUTS)) -> dict[str, Plan]:
    """Data set -> its images, files and counts, before anything is drawn."""
    return {name: LAYOUTS[name](scale, stable_rng(seed, _key(name), 5)) for name in names}


@functools.lru_cache(maxsize=4096)
def person_of(name: str, index: int, seed: int) -> Person:
    """Person `index` of a data set; no person is in two data sets."""
    return sample_person(DOMAINS[name].wardrobe, stable_rng(seed, _key(name), 0, index))


def draw_shot(name: str, shot: Shot, scale: str, seed: int) -> bytes:
    """The image file of one shot: JPEG, BMP or PNG by its path."""
    moment = stable_rng(seed, _key(name), 3, shot.person, shot.take)
    boxing = stable_rng(seed, _key(name), 4, shot.person, shot.take, round(10 * shot.box.error))
    person = person_of(name, shot.person, seed)
    pixels = photograph(name, shot.camera, person, moment, shot.box, boxing, pixel_factor(name, scale), seed)
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if shot.path.endswith((".jpg", ".jpeg")):
        image.save(file, "JPEG", quality=camera_of(name, shot.camera, seed).quality)
    elif shot.path.endswith(".bmp"):
        image.save(file, "BMP")
    else:
        image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _key(name: str) -> int:
    """A number for a data set's name, the same in every process (Python's hash() is not)."""
    return int.from_bytes(name.encode(), "big")


def draw_chunk(chunk: Chunk, root: Path, scale: str, seed: int) -> dict[str, str]:
    """Draws and writes some images; returns path -> digest of the decoded pixels."""
    name, shots = chunk
    digests = {}
    for shot in shots:
        file = draw_shot(name, shot, scale, seed)
        (root / shot.path).write_bytes(file)
        digests[shot.path] = pixel_digest(file)
    return digests


def pixel_digest(file: bytes) -> str:
    """SHA-256 of an image file's size and decoded RGB pixels."""
    with Image.open(io.BytesIO(file)) as image:
        return hashlib.sha256(f"{image.size}".encode() + np.asarray(image.convert("RGB")).tobytes()).hexdigest()
