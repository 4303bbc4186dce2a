"""lda.ranking against a naive loop over random cases, hand-computed values, and identities of the metrics."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lda.errors import UsageError
from lda.ranking import (
    MAX_RANK,
    SHOT_DRAWS,
    TIE,
    CosineScorer,
    RankingResult,
    Scorer,
    Scores,
    _Shots,
    evaluate_ranking,
    order_encodings,
    rank_blocks,
    rank_encodings,
)

# All permutations have the same norm, so their cosines tie exactly when their integer products do.
PERMUTATIONS = np.array(list(itertools.permutations((1, 2, 3, 5))))


def naive(case: dict[str, Any], ap: str = "step", camera_rule: bool = True) -> RankingResult:
    """By exact integer similarity of the features."""
    ids = {key: value for key, value in case.items() if key not in ("query", "gallery")}
    rows = [
        [sum(int(a) * int(b) for a, b in zip(feature, other, strict=True)) for other in case["gallery"].tolist()]
        for feature in case["query"].tolist()
    ]
    return naive_from_scores(rows, **ids, ap=ap, camera_rule=camera_rule)


def naive_from_scores(
    rows: list[list[Any]],
    query_pids: Any,
    gallery_pids: Any,
    query_camids: Any,
    gallery_camids: Any,
    ap: str = "step",
    camera_rule: bool = True,
    tie: float = 0.0,
) -> RankingResult:
    """One query at a time, whole gallery sorted by its scores, ties against the query."""
    precisions, penalties, firsts = [], [], []
    gallery = list(zip(gallery_pids, gallery_camids, strict=True))
    for scores, pid, camid in zip(rows, query_pids, query_camids, strict=True):
        kept = []
        for score, (other_pid, other_camid) in zip(scores, gallery, strict=True):
            if other_pid == -1 or (camera_rule and other_pid == pid and other_camid == camid):
                continue
            match = other_pid == pid
            kept.append((-score + tie if match else -score, match))
        kept.sort()  # False before True: a non-match of equal similarity comes first
        ranks = [rank for rank, (_, match) in enumerate(kept, start=1) if match]
        if not ranks:
            continue
        terms = []
        for i, rank in enumerate(ranks, start=1):
            before = 1.0 if rank == 1 else (i - 1) / (rank - 1)
            terms.append(i / rank if ap == "step" else (i / rank + before) / 2)
        precisions.append(sum(terms) / len(terms))
        penalties.append(len(ranks) / ranks[-1])
        firsts.append(ranks[0])
    n = len(firsts)
    cmc = tuple(sum(first <= k for first in firsts) / n for k in range(1, MAX_RANK + 1))
    return RankingResult(sum(precisions) / n, cmc, sum(penalties) / n, n)


def random_case(seed: int) -> dict[str, Any]:
    """A small query and gallery set with ties, distractors, junk and queries without a match."""
    rng = np.random.default_rng(seed)
    num_query, num_gallery = int(rng.integers(1, 12)), int(rng.integers(1, 80))
    palette = PERMUTATIONS[rng.choice(len(PERMUTATIONS), size=int(rng.integers(2, 24)), replace=False)]
    pids = int(rng.integers(2, 9))
    return {
        "query": torch.tensor(palette[rng.integers(len(palette), size=num_query)], dtype=torch.float32),
        "gallery": torch.tensor(palette[rng.integers(len(palette), size=num_gallery)], dtype=torch.float32),
        "query_pids": rng.integers(1, pids + 3, size=num_query).tolist(),  # the last ids are in no gallery
        "gallery_pids": rng.integers(-1, pids, size=num_gallery).tolist(),  # -1 junk, 0 distractor
        "query_camids": rng.integers(3, size=num_query).tolist(),
        "gallery_camids": rng.integers(3, size=num_gallery).tolist(),
    }


def assert_same(result: RankingResult, expected: RankingResult) -> None:
    assert result.mAP == pytest.approx(expected.mAP, abs=1e-12)
    assert result.mINP == pytest.approx(expected.mINP, abs=1e-12)
    assert result.cmc == pytest.approx(expected.cmc, abs=1e-12)
    assert result.num_valid_queries == expected.num_valid_queries


@pytest.mark.parametrize("ap", ["step", "trapezoid"])
@pytest.mark.parametrize("camera_rule", [True, False])
def test_against_naive_loop(ap: str, camera_rule: bool) -> None:
    checked = 0
    for seed in range(150):
        case = random_case(seed)
        try:
            expected = naive(case, ap, camera_rule)
        except ZeroDivisionError:
            with pytest.raises(UsageError, match="no query can be evaluated"):
                evaluate_ranking(**case, ap=ap, camera_rule=camera_rule)
            continue
        for chunk in (1, 3, 256):
            assert_same(evaluate_ranking(**case, ap=ap, camera_rule=camera_rule, chunk=chunk), expected)
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("camera_rule", [True, False])
def test_orders_and_their_precisions_against_naive_loop(camera_rule: bool) -> None:
    """By exact integer similarity; among equals that are no match, the order is that of noise and does not matter."""
    ignored = 0
    for seed in range(60):
        case = random_case(seed)
        order = order_encodings(CosineScorer(), *case.values(), camera_rule=camera_rule, chunk=3)
        similarity = (case["query"] @ case["gallery"].T).int().tolist()
        precisions = []
        for row, (pid, camid) in enumerate(zip(case["query_pids"], case["query_camids"], strict=True)):
            images = []
            for place, other in enumerate(case["gallery_pids"]):
                dropped = camera_rule and other == pid and case["gallery_camids"][place] == camid
                counted = not dropped and other != -1
                images.append((-similarity[row][place], other == pid, counted))
            found = order.positions[row].tolist()
            assert sorted(found) == list(range(len(images)))
            assert [images[place][:2] for place in found] == sorted(image[:2] for image in images)
            assert order.matches[row].tolist() == [images[place][1] for place in found]
            assert order.counted[row].tolist() == [images[place][2] for place in found]
            ignored += sum(not image[2] for image in images)
            hits = order.matches[row][order.counted[row]]
            ranks = [rank for rank, hit in enumerate(hits, start=1) if hit]
            precisions.append(np.mean([i / r for i, r in enumerate(ranks, start=1)]) if ranks else np.nan)
        if not np.isnan(precisions).all():
            of_queries = evaluate_ranking(**case, camera_rule=camera_rule).average_precisions
            assert of_queries == pytest.approx(precisions, abs=1e-12, nan_ok=True)
    assert ignored > 100


def at_ranks(ranks: tuple[int, ...], gallery_size: int = 12) -> dict[str, Any]:
    """One query whose matches have exactly these ranks."""
    angle = torch.linspace(0.01, 1.5, gallery_size)
    return {
        "query": torch.tensor([[1.0, 0.0]]),
        "gallery": torch.stack([angle.cos(), angle.sin()], dim=1),
        "query_pids": [7],
        "gallery_pids": [7 if rank in ranks else 0 for rank in range(1, gallery_size + 1)],
        "query_camids": [0],
        "gallery_camids": [1] * gallery_size,
    }


@pytest.mark.parametrize(
    ("ranks", "step", "trapezoid", "inp"),
    [
        ((1,), 1.0, 1.0, 1.0),
        ((2,), 0.5, 0.25, 0.5),
        ((1, 3), 5 / 6, 0.75 + 1 / 24, 2 / 3),  # 0.8333, 0.7917
        ((2, 5, 9), 0.4111111, 0.2888889, 1 / 3),
    ],
)
def test_hand_computed_values(ranks: tuple[int, ...], step: float, trapezoid: float, inp: float) -> None:
    by_step = evaluate_ranking(**at_ranks(ranks))
    by_trapezoid = evaluate_ranking(**at_ranks(ranks), ap="trapezoid")
    assert by_step.mAP == pytest.approx(step, abs=1e-6)
    assert by_trapezoid.mAP == pytest.approx(trapezoid, abs=1e-6)
    assert by_step.mINP == by_trapezoid.mINP == pytest.approx(inp)
    assert by_step.cmc == tuple(float(k >= ranks[0]) for k in range(1, MAX_RANK + 1))


def test_rank_accessors() -> None:
    result = evaluate_ranking(**at_ranks((5,)))
    assert (result.rank1, result.rank5, result.rank10) == (0.0, 1.0, 1.0)


def gaussian_case(seed: int, num_query: int = 40, num_gallery: int = 150, size: int = 16) -> dict[str, Any]:
    """Features without ties: a person's direction plus noise."""
    generator = torch.Generator().manual_seed(seed)
    people = torch.randn(20, size, generator=generator)

    def draw(number: int) -> tuple[Tensor, Tensor, Tensor]:
        pids = torch.randint(20, (number,), generator=generator)
        noise = torch.randn(number, size, generator=generator)
        return people[pids] + 1.5 * noise, pids, torch.randint(6, (number,), generator=generator)

    query, query_pids, query_camids = draw(num_query)
    gallery, gallery_pids, gallery_camids = draw(num_gallery)
    return {
        "query": query,
        "gallery": gallery,
        "query_pids": query_pids,
        "gallery_pids": gallery_pids,
        "query_camids": query_camids,
        "gallery_camids": gallery_camids,
    }


