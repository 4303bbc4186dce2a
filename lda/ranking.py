"""Retrieval metrics of person ReID: mAP, CMC (Rank-k) and mINP, in bounded memory.

Shapes: Q queries, G gallery images, D feature size, C queries of one chunk, M most matches of a query in the chunk.

For one query let r_1 < ... < r_n be the 1-based ranks of its n matches in the gallery sorted by falling cosine
similarity, after the same-camera rule. Then

    CMC@k = 1 if r_1 <= k else 0          AP = mean_i i / r_i          INP = n / r_n

averaged over the queries that have a match left. Only these ranks are needed, and the i-th match has rank
i + (non-matches at least as similar as it), so the gallery is counted, never sorted: what costs is the matrix product.

Ties count against the query. Two similarities closer than `TIE` are equal as far as a float32 product can tell, and a
non-match that ties with a match ranks before it. So features that say nothing (a collapsed network) score worst
instead of scoring the order of a file list, and the order of the gallery and the chunking do not matter: one product
of the same two vectors differs in its last digits between positions and shapes of a matrix, up to 6e-8 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class RankingResult:
    """Metrics of one query and gallery set, as fractions.

    Attributes:
        mAP: mean average precision over valid queries.
        cmc: cmc[k - 1] is the share of valid queries with a match among the first k; always `MAX_RANK` long, a shorter
            gallery repeats its last value.
        mINP: mean inverse negative penalty, n / r_n; equals mAP where every query has one match.
        num_valid_queries: queries with at least one match left after the same-camera rule; the others are skipped.
    """

    mAP: float  # noqa: N815 - the field's spelling
    cmc: tuple[float, ...]
    mINP: float  # noqa: N815
    num_valid_queries: int

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


@torch.no_grad()
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
        query: (Q, D) floating-point features on any device, L2-normalised here.
        gallery: (G, D), same device.
        query_pids: (Q,) person ids; tensor, array or list of whole numbers, as are the next three.
        gallery_pids: (G,) person ids. Distractors (an id no query has, such as Market-1501's 0) stay in the gallery.
        query_camids: (Q,) camera ids.
        gallery_camids: (G,) camera ids.
        ap: "step", mean_i i / r_i; or "trapezoid", mean_i (i / r_i + o_i) / 2 with o_i = (i - 1) / (r_i - 1), and 1 at
            r_i = 1: the average precision of Market-1501's MATLAB code, half as large for a lone match at rank > 1.
        camera_rule: drop gallery images of the query's own person and camera. False for sets without camera labels,
            where the rule would drop every match.
        chunk: queries ranked at a time; memory grows with chunk * G, never with Q * G. It cannot change a result.
        single_gallery_shot: CMC by CUHK03's old protocol (Li et al., CVPR 2014): for every query the gallery is one
            random image of each person, drawn `SHOT_DRAWS` times from a fixed seed, and the curves are averaged. mAP
            and mINP still rank the whole gallery.

    Raises:
        UsageError: (a ValueError) sizes that do not fit, features that are not finite, an unknown `ap`, or no query
            with a match left.
    """
    if ap not in AVERAGE_PRECISIONS:
        raise UsageError(unknown("average precision", ap, AVERAGE_PRECISIONS))
    if chunk < 1:
        raise UsageError(f"chunk: expected at least 1 query, got {chunk}")
    _check_features(query, gallery)
    q_pids = _ids("query_pids", query_pids, query)
    g_pids = _ids("gallery_pids", gallery_pids, gallery)
    q_camids = _ids("query_camids", query_camids, query)
    g_camids = _ids("gallery_camids", gallery_camids, gallery)

    kept = g_pids != JUNK_PID
    if not kept.all():
        gallery, g_pids, g_camids = gallery[kept], g_pids[kept], g_camids[kept]
    gallery = _normalised(gallery)

    shots = _Shots(g_pids) if single_gallery_shot else None
    precisions, first_ranks, penalties = [], [], []
    with _full_precision(gallery.device):
        for start in range(0, len(query), chunk):
            rows = slice(start, start + chunk)
            matches = q_pids[rows, None] == g_pids  # (C, G)
            wanted = matches & (q_camids[rows, None] != g_camids) if camera_rule else matches
            # Minus the cosine: nearest first when sorted, and its order is that of the Euclidean distance.
            distance = -_normalised(query[rows]) @ gallery.T  # (C, G)
            shot_ranks = None if shots is None else shots.ranks(distance, matches, wanted)
            ranks, counts = _match_ranks(distance, matches, wanted)
            if len(counts):
                precisions.append(_average_precision(ranks, counts, ap))
                first_ranks.append(ranks[:, 0] if shot_ranks is None else shot_ranks.flatten())
                penalties.append(counts / ranks.gather(1, counts[:, None] - 1)[:, 0].double())

    if not precisions:
        raise UsageError(_no_valid_query(q_pids, g_pids, camera_rule))
    first = torch.cat(first_ranks)
    found = torch.bincount(first[first <= MAX_RANK] - 1, minlength=MAX_RANK).cumsum(0)
    return RankingResult(
        mAP=torch.cat(precisions).mean().item(),
        cmc=tuple((found.double() / len(first)).tolist()),
        mINP=torch.cat(penalties).mean().item(),
        num_valid_queries=sum(map(len, penalties)),
    )


