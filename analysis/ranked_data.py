"""Ranked lists: what several runs of one target find first in the gallery, for the same queries.

The queries are those with the best, middle and worst AP on the mean over the runs, which favours none of them, and
those whose AP changes most from the first run to the last.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from analysis.study import print_name
from lda.data.decode import decode
from lda.data.records import ImageRecord

if TYPE_CHECKING:
    from lda.ranking import GalleryOrder
    from lda.retrieval import Retrieval

QUERIES = 5
"""Of each kind."""

DEPTH = 10
"""Counted images of a list; those that are ignored among them come on top."""

SIZE = (64, 32)
"""Height and width of a thumbnail, in pixels."""

Kind = Literal["hit", "miss", "ignored"]

Jpegs = Mapping[str, bytes]
"""Path through a network -> an image with that path's activation map over it."""


@dataclass(frozen=True)
class Picture:
    """An image as it is shown: a thumbnail (JPEG), its pid, its published camera number (None: unknown), its file."""

    jpeg: bytes
    pid: int
    camera: int | None
    file: str


@dataclass(frozen=True)
class Place:
    """An image of the gallery in a list: its rank (None where it is ignored), and the maps under a hit."""

    kind: Kind
    rank: int | None
    picture: Picture
    maps: Jpegs


@dataclass(frozen=True)
class RankedList:
    """What one run finds for a query: AP, a fraction; its maps of the query; the first places of the gallery."""

    precision: float
    maps: Jpegs
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Query:
    """A query and a list of every run, in their order."""

    picture: Picture
    lists: tuple[RankedList, ...]


@dataclass(frozen=True)
class Group:
    """Queries that were chosen for one reason."""

    title: str
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Run:
    """A run in print; mAP and Rank-1 on this query and gallery, fractions."""

    name: str
    label: str
    mAP: float  # noqa: N815 - the field's spelling
    rank1: float


@dataclass(frozen=True)
class RankedLists:
    """Everything that a page shows. `target` in print; `data`: "stand-in" or "real"; `facts`: (name, value) lines."""

    target: str
    data: str
    facts: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]
    groups: tuple[Group, ...]


# --- which queries ---------------------------------------------------------------------------------------------------


def choose(precisions: NDArray[np.float64], count: int = QUERIES) -> dict[str, list[int]]:
    """Title of a group -> positions of its queries, at most `count`.

    precisions: (R runs, Q queries) APs; nan, in every run alike, for a query without a match, which is never chosen.
    Equal ones are taken in the order of the queries, so the choice is the same wherever it is made.
    """
    able = np.flatnonzero(~np.isnan(precisions).any(0))
    mean = precisions[:, able].mean(0)
    best, worst = np.argsort(-mean, kind="stable"), np.argsort(mean, kind="stable")
    middle = max(len(able) - count, 0) // 2
    chosen = {
        f"Best AP, mean of {len(precisions)} runs" if len(precisions) > 1 else "Best AP": best[:count],
        "Middle AP": best[middle : middle + count],
        "Worst AP": worst[:count],
    }
    if len(precisions) > 1:
        change = np.abs(precisions[-1, able] - precisions[0, able])
        most = np.argsort(-change, kind="stable")[:count]
        chosen["AP that changed most from the first run to the last"] = most[change[most] > 0]
    return {title: able[positions].tolist() for title, positions in chosen.items()}


# --- what is shown of them -------------------------------------------------------------------------------------------


def ranked_lists(runs: Sequence[Retrieval], count: int = QUERIES, depth: int = DEPTH) -> RankedLists:
    """The lists of runs on one query and gallery. Raises UsageError for an image that cannot be decoded."""
    groups = choose(np.stack([run.precisions for run in runs]), count)
    asked = sorted({query for queries in groups.values() for query in queries})
    pictures = _Pictures(runs[0].split.camera_rule)
    of_runs = [_lists(run, asked, depth, pictures) for run in runs]
    first = runs[0]
    shown = {
        query: Query(pictures.of(first.split.query[query]), tuple(lists[query] for lists in of_runs)) for query in asked
    }
    matched = int((~np.isnan(first.precisions)).sum())
    queries = f"{matched:,} with a match in {len(first.split.gallery):,} gallery images"
    split = [("split", f"{first.number} of {first.num_splits}, numbered from 0")] if first.num_splits > 1 else []
    return RankedLists(
        target=print_name(first.split.name),
        data=first.data,
        facts=(
            ("queries", queries if matched == len(first.precisions) else f"{queries}, of {len(first.precisions):,}"),
            *split,
            ("AP", f"average precision by {first.average_precision}"),
            ("images", f"content hash {first.content[:12]}"),
        ),
        runs=tuple(Run(run.name, run.label, run.mAP, run.rank1) for run in runs),
        groups=tuple(
            Group(title, tuple(shown[query] for query in queries)) for title, queries in groups.items() if queries
        ),
    )