def single_shot_case(seed: int) -> dict[str, Any]:
    """As PRID: one match per query in the other camera, and distractors."""
    case = gaussian_case(seed, num_query=20, num_gallery=60)
    case["query_pids"] = list(range(1, 21))
    case["gallery_pids"] = list(range(1, 21)) + [0] * 40
    case["query_camids"], case["gallery_camids"] = [0] * 20, [1] * 60
    return case


def test_identity_as_feature_is_perfect() -> None:
    case = gaussian_case(0)
    for part in ("query", "gallery"):
        case[part] = torch.nn.functional.one_hot(case[f"{part}_pids"], 20).float()
    result = evaluate_ranking(**case)
    assert (result.mAP, result.rank1, result.mINP) == (1.0, 1.0, 1.0)


def test_single_shot_map_is_minp_and_trapezoid_is_lower() -> None:
    for seed in range(5):
        case = single_shot_case(seed)
        step, trapezoid = evaluate_ranking(**case), evaluate_ranking(**case, ap="trapezoid")
        assert step.mAP == pytest.approx(step.mINP, abs=1e-12)
        assert step.rank1 < 1
        assert trapezoid.mAP < step.mAP
        # One match per query: the trapezoid halves every query that misses at rank 1.
        assert trapezoid.mAP == pytest.approx((step.mAP + step.rank1) / 2, abs=1e-12)


def test_random_features_find_one_in_gallery_size() -> None:
    generator = torch.Generator().manual_seed(0)
    case = {
        "query": torch.randn(2000, 8, generator=generator),
        "gallery": torch.randn(100, 8, generator=generator),
        "query_pids": [i % 100 for i in range(2000)],
        "gallery_pids": list(range(100)),
        "query_camids": [0] * 2000,
        "gallery_camids": [1] * 100,
    }
    assert evaluate_ranking(**case).rank1 == pytest.approx(0.01, abs=0.008)


