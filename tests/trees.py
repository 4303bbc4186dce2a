"""Tiny data sets on disk in the published layouts, written by hand so that tests know every name in them.

Each builder writes below `root` and returns part -> {"ids", "images", "cameras"} as a correct reader must count them.
`mark` writes STANDIN.json, so that strict reading compares with these counts and not with the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

Counts = dict[str, dict[str, int]]
TEST_PARTS = ("train", "query", "bounding_box_test")


def image(path: Path, size: tuple[int, int] = (8, 16)) -> None:
    """A small image of (width, height), its colours fixed by the file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def mark(root: Path, **counts: Counts) -> None:
    """STANDIN.json with the counts of some data sets; of no version whose drawing could be compared."""
    content = {"version": 0, "seed": 0, "scale": "tiny", "counts": counts, "hash": "0123abcd"}
    (root / "STANDIN.json").write_text(json.dumps(content))


def market1501(root: Path, folder: str = "Market-1501-v15.09.15") -> Counts:
    """4 training persons with 3 images in each of two cameras; 3 test persons; background and junk."""
    base = root / folder
    for pid in (2, 7, 11, 30):
        for camera in (1, 4):
            for shot in range(3):
                image(base / f"bounding_box_train/{pid:04d}_c{camera}s1_{shot:06d}_00.jpg")
    for pid in (1, 3, 5):
        for camera in (2, 6):
            image(base / f"query/{pid:04d}_c{camera}s1_000050_00.jpg")
            image(base / f"bounding_box_test/{pid:04d}_c{camera}s2_000060_01.jpg")
    for name in ("0000_c1s1_000001_01", "0000_c3s2_000002_01", "-1_c1s1_000003_01", "-1_c5s1_000004_02"):
        image(base / f"bounding_box_test/{name}.jpg")
    (base / "bounding_box_train/Thumbs.db").write_bytes(b"clutter")
    return {
        "train": {"ids": 4, "images": 24, "cameras": 2},
        "query": {"ids": 3, "images": 6, "cameras": 2},
        "gallery": {"ids": 3, "images": 8, "cameras": 4},
    }


def msmt17(root: Path, folder: str = "MSMT17_V1", train: str = "train", test: str = "test") -> Counts:
    """3 training persons (4 listed images and 1 for validation), 2 test persons; both parts numbered from 0."""
    base = root / folder
    lists: dict[str, list[str]] = {"train": [], "val": [], "query": [], "gallery": []}

    def add(part: str, pid: int, number: int, camera: int) -> None:
        name = f"{pid:04d}/{pid:04d}_{number:03d}_{camera:02d}_0303morning_{number:04d}_0.jpg"
        image(base / (train if part in ("train", "val") else test) / name)
        lists[part].append(f"{name} {pid}\n")

    for pid in range(3):
        for number in range(4):
            add("train", pid, number, 1 + 7 * (number % 2))
        add("val", pid, 4, 15)
    for pid in range(2):
        for number, camera in enumerate((3, 9)):
            add("query", pid, number, camera)
            add("gallery", pid, 2 + number, camera)
    for part, lines in lists.items():
        (base / f"list_{part}.txt").write_text("".join(lines))
    return {
        "train": {"ids": 3, "images": 12, "cameras": 2},
        "val": {"ids": 3, "images": 3, "cameras": 1},
        "query": {"ids": 2, "images": 4, "cameras": 2},
        "gallery": {"ids": 2, "images": 4, "cameras": 2},
    }


def cuhk_sysu(root: Path, folder: str = "cuhk_sysu/cropped_images") -> Counts:
    """5 persons, 3 images each."""
    for pid in range(1, 6):
        for number in range(1, 4):
            image(root / folder / f"p{pid}_s{10 * pid + number}_{number}.jpg")
    return {"train": {"ids": 5, "images": 15, "cameras": 1}}


def cuhk02(root: Path, folder: str = "cuhk02/Dataset") -> Counts:
    """2 persons in each of the five pairs, two images in each view; the same two numbers in every pair."""
    for pair in range(1, 6):
        for view in (1, 2):
            for pid in (1, 2):
                for number in (1, 2):
                    image(root / folder / f"P{pair}/cam{view}/{pid:03d}_{number:04d}.png")
    return {"train": {"ids": 10, "images": 40, "cameras": 10}}


