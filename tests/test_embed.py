"""`python -m lda.embed`: what an evaluation would see of any images, whatever lies among them."""

from __future__ import annotations

import csv
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from numpy.typing import NDArray
from trees import image

from lda import embed
from lda.checkpoint import load_method, read_checkpoint
from lda.data.listing import list_images, natural
from lda.data.options import DataOptions
from lda.data.sources import evaluation_splits
from lda.embedding import Embedder
from lda.errors import UsageError
from lda.features import NAMES
from lda.files import sha256_of
from lda.testing import Evaluator


@pytest.fixture(scope="module")
def lda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("lda"), "lda", 8, bank_warmup_updates=1)


def run(model: Path, images: Path, output: Path, *more: str) -> int:
    return embed.main(["--checkpoint", str(model), "--images", str(images), "--output", str(output), *more])


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize("told", [{}, {"flip_test": True, "inference": "expert"}])
def test_features_are_the_evaluators_bit_for_bit(
    told: dict[str, Any], lda: Path, standin_tiny: Path, tmp_path: Path
) -> None:
    """Of a target's query and gallery by a CSV file, and of the folder of its query: other batches, the same bits."""
    target = evaluation_splits("market1501", standin_tiny, DataOptions())
    read = read_checkpoint(lda)
    config = read.config.replace(evaluation_batch=17, **told)
    evaluator = Evaluator(target.splits, config, torch.device("cpu"))
    method = load_method(read, config)
    expected = evaluator._encodings(method, method.scorer(), range(len(evaluator._records))).numpy()

    records = evaluator._records
    rows = [(record.path, record.pid, record.camid) for record in records]
    settings = ["evaluation_batch=17", *(f"{key}={value}" for key, value in told.items())]
    listed = write_csv(tmp_path / "list.csv", [("path", "pid", "camid"), *rows])
    assert run(lda, listed, tmp_path / "all.npz", "--set", *settings) == 0
    found = arrays(tmp_path / "all.npz")
    assert found["features"].dtype == np.float32
    assert np.array_equal(found["features"], expected)
    assert found["pid"].tolist() == [record.pid for record in records]
    assert found["camid"].dtype == np.int64

    folder = records[0].path.parent
    assert run(lda, folder, tmp_path / "query.npz", "--set", *settings) == 0
    query = arrays(tmp_path / "query.npz")
    by_path = {str(record.path): row for row, record in enumerate(records)}
    place = [by_path[str(folder / name)] for name in query["paths"]]
    assert len(place) == len(target.splits[0].query)
    np.testing.assert_allclose(query["features"], expected[place], rtol=1e-5, atol=1e-6)