def _match_ranks(distance: Tensor, matches: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the wanted gallery images of each query.

    Args:
        distance: (C, G), overwritten.
        matches: (C, G) bool, images of the query's person.
        wanted: (C, G) bool, the matches that the same-camera rule leaves; the other matches are dropped.

    Returns:
        ranks (V, M), 1-based and rising in the first `counts` columns of a row, junk after them; and counts (V,), the
        number of wanted images. V <= C: rows without any are left out.
    """
    row, column = wanted.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(wanted))
    nth = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]  # position within its row
    most = int(counts.max()) if len(counts) else 0
    limit = torch.full((len(counts), most), torch.inf, dtype=distance.dtype, device=distance.device)  # (C, M)
    limit[row, nth] = distance[row, column] + TIE
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

    def ranks(self, distance: Tensor, matches: Tensor, wanted: Tensor, draws: int = SHOT_DRAWS) -> Tensor:
        """Rank of the query's person in each draw, (V, draws), for the V of C queries with a wanted image.

        `distance`, `matches`, `wanted`: (C, G), see `_match_ranks`. A draw of the query's own person is one of the
        wanted images, of everybody else any image.
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
        limit = distance.gather(1, chosen) + TIE
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


def _normalised(features: Tensor) -> Tensor:
    # Half precision is too coarse to rank with: its rounding alone makes ties.
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in plain float32, whatever the training code allows itself (autocast, TF32, bfloat16)."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _check_features(query: Tensor, gallery: Tensor) -> None:
    for name, features in (("query", query), ("gallery", gallery)):
        if features.ndim != 2 or not features.is_floating_point():
            raise UsageError(f"{name}: expected (N, D) floats, got {features.dtype} of shape {tuple(features.shape)}")
        finite = features.isfinite().all(1)
        if not finite.all():
            raise UsageError(f"{name}: {int((~finite).sum())} of {len(features)} features are not finite (NaN or inf)")
    if query.shape[1] != gallery.shape[1]:
        raise UsageError(f"feature sizes differ: query has {query.shape[1]}, gallery has {gallery.shape[1]}")


def _ids(name: str, values: Sized, features: Tensor) -> Tensor:
    ids = torch.as_tensor(values, device=features.device)
    if ids.shape != features.shape[:1]:
        raise UsageError(f"{name}: expected {len(features)} ids, one per feature, got shape {tuple(ids.shape)}")
    return ids


def _no_valid_query(q_pids: Tensor, g_pids: Tensor, camera_rule: bool) -> str:
    present = int(torch.isin(q_pids, g_pids).sum())
    line = f"no query can be evaluated: {present} of {len(q_pids)} have an image of their person in the gallery"
    if camera_rule and present:
        line += ", all of them from the query's own camera (sets without camera labels need camera_rule=False)"
    return line
