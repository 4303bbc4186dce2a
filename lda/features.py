"""The file of features: what `python -m lda.embed` leaves and `python -m lda.search` reads. No torch.

A .npz file that `numpy.load` reads without pickle:

    features           (N, D) float32, as the method's scorer takes them: to be compared by cosine, not of unit length
    paths              (N,) text; relative ones begin at `root`
    pid, camid, ...    (N,) the further columns of a CSV file
    skipped            (S,) text: images that could not be decoded, in no other array
    root               the folder
    training           the checkpoint's hash of what was learnt, see `lda.config`
    checkpoint_sha256  of the checkpoint's bytes: the model
    method             name of its file in lda/methods
    inference          the method's own test settings in print, "" where it has none
    settings           JSON: the settings by which images are embedded, `flip_test` and the method's own of the test
    flip_test          whether features of image and mirror image were added
    image_size         (2,) height and width in pixels
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lda.errors import FailedError, UsageError
from lda.files import atomic, damage_of_zip

NAMES = (
    *("features", "paths", "skipped", "root", "training", "checkpoint_sha256"),
    *("method", "inference", "settings", "flip_test", "image_size"),
)
"""The arrays that every file has; no column of a CSV file may be called so."""


@dataclass(frozen=True)
class Model:
    """What features come from: see the top of this file."""

    training: str
    checkpoint_sha256: str
    method: str
    inference: str
    settings: Mapping[str, Any]
    flip_test: bool
    image_size: tuple[int, int]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As they stand in the file."""
        return {name: np.array(value) for name, value in {**vars(self), "settings": json.dumps(self.settings)}.items()}


@dataclass(frozen=True)
class Features:
    """A file of features in memory: see the top of this file."""

    features: NDArray[np.float32]
    paths: NDArray[np.str_]
    root: Path
    model: Model


class FeatureFile:
    """A file of features that is being written: the rows go to the disk one batch after the other.

    Attributes:
        beside: the arrays that the file gets beside the features.
    """

    def __init__(self, rows: IO[bytes]) -> None:
        self._rows, self._shape = rows, (0, 0)
        self.beside: dict[str, NDArray[Any]] = {}

    def add(self, features: NDArray[np.float32]) -> None:
        """The next rows, (B, D)."""
        self._rows.write(features.tobytes())
        self._shape = (self._shape[0] + len(features), features.shape[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the file holds, the features memory-mapped. Raises FailedError where there are none."""
        if not self._shape[0]:
            raise FailedError("no image could be embedded; nothing is written")
        self._rows.flush()
        return {"features": np.memmap(self._rows, np.float32, "r", shape=self._shape), **self.beside}


@contextmanager
def written(path: Path) -> Iterator[FeatureFile]:
    """A file of features that appears whole at the end, or not at all. Memory does not grow with the images."""
    with atomic(path, "wb") as file, tempfile.TemporaryFile(dir=path.parent) as rows:
        features = FeatureFile(rows)
        yield features
        arrays: dict[str, Any] = features.arrays()
        np.savez(file, **arrays)


def read_features(path: Path) -> Features:
    """Raises UsageError for what is no whole file of features."""
    if damage := damage_of_zip(path):
        raise UsageError(f"{path}: expected a file that python -m lda.embed wrote: {damage}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in NAMES}
        told = {
            name: arrays[name].item() for name in ("training", "checkpoint_sha256", "method", "inference", "flip_test")
        }
        height, width = arrays["image_size"].tolist()
        model = Model(**told, settings=json.loads(arrays["settings"].item()), image_size=(height, width))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: expected a file that python -m lda.embed wrote: {error}") from None
    return Features(arrays["features"], arrays["paths"], Path(arrays["root"].item()), model)


def texts(values: Iterable[str]) -> NDArray[np.str_]:
    """(N,) text, also of none."""
    return np.array(list(values), np.str_)
