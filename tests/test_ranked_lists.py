"""Ranked lists: which queries, what stands where, and a page that needs nothing but itself."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import lda
from analysis import ranked_lists as command
from analysis.ranked_data import DEPTH, RankedLists, choose, ranked_lists
from analysis.ranked_page import fragment, page
from lda.checkpoint import read_checkpoint
from lda.config import preset
from lda.data.decode import decode
from lda.data.records import ImageRecord
from lda.data.transforms import normalise
from lda.errors import UsageError
from lda.retrieval import Retrieval, open_retrievals
from lda.runs import Result
from lda.unit import run_unit

METHODS = ("baseline", "lda")


@pytest.fixture(scope="module")
def finished(standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two finished runs of a few steps on the target CUHK03."""
    settings: dict[str, Any] = {"epochs": 1, "steps_per_epoch": 4, "warmup_epochs": 0, "milestones": (), "threads": 1}
    folders = []
    for method in METHODS:
        folders.append(tmp_path_factory.mktemp(method))
        config = preset("standin", method=method, target="cuhk03", wandb="disabled", **settings)
        run_unit(config, folders[-1], data_root=standin_tiny)
    return folders


@pytest.fixture(scope="module")
def runs(finished: list[Path], standin_tiny: Path) -> list[Retrieval]:
    return open_retrievals(finished, standin_tiny, None)


@pytest.fixture(scope="module")
def lists(runs: list[Retrieval]) -> RankedLists:
    return ranked_lists(runs)


def test_choice_of_queries() -> None:
    first = np.array([0.5, np.nan, 0.9, 0.1, 0.9, 0.2, 0.4])
    last = np.array([0.5, np.nan, 0.9, 0.5, 0.9, 0.0, 0.8])  # means .5 nan .9 .3 .9 .1 .6
    assert list(choose(np.stack([first, last]), 2).values()) == [[2, 4], [6, 0], [5, 3], [3, 6]]
    assert list(choose(first[None], 3).values()) == [[2, 4, 0], [4, 0, 6], [3, 5, 6]]
    unchanged = choose(np.stack([first, first]), 2)
    assert unchanged["AP that changed most from the first run to the last"] == []
    assert list(choose(first[None], 50).values()) == [[2, 4, 0, 6, 5, 3], [2, 4, 0, 6, 5, 3], [3, 5, 6, 0, 2, 4]]


def test_precisions_are_those_of_the_evaluation(finished: list[Path], runs: list[Retrieval]) -> None:
    for folder, run in zip(finished, runs, strict=True):
        result = Result.read(folder)
        assert run.mAP == pytest.approx(result.mAP, abs=1e-6)
        assert run.rank1 == pytest.approx(result.rank1, abs=1e-6)
        assert np.nanmean(run.precisions) == pytest.approx(result.mAP, abs=1e-6)
        assert (~np.isnan(run.precisions)).sum() == result.num_valid_queries


def encoded(folder: Path, records: tuple[ImageRecord, ...]) -> Tensor:
    """Features (N, D) of images, by the public door."""
    method = lda.load(folder / "checkpoint.pt")
    images = torch.stack([torch.from_numpy(decode(record.path, 64, 32)) for record in records])
    with torch.inference_mode():
        return F.normalize(torch.cat([method(normalise(part)) for part in images.split(64)]))


NOISE = 1e-6  # cosines that differ by less may change places between machines


def precision_by_hand(
    similarity: list[float], asked: ImageRecord, gallery: tuple[ImageRecord, ...], up: float
) -> float:
    """AP where every match is moved up by some similarity."""
    images = []
    for value, record in zip(similarity, gallery, strict=True):
        match = record.pid == asked.pid
        if not (match and record.camid == asked.camid):
            images.append((-value - up * match, match))
    terms: list[float] = []
    for rank, (_, match) in enumerate(sorted(images), start=1):
        terms += [(len(terms) + 1) / rank] * match
    return statistics.fmean(terms)


def test_lists_against_a_slow_loop(finished: list[Path], runs: list[Retrieval], lists: RankedLists) -> None:
    """Every list that is shown, image by image, and its AP by hand."""
    split = runs[0].split
    shown = {query.picture.file: query for group in lists.groups for query in group.queries}
    assert len(shown) >= 5
    for number, folder in enumerate(finished):
        query, gallery = encoded(folder, split.query), encoded(folder, split.gallery)
        for feature, asked in zip(query, split.query, strict=True):
            if asked.path.name not in shown:
                continue
            found = shown[asked.path.name].lists[number]
            similarity = (gallery @ feature).tolist()
            left = {record.path.name: (record, value) for record, value in zip(split.gallery, similarity, strict=True)}
            rank = 0
            for place in found.places:
                record, value = left.pop(place.picture.file)
                assert all(other <= value + NOISE for _, other in left.values())
                ignored = record.pid == asked.pid and record.camid == asked.camid
                rank += not ignored
                kind = "ignored" if ignored else "hit" if record.pid == asked.pid else "miss"
                assert (place.kind, place.rank) == (kind, None if ignored else rank)
                assert (place.picture.pid, place.picture.camera) == (record.pid, record.camid + 1)
            assert rank == DEPTH
            low, high = (precision_by_hand(similarity, asked, split.gallery, up) for up in (-NOISE, NOISE))
            assert low - 1e-9 <= found.precision <= high + 1e-9
            assert high - low < 0.1


