"""What is made in the cache may be torn by a power cut or a full disk: it is noticed, said, and made again."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from studies import REPOSITORY

from lda.data import intact, load_dataset
from lda.data.making import alone, machine, new_file, remove_left_over
from lda.data.packed import pack
from lda.data.records import ImageRecord
from lda.data.standin import damage as damage_module
from lda.data.standin import draw as draw_module
from lda.data.standin import tree
from lda.data.standin.damage import VERSION
from lda.data.standin.draw import draw_shot, pixel_digest
from lda.data.standin.layouts import LAYOUTS
from lda.data.standin.tree import ensure_standin
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


def same(root: Path, other: Path) -> bool:
    """Whether two trees hold the same files."""
    trees = [{path.relative_to(r): path.read_bytes() for path in r.rglob("*") if path.is_file()} for r in (root, other)]
    return trees[0] == trees[1]


@pytest.mark.parametrize("seed", range(4))
def test_torn_files_of_the_caches_own_standin_are_drawn_again(
    cached: Path, standin_tiny: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(seed)
    files = sorted(path for path in cached.rglob("*.*") if path.is_file() and path.name not in (DIGESTS, MARKER))
    torn = draw.sample(files, 3)
    for path in torn:
        tear(path, draw)
    assert ensure_standin("tiny") == cached
    assert same(cached, standin_tiny)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert any(str(path.relative_to(cached)) in line for path in torn)
    ensure_standin("tiny")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seed", range(2))
def test_torn_digests_of_a_tree_are_made_again_from_its_pixels(cached: Path, standin_tiny: Path, seed: int) -> None:
    """As those of a tree from before there were any."""
    tear(cached / DIGESTS, random.Random(seed))
    ensure_standin("tiny")
    assert same(cached, standin_tiny)


@pytest.fixture(scope="module")
def few_drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of two small data sets, which is drawn in a second."""
    with pytest.MonkeyPatch.context() as patch:
        _only_few_sets(patch)
        tree.generate(tmp_path_factory.mktemp("few") / "tree", "tiny")
        return tmp_path_factory.getbasetemp() / "few0" / "tree"


