"""What a data set is once it has been read: lists of images with a person and a camera."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One person image.

    Attributes:
        path: absolute path of the image file.
        pid: person number as the data set publishes it. It is unique within a part (train, or query and gallery
            together), not across them: MSMT17 numbers both parts from 0.
        camid: camera number counted from 0, that is the published number minus 1. Equal numbers mean the same camera
            within one data set; nothing else may be read into them.
    """

    path: Path
    pid: int
    camid: int


@dataclass(frozen=True)
class Split:
    """One division of a small data set for testing: results are averaged over several.

    Attributes:
        query, gallery: test images.
        single_gallery_shot: scored by CUHK03's old protocol, see `lda.ranking.evaluate_ranking`.
    """

    query: tuple[ImageRecord, ...]
    gallery: tuple[ImageRecord, ...]
    single_gallery_shot: bool = False


@dataclass(frozen=True)
class ReidDataset:
    """One data set as its release divides it.

    Attributes:
        name: name in code, that of its file in `lda/data/sets/`.
        root: folder in which it was found.
        train: images of the training persons.
        query: test images that ask.
        gallery: test images that are searched; may hold distractors.
        splits: the divisions of a data set that has several; query and gallery are those of the first. Else empty.
        version: which of several releases or crops this is ("MSMT17_V2", "labeled"); printed with every result.
        standin: True for generated images that only imitate the data set.
        data_hash: hash of everything that was read; of the pixels for the stand-in, else of names, bytes and lists, see
            `lda.data.survey.content_hash`.
        test_hash: the same of query and gallery alone, whatever else was read.
        distractor_pids: pids in the gallery that are nobody (background boxes); they never train.
    """

    name: str
    root: Path
    train: tuple[ImageRecord, ...]
    query: tuple[ImageRecord, ...]
    gallery: tuple[ImageRecord, ...]
    version: str
    standin: bool = False
    data_hash: str = ""
    test_hash: str = ""
    distractor_pids: frozenset[int] = frozenset()
    splits: tuple[Split, ...] = ()

    @property
    def test_splits(self) -> tuple[Split, ...]:
        """Every query and gallery to be tested; empty for a data set that is only trained on."""
        if self.splits or not self.query:
            return self.splits
        return (Split(self.query, self.gallery),)
