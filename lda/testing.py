"""A trained method on the query and gallery of a target: encodings, ranking, metrics."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lda.config import Config, check_keys
from lda.data.cache import cache_dir
from lda.data.catalogue import facts, names
from lda.data.packed import pack
from lda.data.records import ImageRecord
from lda.data.sources import EvaluationSet
from lda.data.transforms import normalise
from lda.device import forward_context
from lda.errors import UsageError
from lda.groups import Machine, Test
from lda.methods.base import Method, Side, TargetImages
from lda.ranking import GalleryOrder, RankingResult, Scorer, order_encodings, rank_encodings
from lda.reranking import KReciprocal
from lda.settings import settings_of

_Pair = tuple[Tensor, Tensor, list[int], list[int], list[int], list[int]]  # encodings, pids, camids: query's, gallery's


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one target.

    Attributes:
        rankings: mAP, CMC and mINP of every split; one split where the data set has an official query and gallery.
        effective_rank: of the queries' features: exp of the entropy of their normalised singular values (Roy and
            Vetterli, 2007); falls towards 1 when features collapse. None where encodings are no vectors.
    """

    rankings: tuple[RankingResult, ...]
    effective_rank: float | None

    @property
    def mAP(self) -> float:  # noqa: N802 - the field's spelling
        """Mean over splits."""
        return statistics.fmean(ranking.mAP for ranking in self.rankings)


