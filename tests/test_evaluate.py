"""Evaluation: splits, feature scale, what result.json gets."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

from lda.config import preset
from lda.data.records import ImageRecord
from lda.data.sources import EvaluationSet
from lda.errors import UsageError
from lda.evaluate import Evaluation, Evaluator, chosen_splits, effective_rank, metrics
from lda.method import build_method
from lda.ranking import RankingResult

CPU = torch.device("cpu")


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
    row = metrics(Evaluation(rankings((0.5, 0.25)), 1.0, 2.0))
    assert (row["mAP"], row["rank1"], row["num_splits"]) == (0.5, 0.25, 1)
    assert "mAP_std" not in row


def test_metrics_of_several_splits_are_mean_and_spread() -> None:
    values = [(0.5, 0.2), (0.6, 0.4), (0.7, 0.3)]
    row = metrics(Evaluation(rankings(*values), 1.0, 2.0))
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
        EvaluationSet("prid", tuple(records[p, 0] for p in pids), tuple(records[p, 1] for p in range(6)))
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
    gallery = (*splits[0].gallery, ImageRecord(tmp_path / "3_1.png", 0, 1))
    wrong = EvaluationSet("prid", splits[0].query, gallery, single_shot=True)
    config = preset("standin", method="baseline", threads=1)
    with pytest.raises(RuntimeError, match=r"prid: mINP .* is not mAP"):
        Evaluator([wrong], config, CPU)(build_method(config, [4, 4]))


def test_one_split_can_be_chosen(splits: list[EvaluationSet]) -> None:
    assert chosen_splits(splits, preset("standin")) == splits
    assert chosen_splits(splits, preset("standin", test_split=1)) == splits[1:]
    with pytest.raises(UsageError, match=r"prid has 2 split\(s\), numbered from 0; got 2"):
        chosen_splits(splits, preset("standin", test_split=2))


def test_flip_test_makes_mirror_images_equal(splits: list[EvaluationSet]) -> None:
    config = preset("standin", method="baseline", threads=1, flip_test=True)
    method = build_method(config, [4, 4])
    evaluator = Evaluator(splits, config, CPU)
    method.eval()
    features = evaluator._passes(method, range(3))
    plain = Evaluator(splits, config.replace(flip_test=False), CPU)._passes(method, range(3))
    torch.testing.assert_close(features, 2 * plain, rtol=1e-3, atol=1e-4)  # one-coloured images mirror to themselves
