"""k-reciprocal re-ranking against a plain loop over the equations, and what may not change it."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lda import evaluate, groups, reranking
from lda.config import preset
from lda.errors import UsageError
from lda.ranking import TIE, CosineScorer, rank_encodings
from lda.reranking import KReciprocal
from lda.runs import Result
from lda.unit import run_unit


def by_the_equations(query: Tensor, gallery: Tensor, k1: int, k2: int, share: float) -> Tensor:
    """d* (Q, G), one image and one neighbour at a time."""
    vectors = [(vector / np.linalg.norm(vector)) for vector in torch.cat([query, gallery]).double().numpy()]
    everybody = range(len(vectors))
    squared = {(p, g): float(((vectors[p] - vectors[g]) ** 2).sum()) for p in everybody for g in everybody}
    squared = {pair: 0.0 if value <= 2 * TIE else value for pair, value in squared.items()}
    largest = {p: max(squared[p, g] for g in everybody) or 1.0 for p in everybody}
    d = {(p, g): squared[p, g] / largest[p] for p, g in squared}

    @functools.cache
    def nearest(p: int, k: int) -> set[int]:
        others = sorted((g for g in everybody if g != p), key=lambda g: squared[p, g])
        if k >= len(others):
            return {p, *others}
        return {p, *(g for g in others[:k] if squared[p, g] < squared[p, others[k]] - 2 * TIE)}

    @functools.cache
    def reciprocal(p: int, k: int) -> set[int]:
        return {g for g in nearest(p, k) if p in nearest(g, k)}

    def expanded(p: int) -> set[int]:
        own = reciprocal(p, k1)
        theirs = [reciprocal(q, k1 // 2) for q in own]
        return own.union(*(other for other in theirs if len(own & other) >= 2 / 3 * len(other) - 1e-9))

    encoded = np.zeros((len(vectors), len(vectors)))
    for p in everybody:
        for g in expanded(p):
            encoded[p, g] = np.exp(-d[p, g])
        encoded[p] /= encoded[p].sum()
    mean = np.stack([np.mean([encoded[g] for g in nearest(p, k2 - 1)], 0) for p in everybody])
    final = torch.zeros(len(query), len(gallery), dtype=torch.float64)
    for p, g in itertools.product(range(len(query)), range(len(gallery))):
        other = len(query) + g
        jaccard = 1 - np.minimum(mean[p], mean[other]).sum() / np.maximum(mean[p], mean[other]).sum()
        final[p, g] = (1 - share) * jaccard + share * d[p, other]
    return final


def features(seed: int, count: int, persons: int, size: int = 8, copies: bool = False) -> tuple[Tensor, Tensor]:
    """(count, size) features in clusters, and their persons; with `copies` every third is the one before it."""
    random = torch.Generator().manual_seed(seed)
    pids = torch.arange(count) % persons
    found = torch.randn(persons, size, generator=random)[pids] + 0.7 * torch.randn(count, size, generator=random)
    if copies:
        found[2::3] = found[1::3][: len(found[2::3])]
    return found, pids


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("k1", "k2", "share"), [(20, 6, 0.3), (6, 3, 0.0), (5, 1, 0.5), (1, 2, 1.0), (60, 40, 0.3)])
def test_equals_a_loop_over_the_equations(
    k1: int, k2: int, share: float, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more neighbours than images, with images that are copies of others, and in blocks of any size."""
    monkeypatch.setattr(reranking, "_ROWS", 7)
    monkeypatch.setattr(reranking, "_PAIRS", 10)
    found, _ = features(k1 + copies, 32, 4, copies=copies)
    query, gallery = found[:8], found[8:]
    scores = KReciprocal(k1, k2, share).scores(CosineScorer(), query, gallery)
    expected = by_the_equations(query, gallery, k1, k2, share)
    torch.testing.assert_close(-scores(slice(0, 8), slice(0, 24)), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(-scores(slice(3, 7), slice(4, 24)), expected[3:7, 4:], rtol=0, atol=1e-6)


def ranked(query: Tensor, gallery: Tensor, pids: Tensor, again: KReciprocal | None, **options: Any) -> Any:
    cameras = torch.zeros(len(query)), torch.ones(len(gallery))
    ids = pids[: len(query)], pids[len(query) :], *(camera.long() for camera in cameras)
    return rank_encodings(CosineScorer(), query, gallery, *ids, reranking=again, **options)


@pytest.mark.parametrize("copies", [False, True])
def test_order_and_blocks_do_not_matter(copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, pids = features(3, 90, 9, copies=copies)
    first = ranked(found[:30], found[30:], pids, KReciprocal())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)) + 30
    shuffled = torch.cat([pids[:30], pids[order]])
    monkeypatch.setattr(reranking, "_ROWS", 11)
    assert ranked(found[:30], found[order], shuffled, KReciprocal(), chunk=4) == first
    assert first != ranked(found[:30], found[30:], pids, None)