def test_order_of_gallery_and_queries_does_not_matter() -> None:
    for case in (gaussian_case(3), random_case(5), random_case(11)):
        expected = evaluate_ranking(**case)
        generator = torch.Generator().manual_seed(1)
        for part in ("query", "gallery"):
            order = torch.randperm(len(case[part]), generator=generator)
            for key in (part, f"{part}_pids", f"{part}_camids"):
                case[key] = torch.as_tensor(case[key])[order]
        assert_same(evaluate_ranking(**case), expected)


def test_chunks_do_not_change_the_result_even_with_duplicated_images() -> None:
    case = gaussian_case(4, num_query=67, num_gallery=301, size=64)
    # Duplicates at scattered places, where a product's rounding differs: half of them match, half do not.
    case["gallery"][::3] = case["gallery"][0]
    expected = evaluate_ranking(**case, chunk=67)
    for chunk in (1, 2, 7, 33, 1000):
        assert_same(evaluate_ranking(**case, chunk=chunk), expected)


def test_features_that_say_nothing_score_worst() -> None:
    case = gaussian_case(6)
    wrong = torch.tensor([int((case["gallery_pids"] != pid).sum()) for pid in case["query_pids"]])
    case["query"], case["gallery"] = torch.ones(40, 16), torch.ones(150, 16)
    result = evaluate_ranking(**case)
    assert result.rank10 == 0.0
    assert result.mAP < 0.1
    assert all(wrong > MAX_RANK)


def test_a_tie_is_finer_than_what_separates_images() -> None:
    """Similarities further apart than TIE are ordered by their values."""
    for gap, rank1 in ((TIE / 4, 0.0), (TIE * 4, 1.0)):
        cosine = torch.tensor([0.5, 0.5 - gap], dtype=torch.float64)
        case = at_ranks((1,), gallery_size=2)
        case["query"] = case["query"].double()
        case["gallery"] = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)
        assert evaluate_ranking(**case).rank1 == rank1


def test_distractors_can_only_lower_and_junk_changes_nothing() -> None:
    case = gaussian_case(7)
    clean = evaluate_ranking(**case)
    for pid, lowers in ((99, True), (-1, False)):
        more = dict(case)
        more["gallery"] = torch.cat([case["gallery"], case["query"]])  # as near to a query as can be
        more["gallery_pids"] = torch.cat([case["gallery_pids"], torch.full((40,), pid)])
        more["gallery_camids"] = torch.cat([case["gallery_camids"], case["query_camids"]])
        result = evaluate_ranking(**more)
        if lowers:
            assert result.mAP < clean.mAP
            assert result.rank1 == 0.0
        else:
            assert result == clean


def test_camera_rule_drops_own_camera_only_for_the_own_person() -> None:
    case = at_ranks((2,), gallery_size=4)
    case["gallery_pids"] = [7, 0, 7, 0]
    case["gallery_camids"] = [0, 0, 1, 1]  # the nearest image is of the own person and camera
    assert evaluate_ranking(**case).mAP == pytest.approx(1 / 2)
    assert evaluate_ranking(**case, camera_rule=False).mAP == pytest.approx((1 + 2 / 3) / 2)


def test_queries_without_a_match_are_skipped() -> None:
    case = gaussian_case(8)
    clean = evaluate_ranking(**case)
    case["query"] = torch.cat([case["query"], torch.randn(3, 16)])
    case["query_pids"] = torch.cat([case["query_pids"], torch.tensor([77, 78, -1])])
    case["query_camids"] = torch.cat([case["query_camids"], torch.zeros(3, dtype=torch.int64)])
    for chunk in (256, 2):  # 2: a chunk without any valid query
        assert_same(evaluate_ranking(**case, chunk=chunk), clean)


def test_constant_camera_is_explained() -> None:
    case = gaussian_case(9)
    case["query_camids"], case["gallery_camids"] = [0] * 40, [0] * 150
    with pytest.raises(ValueError, match=r"40 of 40 .* own camera .*camera_rule=False"):
        evaluate_ranking(**case)
    assert evaluate_ranking(**case, camera_rule=False).num_valid_queries == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(40)},
            r"query: expected a tensor of floats .* of shape \(N, D\).* got torch.float32 of shape \(40,\)",
        ),
        (
            {"gallery": torch.zeros(150, 16, dtype=torch.int64)},
            "gallery: expected a tensor of floats .*, got torch.int64",
        ),
        ({"gallery": torch.zeros(150, 15)}, "query has 16, gallery has 15"),
        ({"query": torch.full((40, 16), torch.nan)}, "query: 40 of 40 features are not finite"),
        ({"query_pids": [1, 2]}, r"query_pids: expected 40 ids, one per image, got shape \(2,\)"),
        ({"gallery_camids": [1]}, "gallery_camids: expected 150 ids"),
        ({"ap": "steps"}, r"unknown average precision 'steps' \(did you mean 'step'\?\)"),
        ({"chunk": 0}, "chunk: expected at least 1"),
        ({"query": torch.zeros(0, 16), "query_pids": [], "query_camids": []}, "no query can be evaluated: 0 of 0"),
    ],
)
def test_wrong_input_gets_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        evaluate_ranking(**{**gaussian_case(0), **change})
    assert "\n" not in str(raised.value)


