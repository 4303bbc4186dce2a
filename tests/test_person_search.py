"""CUHK-SYSU's person-search release cut into crops: MetaBIN's names and boxes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image
from scipy.io import savemat

from lda.data import load_dataset
from lda.data.person_search import Appearance, crop_persons, main, read_appearances
from lda.errors import UsageError

APPEARANCES = [
    Appearance(1, 1, "s12.jpg", (1, 1, 9, 19), False),
    Appearance(1, 2, "s15.jpg", (11, 5, 14, 30), True),
    Appearance(11934, 1, "s12.jpg", (0, 3, 10, 12), False),  # a box that begins at 0: MATLAB would fail
    Appearance(11934, 2, "s15.jpg", (30, 40, 9, 9), False),  # ends on the last pixel
]


def _release(root: Path) -> Path:
    """Person.mat as MATLAB writes an array of structs, and two scenes of 40 x 50 pixels."""
    for name in ("s12", "s15"):
        trees.image(root / f"Image/SSM/{name}.jpg", (40, 50))
    scene_type = [("imname", object), ("idlocate", object), ("ishard", object)]
    persons = np.empty((1, 2), dtype=[("idname", object), ("nAppear", object), ("scene", object)])
    for column, pid in enumerate((1, 11934)):
        own = [a for a in APPEARANCES if a.person == pid]
        scenes = np.empty((1, len(own)), dtype=scene_type)
        for index, a in enumerate(own):
            scenes[0, index] = (a.scene, np.array([a.box], dtype=float), float(a.hard))
        persons[0, column] = (f"p{pid}", float(len(own)), scenes)
    (root / "annotation").mkdir()
    savemat(root / "annotation/Person.mat", {"Person": persons})
    return root


def test_appearances(tmp_path: Path) -> None:
    assert read_appearances(_release(tmp_path) / "annotation/Person.mat") == APPEARANCES


def test_crops_are_matlabs(tmp_path: Path) -> None:
    """MATLAB: im(y:y+h, x:x+w, :), counted from 1."""
    release = _release(tmp_path / "release")
    assert crop_persons(release, tmp_path / "data") == 4
    folder = tmp_path / "data/CUHK-SYSU/cropped_image"
    assert sorted(path.name for path in folder.iterdir()) == [
        "p00001_n01_s00012_hard0.png", "p00001_n02_s00015_hard1.png",
        "p11934_n01_s00012_hard0.png", "p11934_n02_s00015_hard0.png",
    ]  # fmt: skip
    for appearance in APPEARANCES:
        scene = np.asarray(Image.open(release / "Image/SSM" / appearance.scene).convert("RGB"))
        x, y, width, height = appearance.box
        rows, columns = range(max(y, 1), y + height + 1), range(max(x, 1), x + width + 1)
        expected = scene[[row - 1 for row in rows]][:, [column - 1 for column in columns]]
        assert np.array_equal(np.asarray(Image.open(folder / appearance.file_name)), expected)
    trees.mark(tmp_path / "data", cuhk_sysu={"train": {"ids": 2, "images": 4, "cameras": 1}})
    assert [r.pid for r in load_dataset("cuhk_sysu", tmp_path / "data").train] == [1, 1, 11934, 11934]


def test_the_loader_names_the_command(tmp_path: Path) -> None:
    _release(tmp_path / "CUHK-SYSU")
    with pytest.raises(UsageError, match=r"person-search release; crop the persons with python -m lda\.data\.person_s"):
        load_dataset("cuhk_sysu", tmp_path)
    assert main(["--input", str(tmp_path / "CUHK-SYSU"), "--output", str(tmp_path)]) == 0
    trees.mark(tmp_path, cuhk_sysu={"train": {"ids": 2, "images": 4, "cameras": 1}})
    assert len(load_dataset("cuhk_sysu", tmp_path).train) == 4


def test_refusals(tmp_path: Path) -> None:
    release = _release(tmp_path / "release")
    crop_persons(release, tmp_path / "data")
    with pytest.raises(UsageError, match="exists already"):
        crop_persons(release, tmp_path / "data")
    (release / "Image/SSM/s15.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"s15\.jpg: cannot be decoded \(it is empty\)"):
        crop_persons(release, tmp_path / "more")
    assert not list((tmp_path / "more/CUHK-SYSU").iterdir())
    (release / "Image/SSM/s15.jpg").unlink()
    with pytest.raises(UsageError, match=r"lacks 1 of 2 scenes, e\.g\. s15\.jpg"):
        crop_persons(release, tmp_path / "more")
    savemat(release / "annotation/Person.mat", {"Images": 1})
    with pytest.raises(UsageError, match=r"Person\.mat: not CUHK-SYSU's Person\.mat \(KeyError"):
        crop_persons(release, tmp_path / "more")
    (release / "annotation/Person.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform")
    with pytest.raises(UsageError, match=r"a MATLAB 7\.3 file where MATLAB 5\.0 is expected"):
        crop_persons(release, tmp_path / "more")
    with pytest.raises(UsageError, match=r"lacks annotation/Person\.mat, Image/SSM"):
        crop_persons(tmp_path, tmp_path / "more")


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lda.data.person_search", "--input", str(tmp_path), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
