"""What reading and showing images can be told: settings that this package owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lda.settings import Range, Settings, setting


@dataclass(frozen=True, kw_only=True)
class DataOptions(Settings):
    """Which of several releases or divisions of a data set is read.

    A data set's file says which of these it looks at, and what they choose (`lda.data.catalogue.Facts.options`).
    """

    cuhk03_boxes: Literal["labeled", "detected"] = setting(
        "labeled", "CUHK03 crops; papers differ, so it is printed with every result", "META, ACL, ReNorm"
    )
    cuhk03_protocol: Literal["new", "classic"] = setting(
        "new", "of CUHK03 as the target; classic: 20 splits, CMC on one gallery image per person", "field", test=True
    )
    msmt17_train: Literal["train", "train+val"] = setting(
        "train", "MSMT17 training list; train+val joins both", "META, ACL"
    )


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Images of a step: their size, how many, and their augmentation."""

    image_height: int = setting(256, "pixels", "field", low=16, high=1024, standin=64)
    image_width: int = setting(128, "pixels", "field", low=8, high=1024, standin=32)
    ids_per_batch: int = setting(
        16, "P: identities in a batch", "ReNorm, META", low=2, high=1024, standin=8, search=Range(4, 32, log=True)
    )
    images_per_id: int = setting(
        4, "K: images of an identity in a batch", "ReNorm, META", low=2, high=64, standin=4, search=Range(2, 8)
    )
    flip_probability: float = setting(0.5, "horizontal flip", "field", low=0.0, high=1.0, search=Range(0.0, 0.5))
    pad: int = setting(
        10, "pixels of padding before the random crop", "field", low=0, high=128, standin=3, search=Range(0, 20)
    )
    jitter_probability: float = setting(
        0.5, "colour jitter: brightness 0.15, contrast 0.1", "ReNorm, META", low=0.0, high=1.0, search=Range(0.0, 1.0)
    )
    auto_augment_probability: float = setting(
        0.1, "ImageNet AutoAugment", "ReNorm, META", low=0.0, high=1.0, standin=0.0, search=Range(0.0, 0.5)
    )