def test_scale_and_kind_of_input_do_not_matter() -> None:
    case = gaussian_case(10)
    expected = evaluate_ranking(**case)
    scaled = {**case, "query": case["query"].double() * 100, "gallery": case["gallery"].double() * 0.01}
    for key in ("query_pids", "gallery_pids"):
        scaled[key] = np.asarray(scaled[key])
    scaled["query"].requires_grad_()
    assert_same(evaluate_ranking(**scaled), expected)


@pytest.fixture
def coarse_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("coarse_products")
def test_precision_of_training_does_not_leak_in() -> None:
    case = gaussian_case(12, num_query=100, num_gallery=2000, size=512)
    for part in ("query", "gallery"):
        case[part] = torch.randn(case[part].shape, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("highest")
    expected = evaluate_ranking(**case)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate_ranking(**case) == expected
    assert torch.get_float32_matmul_precision() == "medium"


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_is_bounded_by_the_chunk() -> None:
    case = gaussian_case(13, num_query=600, num_gallery=700)
    for chunk in (20, 50):
        with LargestTensor() as largest:
            evaluate_ranking(**case, chunk=chunk)
        assert 700 * 16 <= largest.elements <= chunk * 700


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    case = gaussian_case(14, num_query=300, num_gallery=3000)
    on_gpu = {**case, "query": case["query"].cuda(), "gallery": case["gallery"].cuda()}
    result, expected = evaluate_ranking(**on_gpu), evaluate_ranking(**case)
    assert result.mAP == pytest.approx(expected.mAP, abs=1e-5)
    assert result.rank1 == pytest.approx(expected.rank1, abs=0.01)


# --- CUHK03's old protocol: one random gallery image per person ------------------------------------------------------


def shot_case() -> dict[str, Any]:
    """Four persons with one to three images in each of two views; query = gallery, as in the old protocol."""
    rng = np.random.default_rng(3)
    rows = [(pid, view) for pid in range(4) for view in (0, 1) for _ in range(1 + (pid + view) % 3)]
    pids, camids = ([row[i] for row in rows] for i in (0, 1))
    centres = rng.normal(size=(4, 3))
    features = torch.tensor(centres[pids] + 0.9 * rng.normal(size=(len(rows), 3)))
    return {"query": features, "gallery": features, "query_pids": pids, "gallery_pids": pids,
            "query_camids": camids, "gallery_camids": camids}  # fmt: skip


def exact_shot_cmc(case: dict[str, Any]) -> list[float]:
    """Expectation over every gallery that could be drawn, query by query."""
    features = torch.nn.functional.normalize(case["query"].double())
    pids, camids = case["query_pids"], case["query_camids"]
    curve = np.zeros(MAX_RANK)
    for feature, pid, camid in zip(features, pids, camids, strict=True):
        similar = (features @ feature).tolist()
        images = {
            person: [s for s, p, c in zip(similar, pids, camids, strict=True) if p == person and (p, c) != (pid, camid)]
            for person in set(pids)
        }
        galleries = list(itertools.product(*images.values()))
        own = list(images).index(pid)
        for gallery in galleries:
            rank = sum(s >= gallery[own] for s in gallery)
            curve[rank - 1 :] += 1 / len(galleries) / len(pids)
    return curve.tolist()


def test_single_gallery_shot_cmc_against_every_possible_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    case = shot_case()
    ranks = _Shots.ranks
    monkeypatch.setattr(_Shots, "ranks", lambda *arguments: ranks(*arguments, draws=4000))
    result = evaluate_ranking(**case, single_gallery_shot=True)
    assert result.cmc == pytest.approx(exact_shot_cmc(case), abs=0.01)  # 4000 draws: 0.008 is one standard error


def test_single_gallery_shot_changes_the_cmc_alone_and_not_with_the_chunk() -> None:
    case = shot_case()
    case["query_pids"], case["query_camids"] = [*case["query_pids"], 9], [*case["query_camids"], 0]  # nobody's query
    case["query"] = torch.cat([case["query"], torch.ones(1, 3, dtype=torch.float64)])
    whole = evaluate_ranking(**case)
    result = evaluate_ranking(**case, single_gallery_shot=True)
    assert (result.mAP, result.mINP, result.num_valid_queries) == (whole.mAP, whole.mINP, whole.num_valid_queries)
    assert result.cmc != whole.cmc
    assert result.cmc[3] == 1.0  # four persons
    for chunk in (1, 5):
        assert evaluate_ranking(**case, single_gallery_shot=True, chunk=chunk).cmc == result.cmc
    assert (result.rank1 * SHOT_DRAWS * result.num_valid_queries) % 1 == pytest.approx(0, abs=1e-9)


def test_single_gallery_shot_with_nothing_to_draw_is_the_usual_cmc() -> None:
    """One image of everybody: every draw is the whole gallery."""
    case = gaussian_case(5, num_query=20, num_gallery=20)
    case |= {"gallery_pids": torch.arange(20), "query_pids": torch.arange(20).flip(0)}
    case |= {"query_camids": torch.zeros(20).long(), "gallery_camids": torch.ones(20).long()}
    assert evaluate_ranking(**case, single_gallery_shot=True) == evaluate_ranking(**case)


# --- Scores of any kind, block by block ------------------------------------------------------------------------------


def of_matrix(matrix: Tensor) -> Scores:
    return lambda rows, columns: matrix[rows, columns]


def score_case(seed: int, levels: int = 40) -> tuple[Tensor, dict[str, Any]]:
    """Whole-numbered scores without structure, so with ties, and ids as in `random_case`."""
    ids = {key: value for key, value in random_case(seed).items() if key not in ("query", "gallery")}
    rng = np.random.default_rng(seed)
    shape = (len(ids["query_pids"]), len(ids["gallery_pids"]))
    return torch.tensor(rng.integers(-levels, levels, size=shape), dtype=torch.float32), ids


@pytest.mark.parametrize("ap", ["step", "trapezoid"])
@pytest.mark.parametrize("camera_rule", [True, False])
@pytest.mark.parametrize("tie", [0.0, 2.0, 2.5])
def test_blocks_of_scores_against_naive_sort(ap: str, camera_rule: bool, tie: float) -> None:
    checked = 0
    for seed in range(60):
        matrix, ids = score_case(seed)
        before = matrix.clone()
        options: dict[str, Any] = {"ap": ap, "camera_rule": camera_rule, "tie": tie}
        try:
            expected = naive_from_scores(matrix.tolist(), **ids, **options)
        except ZeroDivisionError:
            with pytest.raises(UsageError, match="no query can be evaluated"):
                rank_blocks(of_matrix(matrix), **ids, **options)
            continue
        for chunk, gallery_chunk in ((1, 1), (3, 7), (256, 64), (256, None)):
            result = rank_blocks(of_matrix(matrix), **ids, **options, chunk=chunk, gallery_chunk=gallery_chunk)
            assert_same(result, expected)
        assert torch.equal(matrix, before)  # the blocks are the scorer's own
        checked += 1
    assert checked > 40


def test_the_score_of_query_and_gallery_is_not_that_of_gallery_and_query() -> None:
    """Same images on both sides, a score that is not symmetric: rows are queries."""
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(60, 60, generator=generator)
    pids, camids = (torch.randint(n, (60,), generator=generator).tolist() for n in (8, 3))
    ids = dict.fromkeys(("query_pids", "gallery_pids"), pids) | dict.fromkeys(
        ("query_camids", "gallery_camids"), camids
    )
    result = rank_blocks(of_matrix(matrix), **ids, chunk=7, gallery_chunk=11)
    assert_same(result, naive_from_scores(matrix.tolist(), **ids))
    assert result.mAP != pytest.approx(rank_blocks(of_matrix(matrix.T), **ids).mAP, abs=1e-3)


def test_every_pair_is_asked_for_once_in_blocks_no_larger_than_allowed() -> None:
    matrix, ids = torch.randn(23, 50), {"query_pids": [1] * 23, "query_camids": [0] * 23}
    ids |= {"gallery_pids": [1, -1] * 25, "gallery_camids": [1] * 50}
    asked = torch.zeros(23, 50)

    def scores(rows: slice, columns: slice) -> Tensor:
        asked[rows, columns] += 1
        assert (rows.stop - rows.start) <= 5
        assert (columns.stop - columns.start) <= 8
        return matrix[rows, columns]

    rank_blocks(scores, **ids, chunk=5, gallery_chunk=8)
    assert (asked == 1).all()


def test_a_tie_is_absolute() -> None:
    """An offset of all scores changes nothing, a scale does, and without a tie neither does."""
    matrix, ids = score_case(7)
    expected = rank_blocks(of_matrix(matrix), **ids, tie=2.0)
    assert rank_blocks(of_matrix(matrix + 1000), **ids, tie=2.0) == expected
    assert rank_blocks(of_matrix(matrix * 4), **ids, tie=2.0) != expected
    assert rank_blocks(of_matrix(matrix * 4), **ids, tie=8.0) == expected
    assert rank_blocks(of_matrix(matrix * 4 + 1000), **ids) == rank_blocks(of_matrix(matrix), **ids)
    # A network that says nothing scores worst whatever the tie.
    assert rank_blocks(of_matrix(torch.zeros_like(matrix)), **ids).mAP < expected.mAP


def test_a_tie_reaches_single_gallery_shots() -> None:
    """Nine persons with an image each, the match a little ahead of all: behind all where the tie is wider than that."""
    ids = {"query_pids": [0], "query_camids": [0], "gallery_pids": list(range(9)), "gallery_camids": [1] * 9}
    scores = of_matrix(torch.tensor([[1.0] + [0.0] * 8]))
    for tie, rank in ((0.9, 1), (1.1, 9)):
        cmc = rank_blocks(scores, **ids, single_gallery_shot=True, tie=tie).cmc
        assert cmc == tuple(float(k >= rank) for k in range(1, MAX_RANK + 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_ranked_in_float32(dtype: torch.dtype) -> None:
    """In half precision a limit of score + 0.7 spacings would round to the next score and tie with it."""
    matrix, ids = score_case(5)
    spacing = 256 * torch.finfo(dtype).eps
    half = (256 + matrix.abs() * spacing).to(dtype)
    expected = naive_from_scores(half.tolist(), **ids, tie=0.7 * spacing)
    assert_same(rank_blocks(of_matrix(half), **ids, tie=0.7 * spacing), expected)
    assert_same(rank_blocks(of_matrix(half), **ids), expected)


def test_cosine_is_the_same_through_every_door() -> None:
    for case in (gaussian_case(3), gaussian_case(4, num_query=300, num_gallery=500, size=64)):
        unit = {part: torch.nn.functional.normalize(case.pop(part), dim=1) for part in ("query", "gallery")}
        features = evaluate_ranking(**unit, **case)
        assert rank_encodings(CosineScorer(), **unit, **case) == features
        cosine = {part: torch.nn.functional.normalize(x, dim=1) for part, x in unit.items()}
        blocks = rank_blocks(lambda q, g, x=cosine: x["query"][q] @ x["gallery"][g].T, **case, tie=TIE)
        assert blocks == features


def test_single_gallery_shot_of_blocks_is_that_of_vectors() -> None:
    case = shot_case()
    case["query_pids"], case["query_camids"] = [9, *case["query_pids"]], [0, *case["query_camids"]]  # a chunk of nobody
    case["query"] = torch.cat([torch.ones(1, 3, dtype=torch.float64), case["query"]])
    expected = evaluate_ranking(**case, single_gallery_shot=True)
    query, gallery = (torch.nn.functional.normalize(case.pop(part), dim=1) for part in ("query", "gallery"))
    for chunk, gallery_chunk in ((1, 1), (5, 4), (256, None)):
        result = rank_blocks(
            of_matrix(query @ gallery.T), **case,
            single_gallery_shot=True, chunk=chunk, gallery_chunk=gallery_chunk, tie=TIE,
        )  # fmt: skip
        assert result.cmc == expected.cmc


def test_a_scorer_is_spared_autocast_and_gradients() -> None:
    case = gaussian_case(12, num_query=50, num_gallery=60, size=64)
    query, gallery = (case.pop(part).requires_grad_() for part in ("query", "gallery"))
    seen = []

    def scores(rows: slice, columns: slice) -> Tensor:
        block = query[rows] @ gallery[columns].T
        seen.append((block.dtype, block.requires_grad))
        return block

    expected = rank_blocks(scores, **case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rank_blocks(scores, **case) == expected
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(torch.float32, False)] * 2


class MapMatcher:
    """Toy of a matcher on maps: every position looks for its best partner in the other map, one weight a position.

    Encodings (N, channels, height, width), r = height * width positions; whole numbers keep every sum exact.
    """

    tie = 0.0
    adds_flip = False
    pair_cost: int | None = 3 * 4 * 4

    def __init__(self, pairs_per_block: int | None) -> None:
        self.pairs_per_block = pairs_per_block
        self.asked: list[tuple[int, int]] = []
        self.weight = torch.tensor([[1.0, 2.0, 0.0, 1.0], [2.0, 1.0, 1.0, 3.0]], requires_grad=True)

    def prepare(self, encodings: Tensor) -> Tensor:
        return encodings.flatten(2).float()

    def scores(self, query: Tensor, gallery: Tensor) -> Tensor:
        self.asked.append((len(query), len(gallery)))
        similarity = torch.einsum("qcs,gct->qgst", query, gallery)
        return similarity.amax(3) @ self.weight[0] + similarity.amax(2) @ self.weight[1]


def map_case(seed: int, num_query: int = 13, num_gallery: int = 40) -> dict[str, Any]:
    case = gaussian_case(seed, num_query, num_gallery)
    for part in ("query", "gallery"):
        maps = torch.randint(-4, 5, (len(case[part]), 3, 2, 2), generator=torch.Generator().manual_seed(seed + 1))
        case[part] = maps.float()
    for key in ("query_pids", "gallery_pids", "query_camids", "gallery_camids"):
        case[key] = (case[key] % 5).tolist()
    case["gallery_pids"][::9] = [-1] * len(case["gallery_pids"][::9])
    return case


def test_a_matcher_on_maps_against_explicit_loops() -> None:
    case = map_case(1)
    (w_query, w_gallery), query, gallery = MapMatcher(None).weight.tolist(), case["query"], case["gallery"]
    rows = []
    for a in query.flatten(2).transpose(1, 2).tolist():
        rows.append([])
        for b in gallery.flatten(2).transpose(1, 2).tolist():
            pairs = [[sum(x * y for x, y in zip(s, t, strict=True)) for t in b] for s in a]
            score = sum(w * max(row) for w, row in zip(w_query, pairs, strict=True))
            score += sum(w * max(column) for w, column in zip(w_gallery, zip(*pairs, strict=True), strict=True))
            rows[-1].append(score)
    ids = {key: value for key, value in case.items() if key not in ("query", "gallery")}
    expected = naive_from_scores(rows, **ids)
    for pairs, chunk in ((None, 256), (1, 256), (7, 3), (100, 5), (10_000, 4)):
        scorer: Scorer = MapMatcher(pairs)
        assert_same(rank_encodings(scorer, **case, chunk=chunk), expected)
    half = {part: case[part].half() for part in ("query", "gallery")}
    assert_same(rank_encodings(MapMatcher(50), **{**case, **half}), expected)
    scorer = MapMatcher(50)
    scorer.tie = 3.0
    assert_same(rank_encodings(scorer, **case), naive_from_scores(rows, **ids, tie=3.0))


@pytest.mark.parametrize(("pairs", "chunk"), [(1, 256), (9, 4), (64, 256), (200, 10), (2000, 20)])
def test_memory_of_a_matcher_is_bounded_by_its_block(pairs: int, chunk: int) -> None:
    case = map_case(2, num_query=60, num_gallery=90)
    scorer = MapMatcher(pairs)
    with LargestTensor() as largest:
        rank_encodings(scorer, **case, chunk=chunk)
    assert max(q * g for q, g in scorer.asked) <= pairs
    assert sum(q * g for q, g in scorer.asked) == 60 * 80  # junk is not compared
    assert max(q for q, _ in scorer.asked) <= chunk
    maps = 90 * 3 * 4
    assert largest.elements <= max(maps, chunk * 90, 4 * 4 * pairs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda block: block.numpy(),
            r"queries 0:20 and gallery images 0:50: expected a tensor .*\(20, 50\), got an array of float32",
        ),
        (
            lambda block: block.T,
            r"queries 0:20 and gallery images 0:50: expected .* of shape \(20, 50\), got .*50, 20",
        ),
        (lambda block: block[:, :1], r"of shape \(20, 50\), got torch.float32 of shape \(20, 1\)"),
        (lambda block: block.long(), r"of shape \(20, 50\), got torch.int64"),
        (lambda block: block / 0, r"queries 0:20 and gallery images 0:50: 1000 of 1000 scores are not finite"),
        (lambda block: block.half() * 1e9, r"scores are not finite \(NaN or inf\)"),
    ],
)
def test_a_bad_block_gets_one_line(spoil: Callable[[Tensor], Any], message: str) -> None:
    case = gaussian_case(0)
    matrix = 1 + (case.pop("query") @ case.pop("gallery").T).abs()
    with pytest.raises(UsageError, match=message) as raised:
        rank_blocks(lambda q, g: spoil(matrix[q, g]), **case, chunk=20, gallery_chunk=50)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_score_that_is_not_finite_is_found_where_it_is(value: float) -> None:
    case = gaussian_case(0)
    matrix = case.pop("query") @ case.pop("gallery").T
    matrix[33, 149] = value
    with pytest.raises(UsageError, match=r"queries 20:40 and gallery images 100:150: 1 of 1000 scores are not finite"):
        rank_blocks(of_matrix(matrix), **case, chunk=20, gallery_chunk=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_pids": 3}, r"query_pids: expected a list of ids, one per image, got shape \(\)"),
        ({"query_camids": [1]}, r"query_camids: expected 40 ids, one per image, got shape \(1,\)"),
        ({"gallery_camids": [1]}, r"gallery_camids: expected 150 ids"),
        ({"ap": "steps"}, "unknown average precision 'steps'"),
        ({"chunk": 0}, "chunk: expected at least 1 query, got 0"),
        ({"gallery_chunk": 0}, "gallery_chunk: expected at least 1 gallery image, or None for all, got 0"),
        ({"tie": -1e-6}, "tie: expected a finite difference of scores, 0 or larger, got -1e-06"),
        ({"tie": float("nan")}, "tie: expected a finite"),
        ({"gallery_pids": [], "gallery_camids": []}, "no query can be evaluated: 0 of 40"),
        ({"gallery_pids": [-1] * 150}, "no query can be evaluated: 0 of 40"),
    ],
)
def test_wrong_ids_and_options_of_blocks_get_one_line(change: dict[str, Any], message: str) -> None:
    case = gaussian_case(0)
    matrix = case.pop("query") @ case.pop("gallery").T
    with pytest.raises(UsageError, match=message) as raised:
        rank_blocks(of_matrix(matrix), **{**case, **change})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("scorer", "change", "message"),
    [
        (CosineScorer(), {}, r"cosine similarity: expected \(N, D\) features, got shape \(40, 3, 2, 2\)"),
        (MapMatcher(0), {}, "pairs_per_block of MapMatcher: expected at least 1 pair, got 0"),
        (MapMatcher(9), {"query": torch.ones(13, 3, 1, 2)}, "query has 3 x 1 x 2, gallery has 3 x 2 x 2"),
        (MapMatcher(9), {"gallery": torch.full((40, 3, 2, 2), torch.inf)}, "gallery: 40 of 40 features are not finite"),
    ],
)
def test_encodings_that_do_not_fit_get_one_line(scorer: Scorer, change: dict[str, Any], message: str) -> None:
    case = {**map_case(1), **change}
    case["gallery_pids"] = [pid % 5 for pid in case["gallery_pids"]]  # no junk: all 40 are seen
    with pytest.raises(UsageError, match=message) as raised:
        rank_encodings(scorer, **case)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_scores_are_ranked_on_their_device_whatever_holds_the_ids() -> None:
    matrix, ids = score_case(7)
    for options in ({}, {"single_gallery_shot": True}):
        expected = rank_blocks(of_matrix(matrix), **ids, **options)
        assert_same(rank_blocks(of_matrix(matrix.cuda()), **ids, **options, chunk=3, gallery_chunk=7), expected)
    case = map_case(1)
    on_gpu = {**case, "query_pids": torch.tensor(case["query_pids"]).cuda()}
    assert_same(rank_encodings(MapMatcher(50), **on_gpu), rank_encodings(MapMatcher(50), **case))