def cuhk03_np(root: Path, folder: str = "cuhk03-np") -> Counts:
    """3 training and 2 test persons; the labeled boxes have one training image more than the detected."""
    counts: Counts = {}
    for boxes in ("labeled", "detected"):
        base = root / folder / boxes
        for pid in (1, 4, 5):
            for view in (1, 2):
                for number in (1, 2):
                    if (boxes, pid, view, number) != ("detected", 5, 2, 2):
                        image(base / f"bounding_box_train/{pid:04d}_c{view}_{number}.png")
        for pid in (2, 3):
            for view in (1, 2):
                image(base / f"query/{pid:04d}_c{view}_1.png")
                image(base / f"bounding_box_test/{pid:04d}_c{view}_2.png")
        counts[f"{boxes}/train"] = {"ids": 3, "images": 12 - (boxes == "detected"), "cameras": 2}
        for part in ("query", "gallery"):
            counts[f"{boxes}/{part}"] = {"ids": 2, "images": 4, "cameras": 2}
    return counts


def protocol_sets(root: Path) -> Mapping[str, Counts]:
    """The sets of Protocol-2 and 3 and CUHK02, with their marker."""
    counts = {
        "market1501": market1501(root),
        "msmt17": msmt17(root),
        "cuhk_sysu": cuhk_sysu(root),
        "cuhk02": cuhk02(root),
        "cuhk03": cuhk03_np(root),
    }
    mark(root, **counts)
    return counts


# --- the single-shot targets, with their real numbers of files (empty ones: a reader needs names only) ---------------
def touch(path: Path) -> None:
    """An empty file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def prid(root: Path, folder: str = "prid_2011/single_shot") -> Counts:
    """385 persons in camera A, 749 in camera B; beside them the empty multi_shot folder of the archive."""
    for camera, persons in (("cam_a", 385), ("cam_b", 749)):
        for pid in range(1, persons + 1):
            touch(root / folder / camera / f"person_{pid:04d}.png")
        (root / folder).parent.joinpath("multi_shot", camera).mkdir(parents=True)
    return {
        "cam_a": {"ids": 385, "images": 385, "cameras": 1},
        "cam_b": {"ids": 749, "images": 749, "cameras": 1},
    }


def viper_numbers() -> list[int]:
    """632 person numbers of 0 to 873, with gaps."""
    return sorted(np.random.default_rng(0).permutation(874)[:632].tolist())


def viper(root: Path, folder: str = "VIPeR") -> Counts:
    """632 pairs; the viewing angles differ between the cameras."""
    for pid in viper_numbers():
        touch(root / folder / "cam_a" / f"{pid:03d}_{45 * (pid % 4)}.bmp")
        touch(root / folder / "cam_b" / f"{pid:03d}_{45 * (pid % 3) + 90}.bmp")
    part = {"ids": 632, "images": 632, "cameras": 1}
    return {"cam_a": part, "cam_b": part}


def ilids(root: Path, folder: str = "i-LIDS_Pedestrian/Persons") -> Counts:
    """119 persons with the published histogram of images per person: 2:22 3:33 4:24 5:15 6:17 7:4 8:4."""
    histogram = {2: 22, 3: 33, 4: 24, 5: 15, 6: 17, 7: 4, 8: 4}
    sizes = [images for images, persons in histogram.items() for _ in range(persons)]
    for pid, images in enumerate(np.random.default_rng(0).permutation(sizes).tolist(), start=1):
        for number in range(1, images + 1):
            touch(root / folder / f"{pid:04d}{number:03d}.jpg")
    return {"persons": {"ids": 119, "images": 476, "cameras": 8}}


GRID_PAIRS = ((1, 2), (2, 1), (3, 2), (4, 5), (5, 4), (6, 5))  # cameras of probe and gallery that occur


def grid_partitions() -> list[list[int]]:
    """The persons that train in each of ten partitions."""
    return [sorted((np.random.default_rng(s).permutation(250)[:125] + 1).tolist()) for s in range(10)]


def grid(root: Path, folder: str = "underground_reid") -> Counts:
    """250 pairs, 775 further gallery images, and the partitions as the original .mat file stores them."""
    for pid in range(1, 251):
        probe, gallery = GRID_PAIRS[pid % 6]
        touch(root / folder / "probe" / f"{pid:04d}_{probe}_25004_107_32_106_221.jpeg")
        touch(root / folder / "gallery" / f"{pid:04d}_{gallery}_25023_116_74_90_202.jpeg")
    for number in range(775):
        touch(root / folder / "gallery" / f"0000_{number % 6 + 1}_{number}_94_10_62_143.jpeg")
    cells = np.empty((1, 10), dtype=object)
    for split, trained in enumerate(grid_partitions()):
        cells[0, split] = {"a": np.zeros((1, 3)), "b": np.zeros((1, 3)), "c": np.array([trained], dtype=float)}
    savemat(root / folder / "features_and_partitions.mat", {"trainIdxAll": cells})
    return {
        "probe": {"ids": 250, "images": 250, "cameras": 6},
        "gallery": {"ids": 250, "images": 1025, "cameras": 6},
    }
