"""A trained method on query and gallery: splits, flip, adaptation, what result.json gets."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lda import methods
from lda.config import Config, preset
from lda.data.records import ImageRecord
from lda.data.sources import EvaluationSet
from lda.errors import UsageError
from lda.groups import Setup
from lda.methods.base import Method, TargetImages
from lda.ranking import RankingResult, Scorer
from lda.settings import Settings
from lda.testing import Evaluation, Evaluator, check_target, chosen_splits, effective_rank, metrics

CPU = torch.device("cpu")


def build_method(config: Config, num_ids: list[int]) -> Method:
    return methods.build(config.method, config.setup(num_ids))


def test_effective_rank_of_known_spectra() -> None:
    """k equal directions have rank k; one direction has rank 1; identical features have no spread at all."""
    basis = torch.eye(8)[:4]
    assert effective_rank(torch.cat([basis, -basis])) == pytest.approx(4.0)
    line = torch.linspace(-1, 1, 9)[:, None] * torch.ones(1, 5)
    assert effective_rank(line) == pytest.approx(1.0)
    assert effective_rank(torch.ones(6, 5)) == pytest.approx(1.0)


def rankings(*values: tuple[float, float]) -> tuple[RankingResult, ...]:
    return tuple(RankingResult(mAP=m, cmc=(r,) * 50, mINP=m, num_valid_queries=10) for m, r in values)


def test_metrics_of_one_split_are_its_own() -> None:
    row = metrics(Evaluation(rankings((0.5, 0.25)), 2.0))
    assert (row["mAP"], row["rank1"], row["num_splits"]) == (0.5, 0.25, 1)
    assert "mAP_std" not in row


def test_metrics_of_several_splits_are_mean_and_spread() -> None:
    values = [(0.5, 0.2), (0.6, 0.4), (0.7, 0.3)]
    row = metrics(Evaluation(rankings(*values), 2.0))
    assert row["mAP"] == pytest.approx(0.6)
    assert row["mAP_std"] == pytest.approx(statistics.stdev([0.5, 0.6, 0.7]))
    assert row["rank1_std"] == pytest.approx(statistics.stdev([0.2, 0.3, 0.4]))
    assert [split["rank1"] for split in row["splits"]] == [0.2, 0.4, 0.3]


@pytest.fixture
def splits(tmp_path: Path) -> list[EvaluationSet]:
    """Two single-shot splits of six persons, cameras 0 and 1."""
    records = {}
    for pid in range(6):
        for camid in range(2):
            path = tmp_path / f"{pid}_{camid}.png"
            colour = (40 * pid, 255 - 40 * pid, 90 + 60 * camid)
            Image.new("RGB", (32, 64), colour).save(path)
            records[pid, camid] = ImageRecord(path, pid, camid)
    return [
        EvaluationSet(
            "prid", tuple(records[p, 0] for p in pids), tuple(records[p, 1] for p in range(6)), single_shot=True
        )
        for pids in ((0, 1, 2), (2, 3, 4, 5))
    ]


def test_every_split_equals_its_own_evaluation(splits: list[EvaluationSet]) -> None:
    config = preset("standin", method="baseline", threads=1)
    method = build_method(config, [4, 4])
    together = Evaluator(splits, config, CPU)(method)
    alone = [Evaluator([split], config, CPU)(method).rankings[0] for split in splits]
    assert list(together.rankings) == alone
    assert together.mAP == pytest.approx(statistics.fmean(ranking.mAP for ranking in alone))
    assert method.training


def test_single_shot_lists_are_checked_with_every_evaluation(splits: list[EvaluationSet], tmp_path: Path) -> None:
    """A second match of a query slips into the gallery: mINP is no longer mAP."""
    wrong = EvaluationSet(
        "prid", splits[0].query, (*splits[0].gallery, ImageRecord(tmp_path / "3_1.png", 0, 1)), single_shot=True
    )
    config = preset("standin", method="baseline", threads=1)
    with pytest.raises(RuntimeError, match=r"prid: mINP .* is not mAP"):
        Evaluator([wrong], config, CPU)(build_method(config, [4, 4]))


def test_one_split_can_be_chosen(splits: list[EvaluationSet]) -> None:
    assert chosen_splits(splits, preset("standin").test) == splits
    assert chosen_splits(splits, preset("standin", test_split=1).test) == splits[1:]
    with pytest.raises(UsageError, match=r"prid has 2 split\(s\), numbered from 0; got 2"):
        chosen_splits(splits, preset("standin", test_split=2).test)


def test_flip_test_makes_mirror_images_equal(splits: list[EvaluationSet]) -> None:
    config = preset("standin", method="baseline", threads=1, flip_test=True)
    method = build_method(config, [4, 4])
    evaluator = Evaluator(splits, config, CPU)
    method.eval()
    scorer = method.scorer()
    features = evaluator._encodings(method, scorer, range(12))
    plain = Evaluator(splits, config.replace(flip_test=False), CPU)._encodings(method, scorer, range(12))
    torch.testing.assert_close(features, 2 * plain, rtol=1e-3, atol=1e-4)  # one-coloured images mirror to themselves


class Adapting(Method):
    """Adds up what it is shown of one camera of the target, and encodes by it."""

    title = "adapting"
    reference = "this test"

    def __init__(self, settings: Any, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.register_buffer("shown", torch.zeros(3))
        self.seen: list[tuple[str, list[int]]] = []

    @property
    def looks_at_target(self) -> bool:
        return True

    def adapt(self, target: Iterable[TargetImages]) -> None:
        assert not self.training
        for images, camids, side in target:
            assert len(images) == len(camids)
            self.shown += images.mean((0, 2, 3))
            self.seen.append((side, camids.tolist()))
        SEEN.append(self.seen)

    def encode(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + self.shown


SEEN: list[list[tuple[str, list[int]]]] = []


@pytest.mark.parametrize("cameras", [True, False])
def test_a_method_that_looks_at_the_target_does_so_on_a_copy_per_camera(
    splits: list[EvaluationSet], cameras: bool
) -> None:
    """Camera by camera and side by side, each from the trained method; what it learns there does not stay."""
    config = preset("standin", threads=1)
    splits = [
        dataclasses.replace(
            split,
            gallery=(*split.gallery, dataclasses.replace(split.gallery[0], path=split.query[0].path, camid=2)),
            single_shot=False,
            camera_rule=cameras,
        )
        for split in splits[:1]
    ]
    splits[0] = dataclasses.replace(splits[0], query=splits[0].query[1:])
    method = Adapting(Settings(), config.setup([4]))
    evaluator = Evaluator(splits, config, CPU)
    SEEN.clear()
    first, second = evaluator(method), evaluator(method)
    assert first.rankings == second.rankings
    assert torch.equal(method.shown, torch.zeros(3))
    assert method.seen == []
    half = SEEN[: len(SEEN) // 2]
    assert half == SEEN[len(SEEN) // 2 :]
    groups = sorted((side, sorted(camids)) for group in half for side, camids in group)
    if cameras:
        assert groups == [("gallery", [1] * 6), ("gallery", [2]), ("query", [0, 0])]
    else:
        assert groups == [("gallery", [0] * 7), ("query", [0, 0])]
    for record, encoding in zip(
        evaluator._records, evaluator._adapted_encodings(method.eval(), method.scorer()), strict=True
    ):
        group = [
            r
            for r in evaluator._records
            if (r in splits[0].query) == (record in splits[0].query) and (r.camid == record.camid or not cameras)
        ]
        alone = Evaluator([dataclasses.replace(splits[0], query=tuple(group), gallery=())], config, CPU)
        plain = alone._encodings(Plain(Settings(), config.setup([4])), method.scorer(), range(len(group)))
        expected = plain[[r.path for r in alone._records].index(record.path)] + plain.mean(0)
        torch.testing.assert_close(encoding, expected, rtol=1e-4, atol=1e-5)


class StopError(Exception):
    """Raised by a test in the middle of an evaluation."""


@pytest.mark.parametrize(("adapts", "calls"), [(False, 3 + 2), (True, 2 * 4 + 2)])
def test_an_evaluation_can_be_stopped_before_every_batch_and_block(
    splits: list[EvaluationSet], adapts: bool, calls: int
) -> None:
    """12 images by 5, and two rankings; by camera and side two groups of 6, each seen by the method and encoded."""
    config = preset("standin", threads=1, evaluation_batch=5)
    method = (Adapting if adapts else Plain)(Settings(), config.setup([4]))
    left = 10**6

    def check() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StopError

    evaluator = Evaluator(splits, config, CPU, check)
    evaluation = evaluator(method)
    assert 10**6 - left == calls
    for allowed in range(calls):
        left = allowed
        with pytest.raises(StopError):
            evaluator(method)
    left = calls
    assert evaluator(method).rankings == evaluation.rankings


def test_a_target_without_cameras_is_refused_where_a_method_adapts_to_them(splits: list[EvaluationSet]) -> None:
    config = preset("standin", threads=1)
    unknown = [dataclasses.replace(split, camera_rule=False) for split in splits]
    method = Adapting(Settings(), config.setup([4]))
    with pytest.raises(UsageError, match="prid says no cameras, which adapting adapts to; choose another target"):
        check_target(method, unknown)
    check_target(method, splits)
    check_target(Plain(Settings(), config.setup([4])), unknown)


class Plain(Adapting):
    """Encodes and adds nothing."""

    @property
    def looks_at_target(self) -> bool:
        return False


class Matching(Method):
    """Encodes maps, compared pair by pair."""

    title = "matching"
    reference = "this test"

    def encode(self, images: Tensor) -> Tensor:
        return images[:, :, ::16, ::16]

    def scorer(self) -> Scorer:
        return PositionScorer()


class PositionScorer:
    """Mean over positions of the best product with any position of the other image."""

    tie = 0.0
    pairs_per_block: int | None = 8
    adds_flip = False
    pair_cost: int | None = 3 * 8 * 8

    def prepare(self, encodings: Tensor) -> Tensor:
        return encodings.flatten(2)

    def scores(self, query: Tensor, gallery: Tensor) -> Tensor:
        return torch.einsum("qcs,gct->qgst", query, gallery).amax(3).mean(2)


def test_maps_are_ranked_by_the_methods_own_scorer(splits: list[EvaluationSet]) -> None:
    config = preset("standin", threads=1)
    method = Matching(Settings(), config.setup([4]))
    evaluation = Evaluator(splits, config, CPU)(method)
    assert evaluation.effective_rank is None
    assert len(evaluation.rankings) == 2
    with pytest.raises(UsageError, match="flip_test: encodings of matching cannot be added; set flip_test=false"):
        Evaluator(splits, config.replace(flip_test=True), CPU)(method)
    with pytest.raises(UsageError, match="reranking: matching compares images pair by pair, and its scores are no dis"):
        Evaluator(splits, config.replace(reranking="k_reciprocal"), CPU)(method)