# --- kinds of ids and features ---------------------------------------------------------------------------------------

NUMPY_INTEGERS = [np.dtype(sign + kind) for kind in ("int8", "int16", "int32", "int64") for sign in ("", "u")]
TORCH_INTEGERS = [
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64
]  # fmt: skip


def in_every_kind(ids: list[int]) -> Iterator[Any]:
    """The same ids as every tensor, array and list that can hold them."""
    fits = [np.array(ids, kind) for kind in NUMPY_INTEGERS if _holds(kind, ids)]
    yield from fits
    yield from (array.astype(array.dtype.newbyteorder()) for array in fits)
    wide = torch.tensor(ids, dtype=torch.int64)
    yield from (wide.to(kind) for kind, like in zip(TORCH_INTEGERS, NUMPY_INTEGERS, strict=True) if _holds(like, ids))
    yield from (list(ids), tuple(ids), np.array(ids, object), list(wide), list(fits[0]))
    yield [kind.type(number) for number, kind in zip(ids, itertools.cycle((fits[0].dtype, fits[-1].dtype)))]


def _holds(kind: np.dtype[Any], ids: list[int]) -> bool:
    return bool(np.iinfo(kind).min <= min(ids) and max(ids) <= np.iinfo(kind).max)


def every_door(query: Any, gallery: Any, *ids: Any) -> list[RankingResult]:
    matrix = CosineScorer().prepare(query) @ CosineScorer().prepare(gallery).T
    return [
        evaluate_ranking(query, gallery, *ids),
        rank_encodings(CosineScorer(), query, gallery, *ids),
        rank_blocks(of_matrix(matrix), *ids, tie=TIE),
    ]