@pytest.fixture
def few(few_drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That tree in a cache of its own."""
    _only_few_sets(monkeypatch)
    monkeypatch.setenv("LDA_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "cache" / f"standin-v{VERSION}-tiny-s0"
    shutil.copytree(few_drawn, root)
    return root


def _only_few_sets(patch: pytest.MonkeyPatch) -> None:
    for module in (draw_module, tree, damage_module):
        patch.setattr(module, "LAYOUTS", {name: LAYOUTS[name] for name in ("cuhk02", "prid")})


@pytest.mark.parametrize("seed", range(2))
def test_a_standin_with_a_torn_marker_is_drawn_again(
    few: Path, few_drawn: Path, capfd: pytest.CaptureFixture[str], seed: int
) -> None:
    tear(few / MARKER, random.Random(seed))
    assert ensure_standin("tiny") == few
    assert same(few, few_drawn)
    assert capfd.readouterr().err.startswith(f"warning: {few / MARKER} is damaged or missing")
    assert [path.name for path in few.parent.iterdir()] == [few.name]


def test_other_pixels_than_the_marker_says_are_not_taken(few: Path, few_drawn: Path) -> None:
    """Without digests, every image in order, and yet not what was drawn: as after a copy from another tree."""
    one, other = sorted((few / "cuhk02").rglob("*.png"))[:2]
    shutil.copy(one, other)
    (few / DIGESTS).unlink()
    intact._SOUND.clear()
    with pytest.raises(UsageError, match=r"1 files of the stand-in's CUHK02 are damaged .*STANDIN\.json first"):
        load_dataset("cuhk02", few)
    assert load_dataset("prid", few).standin  # it has a hash of its own
    assert ensure_standin("tiny") == few
    assert same(few, few_drawn)


def test_a_library_that_draws_other_bytes_or_pixels_changes_no_hash(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, marker = few, (few / MARKER).read_bytes()
    torn = sorted((root / "cuhk02").rglob("*.png"))[3]

    def recoded(*arguments: Any) -> bytes:
        """The same pixels, in other bytes."""
        file = io.BytesIO()
        Image.open(io.BytesIO(draw_shot(*arguments))).save(file, "PNG", compress_level=9)
        return file.getvalue()

    monkeypatch.setattr(tree, "draw_shot", recoded)
    before = torn.read_bytes()
    torn.write_bytes(before[:100])
    ensure_standin("tiny")
    assert torn.read_bytes() != before
    assert (root / MARKER).read_bytes() == marker
    assert intact.damaged(root, intact.read_lists(root / DIGESTS)["cuhk02"]) == []

    monkeypatch.setattr(tree, "draw_shot", lambda name, shot, *rest: draw_shot(name, replace(shot, take=99), *rest))
    torn.write_bytes(before[:100])
    ensure_standin("tiny")  # mending gives other pixels: then the whole tree is drawn
    assert pixel_digest(torn.read_bytes()) == pixel_digest(before)
    assert (root / MARKER).read_bytes() == marker


def test_a_users_standin_that_is_damaged_is_refused_by_name(standin_tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(standin_tiny, root)
    image = sorted(root.rglob("bounding_box_train/*.jpg"))[3]
    image.write_bytes(bytes(image.stat().st_size))
    line = rf"1 files of the stand-in's Market-1501 are damaged .*{image.name} first; remove that folder"
    with pytest.raises(UsageError, match=line):
        load_dataset("market1501", root)
    assert load_dataset("viper", root).standin  # nothing else is hurt
    (root / DIGESTS).unlink()  # a tree of before there were digests
    with pytest.raises(UsageError, match=line):
        load_dataset("market1501", root)
    shutil.rmtree(root / "MSMT17_V1")  # who copies some sets alone has nothing to compare with
    assert load_dataset("cuhk03", root).standin


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


AS_NOBODY = """
import os, sys
from pathlib import Path
from lda.command import exit_code
from lda.data.cache import cache_dir
from lda.data.packed import pack
from lda.data.records import ImageRecord
from lda.data.standin.tree import ensure_standin
from lda.data.verify import byte_digests
os.setgroups([]); os.setgid(65534); os.setuid(65534)  # after the imports: Python itself may be root's alone
image = Path(sys.argv[1])
works = [
    lambda: pack([ImageRecord(image, 0, 0)], 8, 6, cache_dir()) and None,
    lambda: byte_digests([image], image.parent, cache_dir(), "set") and None,
    lambda: ensure_standin("tiny") and None,
]
sys.exit(max(exit_code(work) for work in works) * 10 + min(exit_code(work) for work in works))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which takes root")
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_another_users_cache_gets_one_line(mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        image, cache = Path(folder) / "a.png", Path(folder) / "cache"
        Image.new("RGB", (6, 8)).save(image)
        for name in ("packed", "verified"):
            (cache / name).mkdir(parents=True)
        (cache / f"standin-v{VERSION}-tiny-s0").mkdir(mode=0o700)
        cache.chmod(mode)
        environment = {**os.environ, "LDA_CACHE_DIR": str(cache), "PYTHONPATH": str(REPOSITORY)}
        run = [sys.executable, "-c", AS_NOBODY, str(image)]
        done = subprocess.run(run, env=environment, cwd="/", capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 22, done.stderr
    assert len(lines) == 6, done.stderr  # each asked twice
    assert all(
        line.startswith("error: ") and "is root's: every user has a cache of their own" in line for line in lines
    )
    assert all(line.endswith("set LDA_CACHE_DIR") for line in lines)


def test_json_of_a_marker_is_what_the_tree_says(standin_tiny: Path) -> None:
    lists = json.loads((standin_tiny / DIGESTS).read_text())["files"]
    files = {str(path.relative_to(standin_tiny)) for path in standin_tiny.rglob("*") if path.is_file()}
    assert {name for digests in lists.values() for name in digests} == files - {MARKER, DIGESTS}