class Evaluator:
    """The splits of one target, whose images are packed once and evaluated as often as wanted.

    Every image is encoded once, however many splits use it. `check` is called before every batch of images and every
    block of scores; what it raises ends the evaluation.
    """

    def __init__(
        self,
        splits: Sequence[EvaluationSet],
        config: Config,
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.splits, self.test, self.device, self._check = splits, config.test, device, check
        self._batch = config.machine.evaluation_batch
        self._reranking = _reranking(config.test)
        records = [record for split in splits for record in (*split.query, *split.gallery)]
        self._records = list({record.path: record for record in records}.values())
        self._row = {record.path: row for row, record in enumerate(self._records)}
        self._images = pack(self._records, config.batches.image_height, config.batches.image_width, cache_dir())
        self._queries = sorted({self._row[record.path] for split in splits for record in split.query})

    @property
    def name(self) -> str:
        """The data set."""
        return self.splits[0].name

    def __call__(self, method: Method) -> Evaluation:
        """Evaluate with the method's test settings; leaves it in the mode and with the weights that it had."""
        encodings, scorer = self.encoded(method)
        rankings = tuple(self.ranking(split, encodings, scorer) for split in self.splits)
        rank = effective_rank(encodings[self._queries]) if encodings.ndim == 2 else None
        return Evaluation(rankings, rank)

    def encoded(self, method: Method) -> tuple[Tensor, Scorer]:
        """The encodings of all images, (N, ...), and what compares them; leaves the method as it was."""
        was_training = method.training
        method.eval()
        scorer = method.scorer()
        if self._reranking is not None and scorer.pair_cost is not None:
            raise UsageError(
                f"reranking: {method.title} compares images pair by pair, and its scores are no distances; "
                "set reranking=none"
            )
        if method.looks_at_target:
            encodings = self._adapted_encodings(method, scorer)
        else:
            encodings = self._encodings(method, scorer, range(len(self._records)))
        method.train(was_training)
        return encodings, scorer

    def order(self, split: EvaluationSet, queries: Sequence[int], encodings: Tensor, scorer: Scorer) -> GalleryOrder:
        """The gallery of one of the splits, as it is ranked for some of its queries, given by position."""
        asked = [split.query[position] for position in queries]
        return order_encodings(
            _CheckedScorer(scorer, self._check),
            *self._pair(replace(split, query=tuple(asked)), encodings),
            camera_rule=split.camera_rule,
        )

    def _adapted_encodings(self, method: Method, scorer: Scorer) -> Tensor:
        """The encodings of all images, (N, ...), each by a copy of the method that adapted to its camera and side."""
        groups, found = self._cameras(), []
        for (side, _), rows in groups.items():
            adapted = copy.deepcopy(method)
            adapted.adapt(self._unlabelled(rows, side))
            found.append(self._encodings(adapted.eval(), scorer, rows))
        order = np.argsort([row for rows in groups.values() for row in rows])
        return torch.cat(found)[torch.from_numpy(order)]

    def _cameras(self) -> dict[tuple[Side, int], list[int]]:
        """(side, camera) -> positions of its images, in a fixed random order. An image that any split asks for counts
        as a query. Where the cameras of a data set are unknown, a side is taken for one."""
        asked, known = set(self._queries), self.splits[0].camera_rule
        groups: dict[tuple[Side, int], list[int]] = {}
        for row in np.random.default_rng(0).permutation(len(self._records)).tolist():
            camera = self._records[row].camid if known else -1
            groups.setdefault(("query" if row in asked else "gallery", camera), []).append(row)
        return groups

    def _unlabelled(self, rows: Sequence[int], side: Side) -> Iterator[TargetImages]:
        """What a method may see of the target: no identity is among it."""
        for start in range(0, len(rows), self._batch):
            self._check()
            part = rows[start : start + self._batch]
            images = self._normalised(part)
            camids = [self._records[row].camid if self.splits[0].camera_rule else 0 for row in part]
            yield TargetImages(images, torch.tensor(camids), side)

    def _pair(self, split: EvaluationSet, encodings: Tensor) -> _Pair:
        query, gallery = split.query, split.gallery
        return (
            encodings[[self._row[record.path] for record in query]],
            encodings[[self._row[record.path] for record in gallery]],
            [record.pid for record in query],
            [record.pid for record in gallery],
            [record.camid for record in query],
            [record.camid for record in gallery],
        )

    def ranking(self, split: EvaluationSet, encodings: Tensor, scorer: Scorer) -> RankingResult:
        """The metrics of one of the splits. Raises RuntimeError where the lists of a single-shot set are wrong."""
        ranking = rank_encodings(
            _CheckedScorer(scorer, self._check),
            *self._pair(split, encodings),
            ap=self.test.average_precision,
            camera_rule=split.camera_rule,
            single_gallery_shot=split.single_gallery_shot,
            reranking=self._reranking,
        )
        single = split.single_shot and self.test.average_precision == "step"
        if single and not math.isclose(ranking.mAP, ranking.mINP, abs_tol=1e-9):
            raise RuntimeError(
                f"{split.name}: mINP {ranking.mINP} is not mAP {ranking.mAP}, though every query has one match; "
                "the query and gallery lists are wrong"
            )
        return ranking

    @torch.inference_mode()
    def activation_maps(self, method: Method, records: Sequence[ImageRecord]) -> dict[str, Tensor]:
        """What `Method.activation_maps` says of some images of the splits, (N, h, w) a path; {} for a method that looks
        at the target, which is another network for every camera. `method`: in evaluation mode."""
        if method.looks_at_target or not records:
            return {}
        rows, found = [self._row[record.path] for record in records], []
        for start in range(0, len(rows), self._batch):
            with forward_context(self.device):
                found.append(method.activation_maps(self._normalised(rows[start : start + self._batch])))
        return {path: torch.cat([maps[path].float().cpu() for maps in found]) for path in found[0]}

    def _normalised(self, rows: Sequence[int]) -> Tensor:
        """(B, 3, H, W), what a network is given of some images."""
        return normalise(self._images.batch(np.array(rows)).to(self.device))

    @torch.inference_mode()
    def _encodings(self, method: Method, scorer: Scorer, rows: Sequence[int]) -> Tensor:
        """The encodings of some images, (N, ...)."""
        check_flip(method, scorer, self.test)
        found: list[Tensor] = []
        for start in range(0, len(rows), self._batch):
            self._check()
            images = self._images.batch(np.array(rows[start : start + self._batch]))
            found.append(encodings_of(method, images, self.test, self.device))
        return torch.cat(found)


@torch.inference_mode()
def encodings_of(method: Method, images: Tensor, test: Test, device: torch.device) -> Tensor:
    """What the scorer compares of uint8 images (B, 3, H, W), as a test finds it: (B, ...) float32 on the device."""
    normalised = normalise(images.to(device))
    with forward_context(device):
        return encoded(method, normalised, test).float()


def encoded(method: Method, images: Tensor, test: Test) -> Tensor:
    """The encodings of normalised images (B, 3, H, W), with `flip_test` those of image and mirror image added."""
    output = method.encode(images)
    return output + method.encode(images.flip(3)) if test.flip_test else output


def _reranking(test: Test) -> KReciprocal | None:
    if test.reranking == "none":
        return None
    return KReciprocal(test.reranking_k1, test.reranking_k2, test.reranking_lambda)


class _CheckedScorer:
    """The scorer, with a call before every block of scores."""

    def __init__(self, scorer: Scorer, check: Callable[[], None]) -> None:
        self._scorer, self._check = scorer, check
        self.tie, self.pairs_per_block = scorer.tie, scorer.pairs_per_block
        self.adds_flip, self.pair_cost = scorer.adds_flip, scorer.pair_cost
        self.prepare = scorer.prepare

    def scores(self, query: Tensor, gallery: Tensor) -> Tensor:
        """See `Scorer`."""
        self._check()
        return self._scorer.scores(query, gallery)


def test_settings(config: Config) -> list[str]:
    """The settings that a test of this run's method can be told, whatever it was trained with."""
    own = [key for key, known in settings_of(type(config.method.settings)).items() if known.test]
    return [*own, *settings_of(Test), *_choosing_test_images()]


def test_config(trained: Config, target: str, changes: Mapping[str, Any]) -> Config:
    """The settings under which a trained run is tested again.

    Raises UsageError for a setting of training, which is over, and for one that the method contradicts.
    """
    check_keys(changes, trained.method.name)
    told = test_settings(trained)
    for key in changes:
        if key not in (*told, *settings_of(Machine)):
            raise UsageError(
                f"--set {key}: is a setting of training, which is over; a test of {trained.method.name} can be told: "
                f"{', '.join(told)}"
            )
    return trained.replace(target=target, **changes)


def _choosing_test_images() -> list[str]:
    """The options of data sets that choose a query and gallery, and not what trains."""
    roles = [(option, role) for name in names() for option, role in facts(name).options.items()]
    return [option for option, role in roles if role != "extent"]


def check_target(method: Method, splits: Sequence[EvaluationSet]) -> None:
    """Raises UsageError for a target whose cameras are unknown and a method that adapts to them. Source validation
    takes such a set for one camera instead: otherwise no such method could train beside it."""
    if method.looks_at_target:
        check_cameras(method.title, splits)


def check_cameras(title: str, splits: Sequence[EvaluationSet]) -> None:
    """Raises UsageError for a target whose cameras are unknown; `title`: of a method that adapts to them."""
    if not splits[0].camera_rule:
        raise UsageError(
            f"target: {splits[0].name} says no cameras, which {title} adapts to; choose another target, or an "
            "inference that does not look at it"
        )


def check_flip(method: Method, scorer: Scorer, test: Test) -> None:
    """Raises UsageError for `flip_test` and a method whose encodings are no vectors that could be added."""
    if test.flip_test and not scorer.adds_flip:
        raise UsageError(f"flip_test: encodings of {method.title} cannot be added; set flip_test=false")


def chosen_splits(splits: Sequence[EvaluationSet], test: Test) -> Sequence[EvaluationSet]:
    """All splits of a target, or the one of `test_split`. Raises UsageError when there is no such split."""
    if test.test_split < 0:
        return splits
    if test.test_split >= len(splits):
        raise UsageError(
            f"test_split: {splits[0].name} has {len(splits)} split(s), numbered from 0; got {test.test_split}"
        )
    return splits[test.test_split : test.test_split + 1]


def effective_rank(features: Tensor) -> float:
    """exp(entropy) of the normalised singular values of centred features (N, D): between 1 and min(N - 1, D)."""
    singular = torch.linalg.svdvals((features - features.mean(0)).double())
    share = singular / singular.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as keys of result.json: fractions, means over splits, and every split where there are several."""
    rows = [
        {
            "mAP": ranking.mAP,
            "rank1": ranking.rank1,
            "rank5": ranking.rank5,
            "rank10": ranking.rank10,
            "mINP": ranking.mINP,
            "num_valid_queries": ranking.num_valid_queries,
        }
        for ranking in evaluation.rankings
    ]
    if len(rows) == 1:
        return {**rows[0], "num_splits": 1}
    means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    spread = {f"{key}_std": statistics.stdev(row[key] for row in rows) for key in ("mAP", "rank1")}
    return {**means, "num_splits": len(rows), **spread, "splits": rows}