@pytest.mark.parametrize("kind", NUMPY_INTEGERS, ids=str)
def test_any_integer_type_gives_the_same_numbers(kind: np.dtype[Any]) -> None:
    """With ids at both ends of the type: as uint8 a person 255 was taken for junk, and lost its gallery images."""
    draw = np.random.default_rng(kind.num)
    low, high = int(np.iinfo(kind).min), min(int(np.iinfo(kind).max), 2**63 - 1)
    people = [high, high - 1, high - 2, low, low + 1, 0, *([-1] if low else [])]
    pids = [[high, *draw.choice(people, 7).tolist()], [high, *draw.choice(people, 19).tolist()]]
    camids = [draw.integers(0, 6, len(ids)).tolist() for ids in pids]
    query, gallery = (torch.tensor(draw.normal(size=(len(ids), 8)), dtype=torch.float32) for ids in pids)
    scores = (query / query.norm(dim=1, keepdim=True)) @ (gallery / gallery.norm(dim=1, keepdim=True)).T
    expected = naive_from_scores(scores.tolist(), *pids, *camids)
    for ids in zip(*(in_every_kind([int(i) for i in part]) for part in (*pids, *camids)), strict=False):
        for result in every_door(query, gallery, *ids):
            assert_same(result, expected)


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([1.0, 2.0], "got list of float"),
        ([1, float("nan")], "got list of float, int"),
        (np.array([1, 2], float), "got an array of float64"),
        (torch.tensor([1.0, 2.0]), "got torch.float32 of shape (2,)"),
        (torch.tensor([1, 2], dtype=torch.complex64), "got torch.complex64"),
        (torch.tensor([1, 2]).to_sparse(), "got torch.int64 of shape (2,) (torch.sparse_coo, cpu)"),
        (torch.tensor([1, 2]).to("meta"), "got torch.int64 of shape (2,) (torch.strided, meta)"),
        ([True, False], "got list of bool"),
        ([True, 2], "got list of bool, int"),
        (np.array([True, False]), "got an array of bool"),
        (torch.tensor([True, False]), "got torch.bool"),
        (["1", "2"], "got list of str"),
        ("12", "got str"),
        ([1, None], "got list of NoneType, int"),
        (None, "got NoneType"),
        ({1, 2}, "got set"),
        ([[1], [2, 3]], "got list of list"),
        ([[1, 2]], "got shape (1, 2)"),
        (np.ma.array([1, 2], mask=[True, False]), "got a masked array of int64"),
        (np.array(["2020", "2021"], "M8[Y]"), "got an array of datetime64[Y]"),
        (np.array([0, 2**64 - 1], "uint64"), "below 2^63, got 18446744073709551615"),
        ([2**70, 1], "below 2^63, got 1180591620717411303424"),
    ],
)
@pytest.mark.parametrize("place", range(4))
def test_every_other_kind_of_ids_is_told(ids: Any, told: str, place: int) -> None:
    features = torch.eye(2)
    given: list[Any] = [[1, 2], [1, 2], [0, 0], [1, 1]]
    given[place] = ids
    name = ("query_pids", "gallery_pids", "query_camids", "gallery_camids")[place]
    doors: list[Callable[[], RankingResult]] = [
        lambda: evaluate_ranking(features, features, *given),
        lambda: rank_encodings(CosineScorer(), features, features, *given),
        lambda: rank_blocks(of_matrix(features), *given),
    ]
    for door in doors:
        with pytest.raises(UsageError, match=rf"^{name}: expected [^\n]*{re.escape(told)}"):
            door()


