"""A trained method as a map from images to vectors, outside of a data set: what embedding, search and export share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lda.checkpoint import load_method, read_checkpoint
from lda.config import Config
from lda.data.decode import decode
from lda.device import choose_device
from lda.errors import UsageError
from lda.features import Model
from lda.files import sha256_of
from lda.groups import Machine
from lda.settings import settings_of
from lda.testing import encodings_of, test_config


class Embedder:
    """A checkpoint's method under test settings, ready to embed.

    Attributes:
        config: the settings.
        method: in evaluation mode, on `device`.
        model: what its features come from.

    Raises UsageError for a method whose images have no vectors, or whose vectors depend on a whole target, and for
    settings that change no vector.
    """

    def __init__(self, checkpoint: Path, changes: Mapping[str, Any]) -> None:
        read = read_checkpoint(checkpoint)
        self.config = test_config(read.config, read.config.run.target, changes)
        own = embedding_settings(self.config)
        for key in changes:
            if key not in (*own, *settings_of(Machine)):
                raise UsageError(f"--set {key}: changes no features; these settings do: {', '.join(own)}")
        self.device = choose_device(self.config.machine)
        self.method = load_method(read, self.config).to(self.device)
        self._check()
        self.image_size = self.config.batches.image_height, self.config.batches.image_width
        self.model = Model(
            training=read.training,
            checkpoint_sha256=sha256_of(checkpoint),
            method=self.config.method.name,
            inference=self.method.inference,
            settings={key: self.config.value(key) for key in own},
            flip_test=self.config.test.flip_test,
            image_size=self.image_size,
        )

    @property
    def name(self) -> str:
        """Method, inference and training, in print."""
        parts = (self.method.label, self.model.inference, "flip test" if self.model.flip_test else "")
        return f"{', '.join(filter(None, parts))} (training {self.model.training})"

    def _check(self) -> None:
        title = self.method.title
        if self.method.scorer().pair_cost is not None:
            raise UsageError(f"method: {title} compares images pair by pair; an image has no features of its own")
        if self.method.looks_at_target:
            raise UsageError(
                f"method: {title} ({self.method.inference}) adapts to all images of a target's camera; an image has no "
                "features of its own. Choose another inference by --set, or a checkpoint without"
            )

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 RGB (B, 3, height, width) -> (B, D), as an evaluation with these settings has them."""
        found = encodings_of(self.method, torch.from_numpy(images), self.config.test, self.device)
        return np.asarray(found.cpu().numpy(), np.float32)

    def decoded(self, paths: Sequence[Path], pool: Executor) -> tuple[NDArray[np.uint8], list[int], dict[int, str]]:
        """The images (B, 3, height, width) of those files that are sound, their positions among `paths`, and of every
        other position what is wrong with the file."""
        found = list(pool.map(self._decoded, paths))
        bad = {place: image for place, image in enumerate(found) if isinstance(image, str)}
        good = [image for image in found if not isinstance(image, str)]
        images = np.stack(good) if good else np.empty((0, 3, *self.image_size), np.uint8)
        return images, [place for place in range(len(paths)) if place not in bad], bad

    def _decoded(self, path: Path) -> NDArray[np.uint8] | str:
        try:
            return decode(path, *self.image_size)
        except UsageError as error:
            return str(error)


def embedding_settings(config: Config) -> list[str]:
    """The settings of the test that change a feature."""
    own = settings_of(type(config.method.settings))
    return ["flip_test", *(key for key, known in own.items() if known.test)]
