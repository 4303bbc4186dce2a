"""The four targets of Protocol-1 in the stand-in: published counts, readable, the first sets unchanged."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat

from lda.data import load_dataset
from lda.data.catalogue import facts
from lda.data.sources import build_task
from lda.data.standin.domains import DOMAINS
from lda.data.standin.draw import draw_shot, pixel_digest, plans
from lda.data.standin.layouts import FIRST, LAYOUTS
from lda.data.standin.tree import generate
from lda.data.survey import MARKER
from lda.errors import UsageError
from lda.ranking import evaluate_ranking

TARGETS = ("prid", "grid", "viper", "ilids")

# Of the five first sets at scale tiny, seed 0, before the targets joined. Units record it: it must not change.
FIRST_HASH = "8073debc7ccdc8372c40ae1802ae1dbc8f94280f102255f279406d3ce2939cde"

COUNTS = {  # part: (identities, images, cameras), see the loaders for the sources
    "prid": {"cam_a": (385, 385, 1), "cam_b": (749, 749, 1)},
    "grid": {"probe": (250, 250, 6), "gallery": (250, 1025, 6)},
    "viper": {"cam_a": (632, 632, 1), "cam_b": (632, 632, 1)},
    "ilids": {"persons": (119, 476, 8)},
}
SPLIT = {"prid": (100, 649), "grid": (125, 900), "viper": (316, 316), "ilids": (60, 60)}  # query, gallery


def images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".mat")


# --- the first sets --------------------------------------------------------------------------------------------------
def test_the_first_sets_keep_their_pixels_and_their_hash(standin_tiny: Path) -> None:
    """Every decoded pixel and every name of the five enters the hash."""
    marker = json.loads((standin_tiny / MARKER).read_text())
    assert marker["hash"] == FIRST_HASH
    assert set(marker["hashes"]) == set(TARGETS) == set(LAYOUTS) - set(FIRST)


def test_a_unit_depends_on_the_sets_it_reads(standin_tiny: Path) -> None:
    hashes = json.loads((standin_tiny / MARKER).read_text())["hashes"]
    assert len({FIRST_HASH, *hashes.values()}) == 5
    for name in FIRST:
        assert load_dataset(name, standin_tiny).data_hash == FIRST_HASH
    for name in TARGETS:
        assert load_dataset(name, standin_tiny).data_hash == hashes[name]
    assert build_task("protocol3", "cuhk03", standin_tiny).content.target == FIRST_HASH
    task = build_task("protocol1", "viper", standin_tiny)
    assert set(task.content.sources.values()) == {FIRST_HASH}
    assert task.content.target == hashes["viper"]


# --- what is on disk -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", ["tiny", "small", "full"])
def test_counts_are_the_published_ones_at_every_scale(scale: str) -> None:
    for name, plan in plans(scale, 0, TARGETS).items():
        counts = {part: (c["ids"], c["images"], c["cameras"]) for part, c in plan.counts.items()}
        assert counts == COUNTS[name]
        assert len({shot.path for shot in plan.shots}) == len(plan.shots)
        assert all(0 <= shot.camera < DOMAINS[name].cameras for shot in plan.shots)


@pytest.mark.parametrize("name", TARGETS)
def test_it_loads_strictly_with_ten_splits(standin_tiny: Path, name: str) -> None:
    dataset = load_dataset(name, standin_tiny)  # a warning would be an error here
    assert dataset.standin
    assert dataset.train == ()
    assert {(len(split.query), len(split.gallery)) for split in dataset.splits} == {SPLIT[name]}
    assert len({split.query for split in dataset.splits}) == 10
    for split in dataset.splits:
        seen = {(record.pid, record.camid) for record in split.gallery}
        pids = Counter(record.pid for record in split.gallery)
        for record in split.query:
            assert pids[record.pid] == 1
            assert (record.pid, record.camid) not in seen


@pytest.mark.parametrize("name", TARGETS)
def test_minp_is_map_for_random_features(standin_tiny: Path, name: str) -> None:
    assert facts(name).single_shot
    for split in load_dataset(name, standin_tiny).splits[:3]:
        features = torch.randn(len(split.query) + len(split.gallery), 16, generator=torch.Generator().manual_seed(0))
        query, gallery = features[: len(split.query)], features[len(split.query) :]
        result = evaluate_ranking(
            query, gallery, [r.pid for r in split.query], [r.pid for r in split.gallery],
            [r.camid for r in split.query], [r.camid for r in split.gallery],
        )  # fmt: skip
        assert result.num_valid_queries == len(split.query)
        assert result.mINP == pytest.approx(result.mAP, abs=1e-9)
        assert result.mAP < 0.2


def test_files_as_the_fields_readers_assert_them(standin_tiny: Path) -> None:
    """torchreid: PRID persons 1 to 200 in both; GRID 250 + 1025; VIPeR equal numbers; i-LIDS 119 persons."""
    prid, grid = standin_tiny / "prid_2011/single_shot", standin_tiny / "underground_reid"
    for camera, persons in (("cam_a", 385), ("cam_b", 749)):
        names = [path.name for path in images(prid / camera)]
        assert names == [f"person_{pid:04d}.png" for pid in range(1, persons + 1)]
    cameras = {part: [path.name.split("_")[:2] for path in images(grid / part)] for part in ("probe", "gallery")}
    assert {camera for names in cameras.values() for _, camera in names} == set("123456")
    assert [pid for pid, _ in cameras["probe"]] == [f"{pid:04d}" for pid in range(1, 251)]
    assert [pid for pid, _ in cameras["gallery"]] == ["0000"] * 775 + [f"{pid:04d}" for pid in range(1, 251)]
    for (pid, probe), (same, gallery) in zip(cameras["probe"], cameras["gallery"][775:], strict=True):
        assert pid == same
        assert probe != gallery
    pairs = [[path.name[:3] for path in images(standin_tiny / "VIPeR" / camera)] for camera in ("cam_a", "cam_b")]
    assert pairs[0] == pairs[1]
    assert 631 < int(pairs[0][-1]) <= 873
    persons = Counter(path.name[:4] for path in images(standin_tiny / "i-LIDS_Pedestrian/Persons"))
    assert len(persons) == 119
    assert Counter(persons.values()) == {2: 22, 3: 33, 4: 24, 5: 15, 6: 17, 7: 4, 8: 4}


def test_grid_partitions_are_read_as_torchreid_does(standin_tiny: Path) -> None:
    content = loadmat(standin_tiny / "underground_reid/features_and_partitions.mat")["trainIdxAll"][0]
    trained = [{int(pid) for pid in cell[0][0][2].flatten()} for cell in content]
    assert len(trained) == 10
    assert all(len(persons) == 125 and persons <= set(range(1, 251)) for persons in trained)
    splits = load_dataset("grid", standin_tiny).splits
    assert [{r.pid for r in split.query} for split in splits] == [set(range(1, 251)) - persons for persons in trained]


def test_the_mat_file_has_the_same_bytes_whenever_it_is_written() -> None:
    path = "underground_reid/features_and_partitions.mat"
    first, second = (plans("tiny", 0, ["grid"])["grid"].files[path] for _ in range(2))
    assert first == second
    assert b"Created on" not in first


@pytest.mark.parametrize("name", TARGETS)
def test_images_have_the_format_their_name_says(standin_tiny: Path, name: str) -> None:
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP"}
    for shot in plans("tiny", 0, [name])[name].shots[::40]:
        path = standin_tiny / shot.path
        assert pixel_digest(path.read_bytes()) == pixel_digest(draw_shot(name, shot, "tiny", 0))
        with Image.open(path) as image:
            assert image.format == formats[path.suffix]
            assert image.height > image.width > 10
            assert np.asarray(image).std() > 5


def test_people_under_two_cameras_are_the_same_and_others_are_not() -> None:
    planned = plans("tiny", 0, TARGETS)
    prid = {tuple(shot.path.split("/")[2:]): shot.person for shot in planned["prid"].shots}
    for pid in (1, 200, 201, 385):
        name = f"person_{pid:04d}.png"
        assert (prid["cam_a", name] == prid["cam_b", name]) == (pid <= 200)
    assert len(set(prid.values())) == 385 + 749 - 200
    grid = [shot for shot in planned["grid"].shots if "/0000_" in shot.path]
    assert {shot.person for shot in grid} == set(range(250, 250 + 775))


# --- trees from before -----------------------------------------------------------------------------------------------
@pytest.fixture
def older(standin_tiny: Path, tmp_path: Path) -> Path:
    """A tree as it was before i-LIDS joined (of the others, the marker and the folders are enough)."""
    marker = json.loads((standin_tiny / MARKER).read_text())
    root = tmp_path / "older"
    shutil.copytree(standin_tiny / "VIPeR", root / "VIPeR")
    for key in ("hashes", "counts"):
        del marker[key]["ilids"]
    (root / MARKER).write_text(json.dumps(marker))
    return root


def test_a_tree_that_lacks_a_set_gets_it_added(standin_tiny: Path, older: Path) -> None:
    before = load_dataset("viper", older)
    with pytest.raises(UsageError, match="i-LIDS"):
        load_dataset("ilids", older)
    marker = generate(older, "tiny", 0, processes=1)
    assert marker == json.loads((older / MARKER).read_text()) == json.loads((standin_tiny / MARKER).read_text())
    assert load_dataset("viper", older) == before
    added, whole = load_dataset("ilids", older), load_dataset("ilids", standin_tiny)
    assert added.data_hash == whole.data_hash
    for record, same in zip(added.query, whole.query, strict=True):
        assert record.path.read_bytes() == same.path.read_bytes()
    assert list(older.parent.glob(".*")) == []


def test_a_set_that_another_process_added_meanwhile_is_kept(standin_tiny: Path, older: Path) -> None:
    shutil.copytree(standin_tiny / "i-LIDS_Pedestrian", older / "i-LIDS_Pedestrian")
    placed = (older / "i-LIDS_Pedestrian").stat().st_ino
    generate(older, "tiny", 0, processes=1)
    assert (older / "i-LIDS_Pedestrian").stat().st_ino == placed
    assert load_dataset("ilids", older).standin
