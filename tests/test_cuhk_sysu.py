"""CUHK-SYSU crops: the layouts that circulate. Camera 0 for all is fast-reid's and torchreid's rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees

from lda.data import load_dataset
from lda.errors import UsageError


@pytest.mark.parametrize("folder", ["cuhk_sysu", "cuhksysu", "CUHK-SYSU"])
def test_layout_a(tmp_path: Path, folder: str) -> None:
    trees.mark(tmp_path, cuhk_sysu=trees.cuhk_sysu(tmp_path, f"{folder}/cropped_images"))
    for root in (tmp_path, tmp_path / folder, tmp_path / folder / "cropped_images"):
        dataset = load_dataset("cuhk_sysu", root)
        assert [(r.path.name, r.pid) for r in dataset.train[:4]] == [
            ("p1_s11_1.jpg", 1), ("p1_s12_2.jpg", 1), ("p1_s13_3.jpg", 1), ("p2_s21_1.jpg", 2),
        ]  # fmt: skip
        assert {r.camid for r in dataset.train} == {0}
        assert (dataset.query, dataset.gallery) == ((), ())
    assert dataset.version == "cropped_images"


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        (
            "cropped_image",
            ["p00001_n01_s00017_hard0.png", "p00001_n02_s00018_hard1.png", "p11934_n01_s00017_hard0.png"],
        ),
        ("bounding_box_train", ["1_c0_1.jpg", "1_c1_2.jpg", "11934_c0_1.jpg"]),
    ],
)
def test_layouts_b_and_c(tmp_path: Path, folder: str, names: list[str]) -> None:
    for name in names:
        trees.image(tmp_path / "CUHK-SYSU" / folder / name)
    trees.mark(tmp_path, cuhk_sysu={"train": {"ids": 2, "images": 3, "cameras": 1}})
    dataset = load_dataset("cuhk_sysu", tmp_path)
    assert sorted(r.pid for r in dataset.train) == [1, 1, 11934]
    assert {r.camid for r in dataset.train} == {0}
    assert dataset.version == folder


def test_nested_twice(tmp_path: Path) -> None:
    trees.mark(tmp_path, cuhk_sysu=trees.cuhk_sysu(tmp_path, "cuhk_sysu/cropped_images/cropped_images"))
    assert len(load_dataset("cuhk_sysu", tmp_path).train) == 15


def test_empty_folder_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"CUHK-SYSU not found in .*: expected cuhk_sysu/cropped_images"):
        load_dataset("cuhk_sysu", tmp_path)
    (tmp_path / "cuhk_sysu/cropped_images").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"cropped_images holds no image named like p11422_s16929_1\.jpg"):
        load_dataset("cuhk_sysu", tmp_path)


def test_other_crops_are_not_mistaken_for_it(tmp_path: Path) -> None:
    trees.market1501(tmp_path, ".")
    with pytest.raises(UsageError, match="CUHK-SYSU not found"):
        load_dataset("cuhk_sysu", tmp_path)
