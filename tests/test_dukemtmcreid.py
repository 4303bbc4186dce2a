"""DukeMTMC-reID: only on request."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees

from lda.data import load_dataset
from lda.errors import UsageError


def test_only_behind_the_legacy_flag(tmp_path: Path) -> None:
    base = tmp_path / "DukeMTMC-reID"
    for pid in (1, 2):
        for camera in (2, 8):
            trees.touch(base / f"bounding_box_train/{pid:04d}_c{camera}_f0046182.jpg")
            trees.touch(base / f"query/{pid + 10:04d}_c{camera}_f0046183.jpg")
            trees.touch(base / f"bounding_box_test/{pid + 10:04d}_c{camera}_f0046184.jpg")
    trees.touch(base / "bounding_box_test/0099_c1_f0000001.jpg")
    part = {"ids": 2, "images": 4, "cameras": 2}
    trees.mark(tmp_path, dukemtmcreid={"train": part, "query": part, "gallery": {"ids": 3, "images": 5, "cameras": 3}})
    with pytest.raises(UsageError, match=r"DukeMTMC-reID was withdrawn by its authors; legacy=True"):
        load_dataset("dukemtmcreid", tmp_path)
    dataset = load_dataset("dukemtmcreid", tmp_path, legacy=True)
    assert [(r.pid, r.camid) for r in dataset.train] == [(1, 1), (1, 7), (2, 1), (2, 7)]
    assert {r.pid for r in dataset.gallery} == {11, 12, 99}


def test_it_is_not_taken_for_market1501(tmp_path: Path) -> None:
    trees.market1501(tmp_path, "DukeMTMC-reID")
    with pytest.raises(UsageError, match="do not look like 0001_c2_f0046182"):
        load_dataset("dukemtmcreid", tmp_path, legacy=True)
    with pytest.raises(UsageError, match="Market-1501 not found"):
        load_dataset("market1501", tmp_path)
