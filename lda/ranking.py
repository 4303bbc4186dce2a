"""Retrieval metrics of person ReID: mAP, CMC (Rank-k) and mINP, from any scorer of pairs, in bounded memory.

Shapes: Q queries, G gallery images, D feature size, C queries of one chunk, W gallery images of one block, M most
matches of a query in the chunk.

For one query let r_1 < ... < r_n be the 1-based ranks of its n matches in the gallery sorted by falling score, after
the same-camera rule. Then

    CMC@k = 1 if r_1 <= k else 0          AP = mean_i i / r_i          INP = n / r_n

averaged over the queries that have a match left. Only these ranks are needed, and the i-th match has rank
i + (non-matches at least as similar as it), so the gallery is counted, never sorted: what costs is the scores.

Three doors, one code behind them: `rank_blocks` takes scores block by block, `rank_encodings` takes encodings of images
and a `Scorer` that compares them, `evaluate_ranking` takes feature vectors and compares them by cosine. To look at the
gallery itself, `order_encodings` sorts it for a few queries by the same rules.

Ties count against the query. Two scores closer than `tie` are equal as far as their arithmetic can tell, and a
non-match that ties with a match ranks before it. So features that say nothing (a collapsed network) score worst
instead of scoring the order of a file list, and the order of the gallery and the chunking do not matter: one product
of the same two vectors differs in its last digits between positions and shapes of a matrix, up to 6e-8 on a CPU.

`tie` is absolute, in the units of the scores, and the scorer states it. A tie relative to the score itself would be
wrong: the rounding of a float32 sum goes with the size of its terms, not with what is left of them, so near zero such
a tie vanishes just where the digits are noise, and an offset added to every score would change which of them tie. One
relative to the largest score would let a single distractor change the ties of everybody else. Only the scorer knows
the size of its terms; `4 * eps * (largest sum of their absolute values)` is a good choice, and for cosines it is `TIE`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lda.errors import UsageError, unknown

TIE = 4 * torch.finfo(torch.float32).eps
"""Cosine similarities closer than this (4.8e-7) tie."""

MAX_RANK = 50
"""Length of the CMC curve, the field's habit."""

JUNK_PID = -1
"""Market-1501's label of boxes that are neither a match nor a distractor: ignored in the gallery."""

AVERAGE_PRECISIONS = ("step", "trapezoid")

SHOT_DRAWS = 10
"""Random galleries of one image per person behind a query of CUHK03's old protocol."""

_CHECKED = 1024  # encodings checked at a time

_FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATS = "a tensor of floats (float16, bfloat16, float32, float64)"
_INTEGER_TYPES = (
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
_INT64 = np.iinfo(np.int64)

Scores = Callable[[slice, slice], Tensor]
"""(queries, gallery images) -> their scores, (C, W) floats on any device, larger = more alike. Both slices have a start
and a stop. A score may not depend on the block it is asked in, beyond `tie`."""


@dataclass(frozen=True)
class RankingResult:
    """Metrics of one query and gallery set, as fractions.

    Attributes:
        mAP: mean average precision over valid queries.
        cmc: cmc[k - 1] is the share of valid queries with a match among the first k; always `MAX_RANK` long, a shorter
            gallery repeats its last value.
        mINP: mean inverse negative penalty, n / r_n; equals mAP where every query has one match.
        num_valid_queries: queries with at least one match left after the same-camera rule; the others are skipped.
        average_precisions: AP of every query, in their order; nan for one that is skipped.
    """

    mAP: float  # noqa: N815 - the field's spelling
    cmc: tuple[float, ...]
    mINP: float  # noqa: N815
    num_valid_queries: int
    average_precisions: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @property
    def rank1(self) -> float:
        """Rank-1: share of valid queries whose first gallery image is a match."""
        return self.cmc[0]

    @property
    def rank5(self) -> float:
        """Rank-5."""
        return self.cmc[4]

    @property
    def rank10(self) -> float:
        """Rank-10."""
        return self.cmc[9]


@dataclass(frozen=True)
class GalleryOrder:
    """The whole gallery, G images, as it is ranked for each of Q queries. Arrays (Q, G), along the order.

    Attributes:
        positions: int64, places in the gallery, the most alike first.
        matches: bool, images of the query's person.
        counted: bool, images that have a rank; the others are ignored: junk, and what the same-camera rule drops. They
            stand where their scores put them.
    """

    positions: NDArray[np.int64]
    matches: NDArray[np.bool_]
    counted: NDArray[np.bool_]


class Scorer(Protocol):
    """How encodings of images are compared: a method's half of `rank_encodings`.

    Encodings are float tensors whose first axis is the image: (N, D) vectors, (N, channels, height, width) maps.
    """

    @property
    def tie(self) -> float:
        """Scores closer than this are equal, in the units of the scores; see the top of `lda.ranking`."""

    @property
    def pairs_per_block(self) -> int | None:
        """Most pairs compared at a time, which bounds the scorer's own memory; None: a query chunk and the gallery."""

    @property
    def adds_flip(self) -> bool:
        """Whether the encodings of an image and of its mirror image may be added: yes for vectors, no for maps."""

    @property
    def pair_cost(self) -> int | None:
        """Multiply-adds of comparing one pair, to state what a test costs; None: one product of two vectors."""

    def prepare(self, encodings: Tensor) -> Tensor:
        """What depends on one image only, done once for the gallery and once a block for queries: (N, ...) -> (N, ...).

        Raises UsageError for encodings that the scorer cannot compare.
        """

    def scores(self, query: Tensor, gallery: Tensor) -> Tensor:
        """(C, W) scores of prepared encodings (C, ...) and (W, ...), larger = more alike. No state, no gradient."""


class Reranking(Protocol):
    """Scores that depend on all images of a query and gallery set, such as `lda.reranking.KReciprocal`."""

    def scores(self, scorer: Scorer, query: Tensor, gallery: Tensor) -> Scores:
        """Scores of query (Q, ...) and gallery (G, ...), which tie as the scorer's do."""


class CosineScorer:
    """Cosine similarity of (N, D) feature vectors, one matrix product a query chunk. The default of every method."""

    tie = TIE
    pairs_per_block: int | None = None
    adds_flip = True
    pair_cost: int | None = None

    def prepare(self, encodings: Tensor) -> Tensor:
        """L2-normalise (N, D). Raises UsageError for anything but vectors."""
        if encodings.ndim != 2:
            raise UsageError(f"cosine similarity: expected (N, D) features, got shape {tuple(encodings.shape)}")
        return F.normalize(_at_least_single(encodings), dim=1)

    def scores(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Cosines (C, W) of unit vectors (C, D) and (W, D)."""
        return query @ gallery.T


def evaluate_ranking(
    query: Tensor,
    gallery: Tensor,
    query_pids: Sized,
    gallery_pids: Sized,
    query_camids: Sized,
    gallery_camids: Sized,
    ap: str = "step",
    camera_rule: bool = True,
    chunk: int = 256,
    single_gallery_shot: bool = False,
) -> RankingResult:
    """Rank the gallery for every query by cosine similarity and average the metrics.

    Args:
        query: (Q, D) features on any device, float16, bfloat16, float32 or float64, L2-normalised here.
        gallery: (G, D), same device; may be of another type.
        query_pids, gallery_pids, query_camids, gallery_camids, ap, camera_rule, chunk, single_gallery_shot: see
            `rank_blocks`.

    Raises:
        UsageError: (a ValueError) sizes that do not fit, features that are not finite, an unknown `ap`, or no query
            with a match left.
    """
    ids = (query_pids, gallery_pids, query_camids, gallery_camids)
    return rank_encodings(
        CosineScorer(), query, gallery, *ids,
        ap=ap, camera_rule=camera_rule, chunk=chunk, single_gallery_shot=single_gallery_shot,
    )  # fmt: skip


@torch.no_grad()
def rank_encodings(
    scorer: Scorer,
    query: Tensor,
    gallery: Tensor,
    query_pids: Sized,
    gallery_pids: Sized,
    query_camids: Sized,
    gallery_camids: Sized,
    *,
    ap: str = "step",
    camera_rule: bool = True,
    chunk: int = 256,
    single_gallery_shot: bool = False,
    reranking: Reranking | None = None,
) -> RankingResult:
    """Rank the gallery for every query by a scorer of encodings and average the metrics.

    The scorer is asked for at most `scorer.pairs_per_block` pairs at a time: fewer gallery images, then fewer queries.

    Args:
        scorer: compares the encodings; `CosineScorer()` for vectors.
        query: (Q, ...) encodings, floats on any device that the scorer takes.
        gallery: (G, ...), same sizes after the first.
        query_pids, gallery_pids, query_camids, gallery_camids, ap, camera_rule, chunk, single_gallery_shot: see
            `rank_blocks`. Junk images of the gallery are not compared.
        reranking: makes scores from all of these encodings and the scorer; None: the scorer's own.

    Raises:
        UsageError: (a ValueError) sizes that do not fit, encodings or scores that are not finite, or what `rank_blocks`
            refuses.
    """
    _check_encodings(query, gallery)
    common = torch.promote_types(query.dtype, gallery.dtype)
    query, gallery = query.to(common), gallery.to(common)
    q_pids, g_pids = _ids("query_pids", query_pids, len(query)), _ids("gallery_pids", gallery_pids, len(gallery))
    g_camids = _ids("gallery_camids", gallery_camids, len(gallery))
    kept = g_pids != JUNK_PID
    if not kept.all():
        gallery, g_pids, g_camids = gallery[kept.to(gallery.device)], g_pids[kept], g_camids[kept]

    chunk, gallery_chunk = _chunks(scorer, chunk)
    if reranking is None:
        scores = _scores(scorer, query, gallery)
    else:
        with _full_precision():
            scores = reranking.scores(scorer, query, gallery)
    return rank_blocks(
        scores, q_pids, g_pids, query_camids, g_camids, ap=ap, camera_rule=camera_rule,
        chunk=chunk, gallery_chunk=gallery_chunk, single_gallery_shot=single_gallery_shot, tie=scorer.tie,
    )  # fmt: skip


@torch.no_grad()
def order_encodings(
    scorer: Scorer,
    query: Tensor,
    gallery: Tensor,
    query_pids: Sized,
    gallery_pids: Sized,
    query_camids: Sized,
    gallery_camids: Sized,
    *,
    camera_rule: bool = True,
    chunk: int = 256,
) -> GalleryOrder:
    """The order of the gallery that `rank_encodings` counts in, for a few queries: its size is Q * G.

    Images with equal scores stand in the order of the gallery, a non-match before a match. Args and Raises: see
    `rank_encodings`; queries without a match are no mistake here.
    """
    _check_encodings(query, gallery)
    common = torch.promote_types(query.dtype, gallery.dtype)
    query, gallery = query.to(common), gallery.to(common)
    q_pids, g_pids = _ids("query_pids", query_pids, len(query)), _ids("gallery_pids", gallery_pids, len(gallery))
    q_camids = _ids("query_camids", query_camids, len(query))
    g_camids = _ids("gallery_camids", gallery_camids, len(gallery))
    chunk, gallery_chunk = _chunks(scorer, chunk)
    blocks = list(_slices(len(gallery), gallery_chunk or len(gallery)))
    scores = _scores(scorer, query, gallery)
    with _full_precision():
        distance = torch.cat([_distance(scores, rows, blocks).cpu() for rows in _slices(len(query), chunk)])  # (Q, G)

    matches = q_pids[:, None] == g_pids
    dropped = (matches & (q_camids[:, None] == g_camids)) if camera_rule else torch.zeros_like(matches)
    counted = ~dropped & (g_pids != JUNK_PID)
    limit = torch.where(matches, distance + scorer.tie, distance)  # see `_match_ranks`
    positions = np.lexsort((matches.numpy(), limit.numpy()))  # by the limit, then non-matches first, then by position
    along = (np.take_along_axis(of.numpy(), positions, 1) for of in (matches, counted))
    return GalleryOrder(positions, *along)


def _chunks(scorer: Scorer, chunk: int) -> tuple[int, int | None]:
    """Queries and gallery images scored at a time; None: the whole gallery."""
    pairs = scorer.pairs_per_block
    if pairs is None:
        return chunk, None
    if pairs < 1:
        raise UsageError(f"pairs_per_block of {type(scorer).__name__}: expected at least 1 pair, got {pairs}")
    chunk = min(chunk, pairs)
    return chunk, pairs // max(chunk, 1)


def _scores(scorer: Scorer, query: Tensor, gallery: Tensor) -> Scores:
    """Of encodings, the gallery's prepared once."""
    with _full_precision():
        prepared = scorer.prepare(gallery)

    def scores(rows: slice, columns: slice) -> Tensor:
        return scorer.scores(scorer.prepare(query[rows]), prepared[columns])

    return scores


@torch.no_grad()
def rank_blocks(
    scores: Scores,
    query_pids: Sized,
    gallery_pids: Sized,
    query_camids: Sized,
    gallery_camids: Sized,
    *,
    ap: str = "step",
    camera_rule: bool = True,
    chunk: int = 256,
    gallery_chunk: int | None = None,
    single_gallery_shot: bool = False,
    tie: float = 0.0,
) -> RankingResult:
    """Rank the gallery for every query by scores that are asked for block by block, and average the metrics.

    Every block is asked for once, outside autocast and with matrix products in plain float32. Half precision is
    promoted to float32 before ranking.

    Args:
        scores: of pairs of images, see `Scores`. The device of the first block is the one that ranks.
        query_pids: (Q,) person ids; tensor, array or list of integers of any type, as are the next three.
        gallery_pids: (G,) person ids. Distractors (an id no query has, such as Market-1501's 0) stay in the gallery;
            junk (`JUNK_PID`) is dropped.
        query_camids: (Q,) camera ids.
        gallery_camids: (G,) camera ids.
        ap: "step", mean_i i / r_i; or "trapezoid", mean_i (i / r_i + o_i) / 2 with o_i = (i - 1) / (r_i - 1), and 1 at
            r_i = 1: the average precision of Market-1501's MATLAB code, half as large for a lone match at rank > 1.
        camera_rule: drop gallery images of the query's own person and camera. False for sets without camera labels,
            where the rule would drop every match.
        chunk: queries ranked at a time; memory grows with chunk * G, never with Q * G. It cannot change a result.
        gallery_chunk: gallery images scored at a time, for the memory of the scorer; None: all. It cannot change a
            result either.
        single_gallery_shot: CMC by CUHK03's old protocol (Li et al., CVPR 2014): for every query the gallery is one
            random image of each person, drawn `SHOT_DRAWS` times from a fixed seed, and the curves are averaged. mAP
            and mINP still rank the whole gallery.
        tie: scores this close are equal, and count against the query. Absolute, in the units of the scores; 0: only
            equal scores tie, which is right where a pair's score has the same bits in every block. Below the spacing of
            the floats at a score (1.2e-7 of it in float32) it means 0. The top of `lda.ranking` says how to choose it.

    Raises:
        UsageError: (a ValueError) ids that do not fit, an option out of its bounds, a block of scores that is not
            (C, W) finite floats (the line names its position), or no query with a match left.
    """
    _check_options(ap, chunk, gallery_chunk, tie)
    q_pids, g_pids = _ids("query_pids", query_pids), _ids("gallery_pids", gallery_pids)
    q_camids = _ids("query_camids", query_camids, len(q_pids))
    g_camids = _ids("gallery_camids", gallery_camids, len(g_pids))
    blocks = list(_slices(len(g_pids), gallery_chunk or max(len(g_pids), 1)))
    kept = g_pids != JUNK_PID
    junk = not kept.all()
    ids: tuple[Tensor, ...] = (q_pids, g_pids[kept], q_camids, g_camids[kept], kept)

    tally, shots = _Tally(ap), None
    with _full_precision():
        for rows in _slices(len(q_pids) if len(g_pids) else 0, chunk):
            distance = _distance(scores, rows, blocks)  # (C, G)
            ids = tuple(x.to(distance.device) for x in ids)  # moves them once, at the first block
            q_pids, g_pids, q_camids, g_camids, kept = ids
            if junk:
                distance = distance[:, kept]
            matches = q_pids[rows, None] == g_pids  # (C, G)
            wanted = matches & (q_camids[rows, None] != g_camids) if camera_rule else matches
            if single_gallery_shot:
                shots = shots or _Shots(g_pids)
            shot_ranks = None if shots is None else shots.ranks(distance, matches, wanted, tie)
            tally.add(wanted.any(1), *_match_ranks(distance, matches, wanted, tie), shot_ranks)
    if tally.empty:
        raise UsageError(_no_valid_query(ids[0], ids[1], camera_rule))
    return tally.result()


def _slices(number: int, size: int) -> Iterator[slice]:
    """0..number in blocks of `size`, the last one shorter."""
    for start in range(0, number, size):
        yield slice(start, min(start + size, number))


def _distance(scores: Scores, rows: slice, blocks: list[slice]) -> Tensor:
    """Minus the scores of one query chunk, (C, G), ours to overwrite: nearest first when sorted."""
    parts = []
    for columns in blocks:
        block = scores(rows, columns)
        _check_block(block, rows, columns)
        parts.append((-_at_least_single(block)).contiguous())  # a transposed block would stay transposed
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Tally:
    """Metrics of the queries ranked so far."""

    def __init__(self, ap: str) -> None:
        self.ap = ap
        self.precisions: list[Tensor] = []
        self.first_ranks: list[Tensor] = []
        self.penalties: list[Tensor] = []

    @property
    def empty(self) -> bool:
        """No query had a match left."""
        return not self.penalties

    def add(self, able: Tensor, ranks: Tensor, counts: Tensor, shot_ranks: Tensor | None) -> None:
        """Add C queries, those (C,) that are `able` with the ranks of V: see `_match_ranks` and `_Shots.ranks`."""
        precisions = torch.full(able.shape, torch.nan, dtype=torch.float64, device=able.device)
        self.precisions.append(precisions)
        if len(counts):
            precisions[able] = _average_precision(ranks, counts, self.ap)
            self.first_ranks.append(ranks[:, 0] if shot_ranks is None else shot_ranks.flatten())
            self.penalties.append(counts / ranks.gather(1, counts[:, None] - 1)[:, 0].double())

    def result(self) -> RankingResult:
        """Means over all queries added."""
        first = torch.cat(self.first_ranks)
        found = torch.bincount(first[first <= MAX_RANK] - 1, minlength=MAX_RANK).cumsum(0)
        precisions = torch.cat(self.precisions)
        return RankingResult(
            mAP=precisions[~precisions.isnan()].mean().item(),
            cmc=tuple((found.double() / len(first)).tolist()),
            mINP=torch.cat(self.penalties).mean().item(),
            num_valid_queries=sum(map(len, self.penalties)),
            average_precisions=tuple(precisions.tolist()),
        )


def _match_ranks(distance: Tensor, matches: Tensor, wanted: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    """Ranks of the wanted gallery images of each query.

    Args:
        distance: (C, G), overwritten.
        matches: (C, G) bool, images of the query's person.
        wanted: (C, G) bool, the matches that the same-camera rule leaves; the other matches are dropped.
        tie: distances this close are equal.

    Returns:
        ranks (V, M), 1-based and rising in the first `counts` columns of a row, junk after them; and counts (V,), the
        number of wanted images. V <= C: rows without any are left out.
    """
    row, column = wanted.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(wanted))
    nth = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]  # position within its row
    most = int(counts.max()) if len(counts) else 0
    limit = torch.full((len(counts), most), torch.inf, dtype=distance.dtype, device=distance.device)  # (C, M)
    limit[row, nth] = distance[row, column] + tie
    limit = limit.sort(1).values

    # A non-match at distance d ranks before every match whose limit is >= d: find the first of them by bisection, then
    # count how many non-matches fall between two limits. Matches of either kind are moved behind all limits.
    distance.masked_fill_(matches, torch.inf)
    bucket = torch.searchsorted(limit, distance, out_int32=True)  # (C, G), values 0..M
    bucket += torch.arange(len(counts), dtype=torch.int32, device=bucket.device)[:, None] * (most + 1)
    ahead = torch.bincount(bucket.flatten(), minlength=len(counts) * (most + 1)).view(-1, most + 1).cumsum(1)
    ranks = ahead[:, :most] + torch.arange(1, most + 1, device=ahead.device)
    return ranks[counts > 0], counts[counts > 0]


class _Shots:
    """Random galleries of one image per person, P persons; the draws of a query do not depend on the chunking."""

    def __init__(self, g_pids: Tensor) -> None:
        self.by_person = g_pids.argsort(stable=True)  # (G,)
        _, self.person_of, self.counts = torch.unique(g_pids, return_inverse=True, return_counts=True)  # -, (G,), (P,)
        self.starts = self.counts.cumsum(0) - self.counts
        self.random = np.random.default_rng(0)

    def ranks(self, distance: Tensor, matches: Tensor, wanted: Tensor, tie: float, draws: int = SHOT_DRAWS) -> Tensor:
        """Rank of the query's person in each draw, (V, draws), for the V of C queries with a wanted image.

        `distance`, `matches`, `wanted`: (C, G), and `tie`: see `_match_ranks`. A draw of the query's own person is one
        of the wanted images, of everybody else any image.
        """
        uniform = torch.from_numpy(self.random.random((len(wanted), draws, len(self.counts) + 1))).to(distance.device)
        kept = wanted.sum(1)
        able = kept > 0
        distance, matches, wanted, kept, uniform = (x[able] for x in (distance, matches, wanted, kept, uniform))
        position = self.starts + (uniform[..., :-1] * self.counts).long()  # (V, draws, P)
        others = distance.gather(1, self.by_person[position].flatten(1)).view_as(position)
        own = self.person_of[matches.int().argmax(1)]  # (V,)
        others.scatter_(2, own[:, None, None].expand(-1, draws, 1), torch.inf)
        columns = wanted.nonzero()[:, 1]
        first = kept.cumsum(0) - kept
        chosen = columns[first[:, None] + (uniform[..., -1] * kept[:, None]).long()]  # (V, draws)
        limit = distance.gather(1, chosen) + tie
        return 1 + (others <= limit[..., None]).sum(2)


def _average_precision(ranks: Tensor, counts: Tensor, ap: str) -> Tensor:
    """AP of each row: ranks (V, M) of `counts` (V,) matches, columns beyond a row's count ignored -> (V,) float64."""
    i = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    r = ranks.double()
    precision = i / r
    if ap == "trapezoid":
        before = torch.where(ranks == 1, 1.0, (i - 1) / (r - 1).clamp(min=1))
        precision = (precision + before) / 2
    return torch.where(i <= counts[:, None], precision, 0.0).sum(1) / counts


def _at_least_single(values: Tensor) -> Tensor:
    """Half precision as float32: it has too few digits to rank with."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products in plain float32, whatever the training code allows itself (autocast, TF32, bfloat16)."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with ExitStack() as stack:  # a scorer may compute on either
            for device in {"cpu", accelerator.type if accelerator else "cpu"}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _check_options(ap: str, chunk: int, gallery_chunk: int | None, tie: float) -> None:
    if ap not in AVERAGE_PRECISIONS:
        raise UsageError(unknown("average precision", ap, AVERAGE_PRECISIONS))
    if chunk < 1:
        raise UsageError(f"chunk: expected at least 1 query, got {chunk}")
    if gallery_chunk is not None and gallery_chunk < 1:
        raise UsageError(f"gallery_chunk: expected at least 1 gallery image, or None for all, got {gallery_chunk}")
    if not (math.isfinite(tie) and tie >= 0):
        raise UsageError(f"tie: expected a finite difference of scores, 0 or larger, got {tie}")


def _check_block(block: Tensor, rows: slice, columns: slice) -> None:
    where = f"scores of queries {rows.start}:{rows.stop} and gallery images {columns.start}:{columns.stop}"
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    if not _is_floats(block) or block.shape != shape:
        raise UsageError(f"{where}: expected {_FLOATS} of shape {shape}, got {_told(block)}")
    # The extremes are finite exactly when all scores are, and they cost one pass without a tensor of that size.
    if not torch.stack(block.aminmax()).isfinite().all():
        bad = int((~block.isfinite()).sum())
        raise UsageError(f"{where}: {bad} of {block.numel()} scores are not finite (NaN or inf)")


def _check_encodings(query: Tensor, gallery: Tensor) -> None:
    for name, encodings in (("query", query), ("gallery", gallery)):
        if not _is_floats(encodings) or encodings.ndim < 2 or 0 in encodings.shape[1:]:
            raise UsageError(
                f"{name}: expected {_FLOATS} of shape (N, D), or (N, ...) of a scorer of maps, got {_told(encodings)}"
            )
        # In parts: a gallery of maps is gigabytes, and so would be one mask of it.
        finite = torch.cat([part.isfinite().flatten(1).all(1) for part in torch.split(encodings, _CHECKED)])
        if not finite.all():
            raise UsageError(f"{name}: {int((~finite).sum())} of {len(encodings)} features are not finite (NaN or inf)")
    sizes = [" x ".join(map(str, encodings.shape[1:])) for encodings in (query, gallery)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"feature sizes differ: query has {sizes[0]}, gallery has {sizes[1]}")
    if query.device != gallery.device:
        raise UsageError(f"query is on {query.device}, gallery on {gallery.device}; move one of them")


def _is_floats(values: object) -> bool:
    return isinstance(values, Tensor) and values.dtype in _FLOAT_TYPES and _is_plain(values)


def _is_plain(values: Tensor) -> bool:
    """Whether it has its numbers side by side in memory: not sparse, nested, or on the meta device."""
    return values.layout == torch.strided and not values.is_nested and not values.is_meta


def _ids(name: str, values: Sized, number: int | None = None) -> Tensor:
    """Ids on the CPU, (number,) int64; without a number, of any length.

    Of whatever type they come, they are compared as int64: in the eight bits of uint8 a person 255 is `JUNK_PID`.
    """
    ids = _integers(name, values)
    if number is None and ids.ndim != 1:
        raise UsageError(f"{name}: expected a list of ids, one per image, got shape {ids.shape}")
    if number is not None and ids.shape != (number,):
        raise UsageError(f"{name}: expected {number} ids, one per image, got shape {ids.shape}")
    return torch.from_numpy(ids)


def _integers(name: str, values: object) -> NDArray[np.int64]:
    """A tensor, array or list of integers of any types. Raises UsageError for anything else."""
    told = values
    if isinstance(values, Tensor) and _is_plain(values):
        if not values.numel():  # of nothing, any type: torch.tensor([]) is of floats
            values = np.empty(values.shape, np.int64)
        elif values.dtype in _INTEGER_TYPES:
            values = values.cpu().numpy()
    if isinstance(values, Tensor | np.ma.MaskedArray | str | bytes):
        whole = None
    elif isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        whole = values
    else:
        whole = _listed(values)
    if whole is None:
        raise UsageError(f"{name}: expected whole numbers (a tensor, array or list of integers), got {_told(told)}")
    for number in (whole.min(initial=0), whole.max(initial=0)):
        if not _INT64.min <= number <= _INT64.max:
            raise UsageError(f"{name}: expected ids from -2^63 to below 2^63, got {number}")
    return whole.astype(np.int64)


def _listed(values: object) -> NDArray[Any] | None:
    """What lists, ranges and arrays of objects hold, if that is integers alone: numpy takes integers of several types
    for floats, and True for 1. What is no list of single numbers is as numpy has it."""
    try:
        array = np.asarray(values)
        if array.ndim != 1:
            return array if array.dtype.kind in "iu" else None
        return np.array([_whole(item) for item in values], object)  # type: ignore[attr-defined]
    except (TypeError, ValueError):  # rows of different lengths, what cannot be counted, what is no integer
        return None


def _whole(item: object) -> int:
    if isinstance(item, bool | np.bool_) or (isinstance(item, Tensor) and item.dtype == torch.bool):
        raise TypeError
    return operator.index(item)  # type: ignore[arg-type]


def _told(values: object) -> str:
    """What somebody gave, for a message."""
    if isinstance(values, Tensor):
        kind = "" if values.is_nested else f" of shape {tuple(values.shape)}"
        place = "" if _is_plain(values) else f" ({'nested' if values.is_nested else values.layout}, {values.device})"
        return f"{values.dtype}{kind}{place}"
    if isinstance(values, np.ndarray):
        return f"{'a masked' if isinstance(values, np.ma.MaskedArray) else 'an'} array of {values.dtype}"
    if isinstance(values, list | tuple):
        kinds = sorted({type(item).__name__ for item in values})
        return f"{type(values).__name__} of {', '.join(kinds[:4])}"
    return type(values).__name__


def _no_valid_query(q_pids: Tensor, g_pids: Tensor, camera_rule: bool) -> str:
    present = int(torch.isin(q_pids, g_pids).sum())
    line = f"no query can be evaluated: {present} of {len(q_pids)} have an image of their person in the gallery"
    if camera_rule and present:
        line += ", all of them from the query's own camera (sets without camera labels need camera_rule=False)"
    return line
