"""What trained runs find in the gallery of their target: AP of every query, ranked lists, activation maps.

Ranking is `lda.testing`'s, so a list explains the mAP of its run to the image. Shapes: Q queries, G gallery images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lda.checkpoint import Checkpoint, load_method, read_checkpoint
from lda.data.cache import check_cache
from lda.data.options import DataOptions
from lda.data.records import ImageRecord
from lda.data.sources import EvaluationSet, Target, evaluation_splits
from lda.data.standin.tree import ensure_standin
from lda.device import choose_device, memory_errors
from lda.errors import UsageError
from lda.groups import Test
from lda.ranking import GalleryOrder
from lda.runs import UnitFolder, print_method
from lda.testing import Evaluator, check_target, chosen_splits


class Retrieval:
    """A trained run on one query and gallery, whose images it encodes once.

    Attributes:
        name: the run's folder below the one that it lies in.
        label: the method in print, its inference, the seed, and how far it was trained if not to its end.
        split: query and gallery; number: its place among the num_splits of the target, from 0.
        average_precision: the formula; data: "stand-in" or "real"; content: hash of the images.
        mAP, rank1: fractions.
        precisions: (Q,) AP of every query; nan for one that has no match in the gallery.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, target: Target, split: EvaluationSet) -> None:
        self.number, self.num_splits = target.splits.index(split), len(target.splits)
        config = checkpoint.config.replace(device="auto")  # it may have been trained on another machine's
        device = choose_device(config.machine)
        method = load_method(checkpoint, config).to(device)
        check_target(method, [split])
        parts = [print_method(method.label, method.reconstructed, method.looks_at_target), method.inference]
        parts += [f"seed {config.run.seed}"]
        parts += [] if checkpoint.complete else [f"step {checkpoint.step} of {config.schedule.total_steps}"]
        self.name, self.label = "/".join(folder.resolve().parts[-2:]), ", ".join(filter(None, parts))
        self.split, self.data, self.content = split, target.kind, target.content
        self.average_precision = config.test.average_precision
        self._method, self._evaluator = method, Evaluator([split], config, device)
        with memory_errors(device):
            self._encodings, self._scorer = self._evaluator.encoded(method)
            ranking = self._evaluator.ranking(split, self._encodings, self._scorer)
        self.mAP, self.rank1 = ranking.mAP, ranking.rank1
        self.precisions: NDArray[np.float64] = np.array(ranking.average_precisions)

    def order(self, queries: Sequence[int]) -> GalleryOrder:
        """The gallery as it is ranked for some queries, given by position: see `lda.ranking.GalleryOrder`."""
        return self._evaluator.order(self.split, queries, self._encodings, self._scorer)

    def activation_maps(self, records: Sequence[ImageRecord]) -> dict[str, NDArray[np.float32]]:
        """Path through the network -> (N, h, w) of N images of the split, see `lda.methods.base.Method`; {} where the
        method shows none."""
        maps = self._evaluator.activation_maps(self._method, records)
        return {path: of_path.numpy() for path, of_path in maps.items()}


def open_retrievals(folders: Sequence[Path], data_root: Path | None, split: int | None) -> list[Retrieval]:
    """The runs of some folders on the target that they have in common; without `data_root`, the stand-in's.

    split: of a target that has several; None: the one that the runs were tested on, of those tested on all the first.

    Raises UsageError for a folder without a checkpoint, and for runs whose target, images, split or formula of AP
    differ, or that were tested on other images than are there.
    """
    check_cache()
    checkpoints = {folder: read_checkpoint(UnitFolder(folder).checkpoint) for folder in folders}
    configs = {folder: checkpoint.config for folder, checkpoint in checkpoints.items()}
    if split is not None:
        configs = {folder: config.replace(test_split=split) for folder, config in configs.items()}
    _check_alike("target", {folder: config.run.target for folder, config in configs.items()})
    _check_alike("test_split", {folder: config.test.test_split for folder, config in configs.items()})
    _check_alike("average_precision", {folder: config.test.average_precision for folder, config in configs.items()})

    for folder, config in configs.items():
        if config.test.reranking != "none":
            raise UsageError(
                f"{folder}: was tested with re-ranking, whose lists are not those of the network's features"
            )

    data_root = data_root or ensure_standin()
    read: dict[DataOptions, Target] = {}
    for config in configs.values():
        if config.data not in read:
            read[config.data] = evaluation_splits(config.run.target, data_root, config.data)
    targets = {folder: read[config.data] for folder, config in configs.items()}
    _check_alike("query and gallery", {folder: _images(target) for folder, target in targets.items()})
    for folder, target in targets.items():
        _check_tested(folder, target, data_root)
    test: Test = next(iter(configs.values())).test
    return [
        Retrieval(folder, checkpoints[folder], target, chosen_splits(target.splits, test)[0])
        for folder, target in targets.items()
    ]


def _check_alike(what: str, values: Mapping[Path, object]) -> None:
    (first, expected), *others = values.items()
    for folder, value in others:
        if value != expected:
            raise UsageError(
                f"{folder}: {what} is {value}, that of {first} is {expected}; only runs on the same images compare"
            )


def _images(target: Target) -> str:
    """What was read, in words: of the stand-in, every release has one hash."""
    return f"{target.version}, content hash {target.content}"


def _check_tested(folder: Path, target: Target, data_root: Path) -> None:
    """Raises UsageError where a finished run was tested on other images."""
    result = UnitFolder(folder).result()
    if result is not None and result.content.target != target.content:
        raise UsageError(
            f"{folder}: was tested on images of hash {result.content.target}, those of {target.splits[0].name} in "
            f"{data_root} have {target.content}; give the --data-root that it was tested on"
        )