def test_maps_under_the_query_and_its_hits_alone(lists: RankedLists) -> None:
    hits = 0
    for query in (query for group in lists.groups for query in group.queries):
        for found, paths in zip(query.lists, ({""}, {"E", "A"}), strict=True):
            assert set(found.maps) == paths
            for place in found.places:
                assert set(place.maps) == (paths if place.kind == "hit" else set())
                hits += place.kind == "hit"
            with Image.open(io.BytesIO(found.maps[min(paths)])) as image:
                assert (image.format, image.size) == ("JPEG", (32, 64))
    assert hits


def test_the_page_stands_alone_and_is_the_same_again(runs: list[Retrieval], lists: RankedLists) -> None:
    text = page(lists)
    assert text == page(ranked_lists(runs))
    sources = re.findall(r'src="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert max(map(len, sources)) < 3000
    assert not re.search(r"https?:|url\(|@import|<script|<link|href=", text)
    assert "STAND-IN" in text
    assert "<dt>split</dt>" not in text
    for run, label in zip(runs, ("plain BN, seed 0", "LDA, fused, seed 0"), strict=True):
        assert f"<b>{label}</b>: mAP {100 * run.mAP:.1f}" in text
    assert text.count("<article>") == sum(len(group.queries) for group in lists.groups)


def test_the_style_touches_nothing_else(lists: RankedLists) -> None:
    style = fragment(lists).split("<style>")[1].split("</style>")[0]
    selectors = [one.strip() for rule in re.findall(r"([^{}]+)\{", style) for one in rule.split(",")]
    assert selectors
    assert [one for one in selectors if not one.startswith(".ranked-lists")] == []


def test_frames_differ_by_more_than_colour(lists: RankedLists) -> None:
    text = fragment(lists)
    lines = dict(re.findall(r"li\.(\w+) > img[^{]*\{ border-style: (\w+)", text))
    assert lines == {"hit": "solid", "miss": "dashed", "ignored": "dotted"}
    marks = {kind: set(re.findall(rf'<li class="{kind}"[^>]*><b>(.)', text)) for kind in ("hit", "miss")}
    assert marks == {"hit": {"✓"}, "miss": {"✗"}}


def copy_of(folder: Path, place: Path, **changes: Any) -> Path:
    """The run with other settings in its checkpoint, unfinished."""
    place.mkdir()
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    dataclasses.replace(checkpoint, config=checkpoint.config.replace(**changes)).save(place / "checkpoint.pt")
    return place


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": "market1501"}, "target is market1501, that of"),
        ({"test_split": 0}, "test_split is 0, that of"),
        ({"average_precision": "trapezoid"}, "average_precision is trapezoid, that of"),
        ({"cuhk03_boxes": "detected"}, r"query and gallery is detected, content hash \w+, that of \S+ is labeled"),
    ],
)
def test_runs_that_do_not_compare_are_one_line(
    changes: dict[str, Any], told: str, finished: list[Path], standin_tiny: Path, tmp_path: Path
) -> None:
    other = copy_of(finished[0], tmp_path / "other", **changes)
    with pytest.raises(UsageError, match=told) as refused:
        open_retrievals([finished[0], other], standin_tiny, None)
    assert "\n" not in str(refused.value)


def test_other_images_than_it_was_tested_on(finished: list[Path], standin_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    result = Result.read(tmp_path / "run")
    dataclasses.replace(result, content=dataclasses.replace(result.content, target="0123")).write(tmp_path / "run")
    with pytest.raises(UsageError, match="was tested on images of hash 0123, those of cuhk03 in "):
        open_retrievals([tmp_path / "run"], standin_tiny, None)


def test_the_command(
    finished: list[Path], standin_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lists: RankedLists
) -> None:
    output = tmp_path / "out" / "lists.html"
    folders = list(map(str, finished))
    assert command.main([*folders, "--data-root", str(standin_tiny), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert output.read_text(encoding="utf-8") == page(lists)
    for mistake, told in (
        ([str(tmp_path), "--output", str(output)], "checkpoint.pt' is not a file; a run writes it as"),
        ([folders[0], "--data-root", str(standin_tiny), "--output", str(output), "--split", "3"], "1 split(s)"),
        ([folders[0]], "the following arguments are required: --output"),
    ):
        assert command.main(mistake) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