def test_features_of_any_float_type_give_the_same_numbers() -> None:
    """Whole numbers, exact in each of them, in any mixture."""
    case = random_case(2)
    expected = evaluate_ranking(**case)
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for one, other in itertools.product(floats, repeat=2):
        features = {"query": case["query"].to(one), "gallery": case["gallery"].to(other)}
        assert_same(evaluate_ranking(**{**case, **features}), expected)


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (np.eye(2), "got an array of float64"),
        ([[1.0, 0.0], [0.0, 1.0]], "got list of list"),
        ("features", "got str"),
        (None, "got NoneType"),
        (torch.eye(2) > 0, "got torch.bool of shape (2, 2)"),
        (torch.eye(2).to(torch.complex64), "got torch.complex64"),
        (torch.eye(2).to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
        (torch.eye(2).to_sparse(), "(torch.sparse_coo, cpu)"),
        (torch.eye(2).to("meta"), "(torch.strided, meta)"),
        (torch.zeros(2, 0), "got torch.float32 of shape (2, 0)"),
    ],
)
def test_every_other_kind_of_features_is_told(features: Any, told: str) -> None:
    given: list[Any] = [[1, 2], [1, 2], [0, 0], [1, 1]]
    for query, gallery, name in ((features, torch.eye(2), "query"), (torch.eye(2), features, "gallery")):
        with pytest.raises(UsageError, match=rf"^{name}: expected [^\n]*{re.escape(told)}"):
            evaluate_ranking(query, gallery, *given)
    with pytest.raises(UsageError, match=rf"^scores of queries 0:2 [^\n]*{re.escape(told)}"):
        rank_blocks(lambda rows, columns: features, *given)
