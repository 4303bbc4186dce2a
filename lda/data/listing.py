"""Any images, of no data set: those of a folder, or those that a CSV file names."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lda.data.survey import CLUTTER
from lda.errors import UsageError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files in a folder that are taken for images, in small letters."""

PATH = "path"
"""The column of a CSV file that names the image."""


@dataclass(frozen=True)
class ImageList:
    """N images.

    Attributes:
        root: folder that relative paths begin at.
        paths: of the images, as they are to be called.
        columns: what else is known of them: name -> (N,) int64, float64 or text.
        others: files of the folder that are no images by their names.
    """

    root: Path
    paths: Sequence[str]
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    others: int = 0


def list_images(place: Path) -> ImageList:
    """The images of a folder and of those below it, in natural order (2 before 10), paths relative to the folder; or
    the rows of a CSV file that has a column `path`, relative to the file's folder, and any other columns.

    In a folder the suffix says what is an image (`SUFFIXES`); hidden files and those of file managers count as nothing.
    Links are followed. Whether an image can be decoded is not looked at.

    Raises UsageError where there is no image, or what cannot be read.
    """
    return _of_folder(place) if place.is_dir() else _of_csv(place)


def natural(path: str) -> list[list[Any]]:
    """Sorts paths folder by folder, numbers in them by their value."""
    return [
        [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]
        for name in PurePath(path).parts
    ]


def _of_folder(folder: Path) -> ImageList:
    files = [str(Path(file).relative_to(folder)) for file in _files(folder)]
    found = [file for file in files if file.lower().endswith(SUFFIXES)]
    if not found:
        raise UsageError(f"{folder}: no image in it or below, {len(files)} other files; expected {', '.join(SUFFIXES)}")
    return ImageList(folder.resolve(), sorted(found, key=natural), others=len(files) - len(found))


def _files(folder: Path) -> Iterator[str]:
    seen = set()  # links may lead back

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_counts, folders))
        yield from (os.path.join(place, name) for name in names if _counts(name))


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in CLUTTER


def _of_csv(file: Path) -> ImageList:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.reader(lines, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file}: expected a folder of images or a CSV file in UTF-8: {error}") from None
    header, *rows = [row for row in rows if row] or [[]]
    if PATH not in header:
        raise UsageError(
            f"{file}: expected a column {PATH!r} in its first line, found: {', '.join(header) or 'nothing'}"
        )
    if "" in header or len(set(header)) < len(header):
        raise UsageError(f"{file}: every column needs a name of its own, found: {', '.join(map(repr, header))}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UsageError(f"{file}: row {number} has {len(row)} values, expected {len(header)}")
    if not rows:
        raise UsageError(f"{file}: names no image")
    values = dict(zip(header, zip(*rows, strict=True), strict=True))
    paths = values.pop(PATH)
    return ImageList(file.resolve().parent, paths, {name: _typed(column) for name, column in values.items()})


def _typed(values: Sequence[str]) -> NDArray[Any]:
    """(N,) int64 where all are whole numbers, float64 where all are numbers, else text."""
    if all(re.fullmatch(r"-?[0-9]{1,18}", value) for value in values):
        return np.array([int(value) for value in values])
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return np.array(values)
