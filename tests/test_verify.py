"""Checking images: what is found, remembered by size and time, the same with several processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trees
from PIL import Image

from lda.data import verify
from lda.data.verify import check_image, check_images
from lda.errors import UsageError


def _images(root: Path) -> list[Path]:
    for number in range(4):
        trees.image(root / f"{number}.png", (9 + number, 20))
    return sorted(root.glob("*.png"))


def test_what_an_image_holds(tmp_path: Path) -> None:
    check = check_image(_images(tmp_path)[2])
    assert (check.width, check.height, check.mode, check.turned, check.problem) == (11, 20, "RGB", False, "")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("L", (5, 6)).save(tmp_path / "turned.png", exif=exif)
    check = check_image(tmp_path / "turned.png")
    assert (check.width, check.height, check.mode, check.turned) == (5, 6, "L", True)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "it is empty"), (b"<html>", "not an image"), (None, "truncated")]
)
def test_damaged_images(tmp_path: Path, content: bytes | None, reason: str) -> None:
    trees.image(tmp_path / "bad.jpg", (40, 80))
    whole = (tmp_path / "bad.jpg").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(whole[: len(whole) // 2] if content is None else content)
    problem = check_image(tmp_path / "bad.jpg").problem
    assert problem.startswith(f"{tmp_path / 'bad.jpg'}: cannot be decoded")
    assert reason in problem
    with pytest.raises(UsageError, match=r"gone\.jpg: cannot be read"):
        check_image(tmp_path / "gone.jpg")


def test_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, decoded = _images(tmp_path), []

    def counted(path: Path) -> verify.Check:
        decoded.append(path.name)
        return check_image(path)

    monkeypatch.setattr(verify, "check_image", counted)
    first = check_images(paths, tmp_path / "cache", "set")
    assert list(first) == paths
    assert decoded == ["0.png", "1.png", "2.png", "3.png"]
    assert check_images(paths, tmp_path / "cache", "set") == first
    os.utime(paths[1], ns=(1, 1))
    paths[2].write_bytes(b"")
    again = check_images(paths, tmp_path / "cache", "set")
    assert decoded[4:] == ["1.png", "2.png"]
    assert again[paths[1]].digest == first[paths[1]].digest
    assert "it is empty" in again[paths[2]].problem
    assert check_images(paths[:2], tmp_path / "cache", "set") == {path: again[path] for path in paths[:2]}
    assert decoded[6:] == []
    for path in (tmp_path / "cache/verified").iterdir():
        path.write_text("{")  # a damaged memory is no memory
    assert check_images(paths, tmp_path / "cache", "set") == again


def test_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _images(tmp_path)
    alone = check_images(paths, tmp_path / "alone", "set")
    monkeypatch.setattr(verify, "ALONE", 0)
    monkeypatch.setattr(verify, "CHUNK", 2)
    monkeypatch.setattr(verify, "cores", lambda: 2)
    assert check_images(paths, tmp_path / "together", "set") == alone


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UsageError, match="set LDA_CACHE_DIR"):
        check_images(_images(tmp_path), tmp_path / "cache", "set")
    assert check_images([], tmp_path / "cache", "set") == {}