def test_lambda_1_is_the_plain_ranking() -> None:
    """d is the plain distance, over a number of the query's own."""
    found, pids = features(4, 80, 8)
    assert ranked(found[:20], found[20:], pids, KReciprocal(share=1.0)) == ranked(found[:20], found[20:], pids, None)


def test_neighbours_help_where_persons_form_clusters() -> None:
    found, pids = features(5, 300, 15, size=12)
    plain, again = (ranked(found[:45], found[45:], pids, way) for way in (None, KReciprocal(8, 4)))
    assert again.mAP > plain.mAP + 0.03


def test_a_collapsed_network_still_scores_worst() -> None:
    found = torch.ones(40, 8)
    pids = torch.arange(40) % 4
    result = ranked(found[:8], found[8:], pids, KReciprocal())
    assert result.rank1 == 0
    assert result == ranked(found[:8], found[8:], pids, None)


def test_junk_is_no_neighbour() -> None:
    found, pids = features(6, 60, 6)
    camids = torch.zeros(15).long(), torch.ones(45).long()
    with_junk = torch.cat([found[15:], found[:15] + 0.01]), torch.cat([pids[15:], torch.full((15,), -1)])
    result = rank_encodings(
        CosineScorer(), found[:15], with_junk[0], pids[:15], with_junk[1], camids[0], torch.ones(60).long(),
        reranking=KReciprocal(),
    )  # fmt: skip
    assert result == ranked(found[:15], found[15:], pids, KReciprocal())


def test_settings_say_what_is_done_and_refuse_what_would_do_nothing() -> None:
    assert groups.Test().reranked == "none"
    assert groups.Test(reranking="k_reciprocal", reranking_k1=10).reranked == "k-reciprocal re-ranking (10, 6, 0.3)"
    with pytest.raises(UsageError, match="reranking_k2: 3 needs re-ranking, but reranking is none; leave reranking_k2"):
        groups.Test(reranking_k2=3)


def test_is_named_wherever_the_numbers_are(standin_tiny: Path, tmp_path: Path, capsys: Any) -> None:
    small: dict[str, Any] = {"epochs": 1, "steps_per_epoch": 3, "warmup_epochs": 0, "milestones": (), "threads": 1}
    config = preset("standin", method="baseline", wandb="disabled", reranking="k_reciprocal", reranking_k1=7, **small)
    result = run_unit(config, tmp_path / "run", data_root=standin_tiny)
    named = "k-reciprocal re-ranking (7, 6, 0.3)"
    assert (result.reranking, Result.read(tmp_path / "run").reranking) == (named, named)
    where = ["--checkpoint", str(tmp_path / "run" / "checkpoint.pt"), "--data-root", str(standin_tiny)]
    assert evaluate.main([*where, "--target", "market1501"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["reranking"], shown["mAP"]) == (named, pytest.approx(result.mAP, abs=1e-9))