def test_the_file_says_what_the_features_are(lda: Path, tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    assert run(lda, tmp_path / "images", tmp_path / "f.npz", "--set", "inference=expert", "flip_test=true") == 0
    found = arrays(tmp_path / "f.npz")
    assert set(found) == set(NAMES)
    assert found["checkpoint_sha256"].item() == sha256_of(lda)
    told = {key: found[key].tolist() for key in ("training", "method", "inference", "flip_test", "image_size")}
    assert told == {
        "training": "training-lda", "method": "lda", "inference": "expert", "flip_test": True, "image_size": [32, 16]
    }  # fmt: skip
    assert (found["skipped"].shape, found["paths"].tolist()) == ((0,), ["a.png"])


def test_bad_images_are_told_and_left_out(lda: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "images"
    for name in ("10.png", "2.jpg", "sub/1.JPG"):
        image(folder / name, (16, 32))
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "torn.jpg").write_bytes((folder / "2.jpg").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image either, and nobody says so")
    listed = write_csv(
        tmp_path / "list.csv",
        [("path", "pid", "score"), *((f"images/{name}", pid, pid / 2) for pid, name in enumerate(
            ["torn.jpg", "2.jpg", "missing.png", "sub/1.JPG", "notes.txt", "10.png"]
        ))],
    )  # fmt: skip
    assert run(lda, folder, tmp_path / "f.npz") == 1
    shown = capsys.readouterr()
    assert "3 of 6 images" in shown.out
    assert "1 other files are no images by their names" in shown.out
    told = [line for line in shown.err.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1].rpartition("/")[2] for line in told] == ["empty.png", "text.jpg", "torn.jpg"]
    found = arrays(tmp_path / "f.npz")
    assert found["paths"].tolist() == ["2.jpg", "10.png", "sub/1.JPG"]
    assert found["skipped"].tolist() == ["empty.png", "text.jpg", "torn.jpg"]

    assert run(lda, listed, tmp_path / "g.npz", "--skip-bad", "--set", "evaluation_batch=2") == 0
    by_list = arrays(tmp_path / "g.npz")
    assert by_list["paths"].tolist() == ["images/2.jpg", "images/sub/1.JPG", "images/10.png"]
    assert by_list["skipped"].tolist() == ["images/torn.jpg", "images/missing.png", "images/notes.txt"]
    assert (by_list["pid"].tolist(), by_list["score"].tolist()) == ([1, 3, 5], [0.5, 1.5, 2.5])
    np.testing.assert_allclose(by_list["features"], found["features"][[0, 2, 1]], rtol=1e-5, atol=1e-6)


def test_nothing_is_written_where_no_image_is_sound(lda: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "empty.png").touch()
    assert run(lda, tmp_path / "images", tmp_path / "out" / "f.npz", "--skip-bad") == 1
    assert "no image could be embedded; nothing is written" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_one_batch_of_images_is_in_memory_at_a_time(lda: Path, tmp_path: Path) -> None:
    """All images in one batch take the memory of all of them more."""
    count = 96
    for number in range(count):
        image(tmp_path / "images" / f"{number}.bmp", (4, 4))
    images = list_images(tmp_path / "images")

    def peak(batch: int) -> int:
        embedder = Embedder(lda, {"evaluation_batch": batch, "threads": 1})
        tracemalloc.start()
        try:
            embed.write_features(embedder, images, tmp_path / "f.npz", threading.Event())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(count)  # imports and caches
    assert peak(count) - peak(8) > 32 * 16 * 3 * count


@pytest.mark.parametrize(
    ("method", "changes", "told", "message"),
    [
        ("qaconv", {}, [], "method: QAConv compares images pair by pair; an image has no features of its own"),
        ("baseline", {"camera_statistics": "on"}, [], "method: plain BN (camera statistics) adapts to all images of"),
        ("baseline", {}, ["camera_statistics=on"], "method: plain BN (camera statistics) adapts to all images of"),
        (
            "baseline",
            {},
            ["average_precision=trapezoid"],
            "--set average_precision: changes no features; these setting",
        ),
        ("baseline", {}, ["reranking=k_reciprocal"], "--set reranking: changes no features"),
        ("baseline", {}, ["backbone=resnet50"], "--set backbone: is a setting of training, which is over"),
        ("baseline", {}, ["inference=expert"], "inference: is a setting of methods"),
    ],
)
def test_what_gives_no_features_is_one_line(
    method: str, changes: dict[str, Any], told: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    model = checkpoint(tmp_path, method, 0, **changes)
    image(tmp_path / "query" / "a.png")
    assert run(model, tmp_path / "query", tmp_path / "f.npz", *(["--set", *told] if told else [])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "f.npz").exists()


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_in_natural_order_without_clutter(tmp_path: Path) -> None:
    for name in (
        "b/10.png",
        "b/9.png",
        "a10/1.jpg",
        "a2/x.PNG",
        "7.webp",
        ".hidden/1.png",
        "a2/.b.png",
        "a2/Thumbs.db",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a2" / "up").symlink_to(tmp_path)  # leads back
    (tmp_path / "list.txt").touch()
    found = list_images(tmp_path)
    assert list(found.paths) == ["7.webp", "a2/x.PNG", "a10/1.jpg", "b/9.png", "b/10.png"]
    assert (found.others, found.root, found.columns) == (1, tmp_path.resolve(), {})
    assert sorted(["c1/2", "c1/10", "c01/3", "1", "c"], key=natural) == ["1", "c", "c1/2", "c01/3", "c1/10"]


def test_a_folder_elsewhere_may_be_linked(tmp_path: Path) -> None:
    image(tmp_path / "there" / "1.png")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "there")
    assert list(list_images(tmp_path / "here").paths) == ["linked/1.png"]


def test_columns_have_types(tmp_path: Path) -> None:
    text = "\ufeffpid,path,time,place\n1,a.png,0.5,x\n-2,b.png,3,4\n\n"
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    found = list_images(tmp_path / "list.csv")
    assert {name: column.tolist() for name, column in found.columns.items()} == {
        "pid": [1, -2], "time": [0.5, 3.0], "place": ["x", "4"]
    }  # fmt: skip
    assert list(found.paths) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a column 'path' in its first line, found: nothing"),
        (b"file,pid\na.png,1\n", "expected a column 'path' in its first line, found: file, pid"),
        (b"path,pid\na.png\n", "row 1 has 1 values, expected 2"),
        (b"path,pid,pid\na.png,1,2\n", "every column needs a name of its own, found: 'path', 'pid', 'pid'"),
        (b",path\n0,a.png\n", "every column needs a name of its own, found: '', 'path'"),
        (b"path\n", "names no image"),
        (b"\x89PNG\r\n\x1a\n", "expected a folder of images or a CSV file in UTF-8"),
    ],
)
def test_bad_lists_are_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list_images(tmp_path / "list.csv")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_may_not_take_a_name_of_the_outputs(lda: Path, tmp_path: Path, capsys: Any) -> None:
    listed = write_csv(tmp_path / "list.csv", [("path", "features"), ("a.png", 1)])
    assert run(lda, listed, tmp_path / "f.npz") == 2
    assert "column 'features' is a name of the output's own; rename it" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"no image in it or below, 1 other files; expected \.bmp"):
        list_images(tmp_path)