def _lists(run: Retrieval, asked: Sequence[int], depth: int, pictures: _Pictures) -> dict[int, RankedList]:
    """Query -> its list."""
    order, gallery = run.order(asked), run.split.gallery
    places = [_places(order, row, depth) for row in range(len(asked))]
    queries = [run.split.query[query] for query in asked]
    hits = [gallery[position] for row in places for position, kind, _ in row if kind == "hit"]
    records = list({record.path: record for record in (*queries, *hits)}.values())
    maps = pictures.with_maps(records, run.activation_maps(records))
    return {
        query: RankedList(
            float(run.precisions[query]),
            maps[record.path],
            tuple(
                Place(kind, rank, pictures.of(gallery[place]), maps[gallery[place].path] if kind == "hit" else {})
                for place, kind, rank in row
            ),
        )
        for query, record, row in zip(asked, queries, places, strict=True)
    }


def _places(order: GalleryOrder, row: int, depth: int) -> list[tuple[int, Kind, int | None]]:
    """(place in the gallery, kind, rank) of one query's first `depth` counted images and those ignored among them."""
    counted = order.counted[row]
    ranks = counted.cumsum()
    end = int(np.searchsorted(ranks, depth)) + 1  # just behind the last of them; beyond a shorter gallery
    kinds: list[Kind] = ["hit" if match else "miss" for match in order.matches[row, :end]]
    return [
        (int(place), kind, int(rank)) if known else (int(place), "ignored", None)
        for place, kind, rank, known in zip(order.positions[row, :end], kinds, ranks, counted, strict=False)
    ]


class _Pictures:
    """Thumbnails, each decoded once. Without `cameras` their numbers mean nothing."""

    def __init__(self, cameras: bool) -> None:
        self._cameras = cameras
        self._known: dict[Path, tuple[NDArray[np.uint8], Picture]] = {}

    def of(self, record: ImageRecord) -> Picture:
        """An image of the query or the gallery."""
        return self._read(record)[1]

    def with_maps(
        self, records: Sequence[ImageRecord], maps: Mapping[str, NDArray[np.float32]]
    ) -> dict[Path, dict[str, bytes]]:
        """Images with the maps (N, h, w) of N of them laid over, by their files."""
        return {
            record.path: {path: _jpeg(_overlaid(self._read(record)[0], of_path[n])) for path, of_path in maps.items()}
            for n, record in enumerate(records)
        }

    def _read(self, record: ImageRecord) -> tuple[NDArray[np.uint8], Picture]:
        if record.path not in self._known:
            pixels = decode(record.path, *SIZE).transpose(1, 2, 0)
            camera = record.camid + 1 if self._cameras else None
            self._known[record.path] = pixels, Picture(_jpeg(pixels), record.pid, camera, record.path.name)
        return self._known[record.path]


def _overlaid(pixels: NDArray[np.uint8], energy: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image in grey under a map (h, w), whose own range is that of the colours."""
    low, high = float(energy.min()), float(energy.max())
    scaled = (energy - low) / max(high - low, 1e-12)
    large = Image.fromarray(scaled.astype(np.float32)).resize(SIZE[::-1], Image.Resampling.BILINEAR)
    colours = mpl.colormaps["inferno"](np.asarray(large))[..., :3]
    grey = pixels.mean(2, keepdims=True) / 255
    return np.asarray(255 * (0.4 * grey + 0.6 * colours), dtype=np.uint8)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()
