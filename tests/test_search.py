"""`python -m lda.search`: the nearest of the images that were embedded, by the model that embedded them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import checkpoint
from PIL import Image, ImageFont
from trees import image

from lda import embed, search


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoint.pt, images, and their features.npz under settings of the test that are not the run's."""
    folder = tmp_path_factory.mktemp("search")
    checkpoint(folder, "lda", 8, bank_warmup_updates=1)
    for number in range(13):
        image(folder / "gallery" / f"{number}.png", (16 + number, 40))
    shutil.copy(folder / "gallery" / "7.png", folder / "copy of 7.png")
    told = ["--set", "inference=expert", "flip_test=true"]
    assert embed.main([*of(folder), "--images", str(folder / "gallery"), "--output", str(folder / "f.npz"), *told]) == 0
    return folder


def of(folder: Path) -> list[str]:
    return ["--checkpoint", str(folder / "checkpoint.pt")]


def run(folder: Path, query: Path, *more: str) -> int:
    return search.main([*of(folder), "--features", str(folder / "f.npz"), "--query", str(query), *more])


def found(capsys: Any) -> list[tuple[int, float, str]]:
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    return [(int(rank), float(cosine), path) for rank, cosine, path in rows]


def test_finds_the_nearest_under_the_settings_of_the_features(embedded: Path, capsys: Any) -> None:
    assert run(embedded, embedded / "copy of 7.png", "--top", "5") == 0
    hits = found(capsys)
    with np.load(embedded / "f.npz") as file:
        units = file["features"] / np.linalg.norm(file["features"], axis=1, keepdims=True)
        paths = file["paths"].tolist()
    cosines = units @ units[paths.index("7.png")]
    order = np.argsort(-cosines, kind="stable")[:5]
    assert [path for _, _, path in hits] == [paths[place] for place in order]
    assert [cosine for _, cosine, _ in hits] == pytest.approx(cosines[order].tolist(), abs=1e-4)
    assert hits[0] == (1, 1.0, "7.png")


def test_the_querys_own_file_is_not_found(embedded: Path, capsys: Any) -> None:
    assert run(embedded, embedded / "gallery" / "7.png", "--top", "100") == 0
    names = [path for _, _, path in found(capsys)]
    assert len(names) == 12
    assert "7.png" not in names


def test_the_picture_shows_query_and_hits(embedded: Path, tmp_path: Path, capsys: Any) -> None:
    """Twelve hits in two rows; every image is where its rank says, in its own proportions."""
    assert run(embedded, embedded / "copy of 7.png", "--top", "12", "--output", str(tmp_path / "found.png")) == 0
    hits = found(capsys)
    width, height = search._TILE
    left = search._MARGIN + width + search._QUERY_GAP
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width == left + 10 * (width + search._GAP) - search._GAP + search._MARGIN
        for place, name in [(0, hits[0][2]), (9, hits[9][2]), (10, hits[10][2])]:
            with Image.open(embedded / "gallery" / name) as shown:
                scale = min(width / shown.width, height / shown.height)
                tile = shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.Resampling.BICUBIC)
            x = left + place % 10 * (width + search._GAP) + (width - tile.width) // 2
            rows = 2 * search._MARGIN - search._GAP
            y = search._MARGIN + place // 10 * ((picture.height - rows) // 2) + height - tile.height
            assert picture.crop((x, y, x + tile.width, y + tile.height)).tobytes() == tile.tobytes()


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        ("a.png", ["a.png"]),
        ("bounding_box_test/0046_c4s1_001555_00.jpg", ["bounding_box_test/", "0046_c4s1_001555_", "00.jpg"]),
    ],
)
def test_paths_are_broken_where_names_are(path: str, lines: list[str]) -> None:
    assert search._lines(path, search._TILE[0], ImageFont.load_default(search._SMALL)) == lines


def test_no_line_of_a_path_is_too_long() -> None:
    font = ImageFont.load_default(search._SMALL)
    for path in ("x" * 200, "folder/" * 30 + "image.png", "a/" + "0123456789" * 9 + ".jpg"):
        lines = search._lines(path, 160, font)
        assert len(lines) == 3
        assert lines[0].startswith("\N{HORIZONTAL ELLIPSIS}")
        assert path.endswith("".join(lines)[1:])
        assert max(map(font.getlength, lines)) <= 165  # the sign of what is left out may be wider than another


def test_features_of_another_model_are_refused(embedded: Path, tmp_path: Path, capsys: Any) -> None:
    """Also of the same training: what counts is the weights."""
    checkpoint(tmp_path, "lda", 9, bank_warmup_updates=1)
    shutil.copy(embedded / "f.npz", tmp_path)
    assert run(tmp_path, embedded / "copy of 7.png") == 2
    error = capsys.readouterr().err
    assert "is another model (SHA-256 " in error
    assert "(lda, training training-lda, SHA-256 " in error
    assert len(error.splitlines()) == 1


def test_damaged_and_other_files_are_one_line(embedded: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copy(embedded / "checkpoint.pt", tmp_path)
    torn = (embedded / "f.npz").read_bytes()
    for content in (b"", torn[:-200], torn[:500] + b"\0" * 40 + torn[540:]):
        (tmp_path / "f.npz").write_bytes(content)
        assert run(tmp_path, embedded / "copy of 7.png") == 2
        error = capsys.readouterr().err
        assert "f.npz: expected a file that python -m lda.embed wrote" in error
        assert len(error.splitlines()) == 1
    np.savez(tmp_path / "f.npz", features=np.zeros((2, 3)))
    assert run(tmp_path, embedded / "copy of 7.png") == 2
    assert "expected a file that python -m lda.embed wrote" in capsys.readouterr().err


def test_images_that_have_moved_are_named_and_found(embedded: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("checkpoint.pt", "f.npz", "gallery"):
        shutil.move(shutil.copytree(embedded, tmp_path / "all", dirs_exist_ok=True) / name, tmp_path / name)
    shutil.move(embedded / "gallery", tmp_path / "kept")
    try:
        assert run(tmp_path, embedded / "copy of 7.png", "--output", str(tmp_path / "found.png")) == 2
        assert "no such image file" in capsys.readouterr().err
        assert not (tmp_path / "found.png").exists()
        moved = ["--images", str(tmp_path / "gallery"), "--output", str(tmp_path / "found.png")]
        assert run(tmp_path, embedded / "copy of 7.png", *moved) == 0
        assert (tmp_path / "found.png").exists()
    finally:
        shutil.move(tmp_path / "kept", embedded / "gallery")
    assert run(tmp_path, embedded / "copy of 7.png", "--output", str(tmp_path / "found.jpg")) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err
