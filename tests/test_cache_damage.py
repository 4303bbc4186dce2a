"""What is made in the cache may be torn by a power cut or a full disk: it is noticed, said, and made again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lda.data import intact, load_dataset
from lda.data.making import alone, machine, new_file, remove_left_over
from lda.data.packed import pack
from lda.data.records import ImageRecord
from lda.data.standin.tree import VERSION, ensure_standin
from lda.data.survey import DIGESTS, MARKER
from lda.data.verify import byte_digests
from lda.errors import UsageError


def tear(path: Path, draw: random.Random) -> None:
    """As a power cut leaves a file: shorter, with zeros inside, empty, or gone."""
    content = path.read_bytes()
    at = draw.randrange(len(content))
    zeros = content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
    torn = draw.choice([content[:at], zeros, b"", bytes(len(content)), None])
    if torn is None:
        path.unlink()
    else:
        path.write_bytes(torn)
    intact._SOUND.clear()  # another process comes


@pytest.fixture
def images(tmp_path: Path) -> list[ImageRecord]:
    draw = np.random.default_rng(0)
    records = []
    for number in range(70):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
        records.append(ImageRecord(path, number, 0))
    return records


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("suffix", [".u8", ".json"])
def test_packed_images_torn_anywhere_are_packed_again(
    images: list[ImageRecord], tmp_path: Path, suffix: str, seed: int
) -> None:
    whole = pack(images, 8, 6, tmp_path / "cache").array.copy()
    (file,) = (tmp_path / "cache" / "packed").glob(f"*{suffix}")
    tear(file, random.Random(f"{suffix} {seed}"))
    assert np.array_equal(pack(images, 8, 6, tmp_path / "cache").array, whole)
    assert sorted(path.suffix for path in (tmp_path / "cache" / "packed").iterdir()) == [".json", ".u8"]


def test_zeroed_packed_images_are_said(
    images: list[ImageRecord], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They trained silently, to a mAP of noise."""
    pack(images, 8, 6, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "packed").glob("*.u8")
    file.write_bytes(bytes(file.stat().st_size))
    intact._SOUND.clear()
    pack(images, 8, 6, tmp_path / "cache")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert str(file) in line


@pytest.mark.parametrize("seed", range(6))
def test_a_memory_of_digests_torn_anywhere_is_made_again(tmp_path: Path, seed: int) -> None:
    paths = [tmp_path / "set" / f"{number}.jpg" for number in range(20)]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(path.name.encode())
    expected = byte_digests(paths, paths[0].parent, tmp_path / "cache", "set")
    (memory,) = (tmp_path / "cache" / "verified").glob("*.json")
    tear(memory, random.Random(seed))
    assert byte_digests(paths, paths[0].parent, tmp_path / "cache", "set") == expected


@pytest.fixture
def cached(standin_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny stand-in in a cache of its own."""
    monkeypatch.setenv("LDA_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "cache" / f"standin-v{VERSION}-tiny-s0"
    shutil.copytree(standin_tiny, root)
    return root


@pytest.mark.parametrize("seed", range(5))
def test_a_torn_file_of_the_caches_own_standin_is_drawn_again(
    cached: Path, standin_tiny: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(seed)
    chosen = draw.choice(sorted(path for path in cached.rglob("*.*") if path.is_file() and path.name != DIGESTS))
    before = chosen.read_bytes()
    tear(chosen, draw)
    assert ensure_standin("tiny") == cached
    assert (standin_tiny / chosen.relative_to(cached)).read_bytes() == chosen.read_bytes() == before
    assert "drawn again" in capfd.readouterr().err
    assert load_dataset("market1501", cached).data_hash == load_dataset("market1501", standin_tiny).data_hash


@pytest.mark.slow
def test_a_standin_without_a_marker_is_drawn_again(cached: Path, standin_tiny: Path) -> None:
    (cached / MARKER).write_bytes(b"")
    assert ensure_standin("tiny") == cached
    assert (cached / MARKER).read_bytes() == (standin_tiny / MARKER).read_bytes()


def test_a_tree_of_before_there_were_digests_is_taken_by_its_pixels(cached: Path, standin_tiny: Path) -> None:
    (cached / DIGESTS).unlink()
    intact._SOUND.clear()
    ensure_standin("tiny")
    assert (cached / DIGESTS).read_bytes() == (standin_tiny / DIGESTS).read_bytes()


def test_a_users_standin_that_is_damaged_is_refused_by_name(standin_tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(standin_tiny, root)
    image = sorted(root.rglob("bounding_box_train/*.jpg"))[3]
    image.write_bytes(bytes(image.stat().st_size))
    with pytest.raises(UsageError, match=rf"1 files of the stand-in's Market-1501 are damaged .*{image.name} first"):
        load_dataset("market1501", root)
    assert load_dataset("viper", root).standin  # nothing else is hurt


# --- several processes and machines ----------------------------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from lda.data.making import alone
with alone(Path(sys.argv[1]), "drawing"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_one_makes_and_the_others_wait_and_say_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [sys.executable, "-c", HOLDS, str(tmp_path / "tree"), "4"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with alone(tmp_path / "tree", "drawing"):
            assert other.wait(5) == 0
    assert "waiting for another process that is drawing" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_lets_go(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", HOLDS, str(tmp_path / "tree"), "600"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.kill()
        with alone(tmp_path / "tree", "drawing"):
            pass


def test_what_another_machine_makes_is_left_alone(tmp_path: Path) -> None:
    """Its pid may be anybody's here; only what has not moved for an hour is left over."""
    place = tmp_path / "tree"
    ours, theirs, old = (tmp_path / f".tree.tmp-{name}" for name in (f"{machine()}-aa", "0badbeef-bb", "0badbeef-cc"))
    for folder in (ours, theirs, old):
        folder.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    with alone(place, "drawing"):
        remove_left_over(place)
    assert [path.name for path in tmp_path.iterdir()] == [theirs.name]


def test_temporary_files_are_not_opened_through_links(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with new_file(tmp_path / "x") as (descriptor, path):
            names.add(path.name)
            assert os.fstat(descriptor).st_nlink == 1
    assert len(names) == 3  # and nobody can guess the next
    (tmp_path / ".tree.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="it is a link"), alone(tmp_path / "tree", "drawing"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_json_of_a_marker_is_what_the_tree_says(standin_tiny: Path) -> None:
    lists = json.loads((standin_tiny / DIGESTS).read_text())["files"]
    files = {str(path.relative_to(standin_tiny)) for path in standin_tiny.rglob("*") if path.is_file()}
    assert {name for digests in lists.values() for name in digests} == files - {MARKER, DIGESTS}
