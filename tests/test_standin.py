"""The stand-in on disk: names, counts, determinism, and that nothing half-written is ever taken for whole.

The sets of Protocol-2 and 3 with CUHK02; tests/test_standin_protocol1.py has the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lda.data import load_dataset
from lda.data.cache import cache_dir
from lda.data.standin import draw, tree
from lda.data.standin.__main__ import contact_sheet, main
from lda.data.standin.domains import DOMAINS
from lda.data.standin.draw import draw_shot, person_of, pixel_digest, plans
from lda.data.standin.layouts import FIRST, LAYOUTS, Plan, Shot, spread
from lda.data.standin.scenes import Box, camera_of, photograph, stable_rng
from lda.data.standin.tree import VERSION, ensure_standin, generate
from lda.data.survey import DIGESTS, MARKER
from lda.errors import UsageError

Run = Callable[..., subprocess.Popen[str]]

# Decoded pixels of three images of every data set at scale tiny, seed 0. They change with the drawing, and then
# standin.VERSION must change as well: results on different pixels do not compare.
PINNED = {
    "market1501": ["4c0fcc12b4c8", "7d811936259a", "5be2405e6c97"],
    "msmt17": ["a31dfab7d84d", "721cfe089c86", "c5f7cc7c2444"],
    "cuhk_sysu": ["5347ac8e68e4", "30405835b5c4", "88dc2a65354a"],
    "cuhk02": ["c80b2c3c60b6", "fc0abec76d91", "fe67640922f6"],
    "cuhk03": ["1be5ce654f7a", "4ce8b452af1f", "36d7a21804bd"],
    "prid": ["a1785156612a", "092b189e8729", "a2813b6e4806"],
    "grid": ["99074c25025f", "e811370becc6", "1df621a6155c"],
    "viper": ["fc3602049a36", "a2c25c59e900", "844faa9e617a"],
    "ilids": ["d661295fcdf0", "5faa906bb8bc", "719d9847538f"],
}

PUBLISHED = {  # part: (identities, images, cameras), see the loaders for the sources
    "market1501": {"train": (751, 12936, 6), "query": (750, 3368, 6), "gallery": (750, 15913, 6)},
    "msmt17": {"train": (1041, 30248, 15), "query": (3060, 11659, 15), "gallery": (3060, 82161, 15)},
    "cuhk_sysu": {"train": (11934, 34574, 1)},
    "cuhk02": {"train": (1816, 7264, 10)},
    "cuhk03": {
        "labeled/train": (767, 7368, 2), "labeled/query": (700, 1400, 2), "labeled/gallery": (700, 5328, 2),
        "detected/train": (767, 7365, 2), "detected/query": (700, 1400, 2), "detected/gallery": (700, 5332, 2),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(standin_tiny: Path) -> Path:
    return standin_tiny


@pytest.fixture(scope="module")
def full() -> dict[str, Plan]:
    return plans("full", 0, FIRST)


def contents(root: Path) -> dict[str, str]:
    """Relative name -> digest of the pixels, or of the bytes of other files."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): pixel_digest(path.read_bytes())
        if path.suffix in (".jpg", ".png")
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# --- what is on disk -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FIRST)
def test_the_real_loaders_read_it(tiny: Path, name: str) -> None:
    dataset = load_dataset(name, tiny)  # strict: the counts must equal STANDIN.json's
    assert dataset.standin
    assert dataset.data_hash == json.loads((tiny / MARKER).read_text())["hash"]
    train = {record.pid for record in dataset.train}
    assert len(train) >= 12
    assert train.isdisjoint({record.pid for record in dataset.query}) or name == "msmt17"  # its numbers overlap


@pytest.mark.parametrize("boxes", ["labeled", "detected"])
def test_cuhk03_has_one_query_per_person_and_view(tiny: Path, boxes: str) -> None:
    dataset = load_dataset("cuhk03", tiny, cuhk03_boxes=boxes)
    keys = [(record.pid, record.camid) for record in dataset.query]
    assert len(keys) == len(set(keys)) == 2 * len({pid for pid, _ in keys})


@pytest.mark.parametrize("name", ["market1501", "msmt17", "cuhk03"])
def test_every_query_has_a_match_under_another_camera(tiny: Path, name: str) -> None:
    dataset = load_dataset(name, tiny)
    for query in dataset.query:
        assert any(g.pid == query.pid and g.camid != query.camid for g in dataset.gallery), query.path
        kept = [g for g in dataset.gallery if (g.pid, g.camid) != (query.pid, query.camid)]
        assert len(kept) > 60  # rank-50 code of other projects needs that many


def test_market_has_distractors_junk_and_clutter(tiny: Path) -> None:
    names = os.listdir(tiny / "Market-1501-v15.09.15/bounding_box_test")
    assert any(name.startswith("0000_c") for name in names)
    assert any(name.startswith("-1_c") for name in names)
    assert "Thumbs.db" in names
    pids = {int(name[:4]) for name in names if re.match(r"\d{4}_", name)}
    assert max(pids) > 100
    assert max(pids) <= 1501


def test_msmt17_ids_count_from_zero_and_val_names_training_persons(tiny: Path) -> None:
    root = tiny / "MSMT17_V1"
    ids = {}
    for part in ("train", "val", "query", "gallery"):
        lines = (root / f"list_{part}.txt").read_text().splitlines()
        ids[part] = {int(line.rsplit(" ", 1)[1]) for line in lines}
        for line in lines:
            path, pid = line.split(" ")
            assert int(path[:4]) == int(path.split("/")[1][:4]) == int(pid)
            assert (root / ("train" if part in ("train", "val") else "test") / path).is_file()
    assert ids["train"] == set(range(len(ids["train"])))
    assert ids["query"] == ids["gallery"] == set(range(len(ids["query"])))
    assert ids["val"] <= ids["train"]


def test_cuhk02_has_four_images_of_a_person_and_reuses_numbers(tiny: Path) -> None:
    seen: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted((tiny / "cuhk02/Dataset").rglob("*.png")):
        pair, view, name = path.parts[-3:]
        seen[pair, name.split("_")[0]].append(view)
    assert all(views == ["cam1", "cam1", "cam2", "cam2"] for views in seen.values())
    assert {pair for pair, _ in seen} == {"P1", "P2", "P3", "P4", "P5"}
    assert {("P1", "001"), ("P5", "001")} <= set(seen)


def test_images_look_as_the_sets_do(tiny: Path) -> None:
    """Formats by content, sizes of the domain, no image of one colour."""
    for path in sorted(tiny.rglob("*.jpg"))[::20] + sorted(tiny.rglob("*.png"))[::20]:
        with Image.open(path) as image:
            assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
            assert image.mode == "RGB"
            assert image.height > image.width >= 20
            assert np.asarray(image).std() > 8


# --- plans -----------------------------------------------------------------------------------------------------------
def test_full_scale_has_the_published_counts(full: dict[str, Plan]) -> None:
    for name, plan in full.items():
        counts = {part: (c["ids"], c["images"], c["cameras"]) for part, c in plan.counts.items() if part != "val"}
        assert counts == PUBLISHED[name]
        assert len({shot.path for shot in plan.shots}) == len(plan.shots)
    assert sum("bounding_box_test" in shot.path for shot in full["market1501"].shots) == 19732
    assert full["msmt17"].counts["val"]["images"] == 2373


def test_small_scale_is_small() -> None:
    planned = plans("small", 0, FIRST)
    assert sum(len(plan.shots) for plan in planned.values()) < 10_000
    for name in ("market1501", "msmt17", "cuhk03"):
        counts = {part.removeprefix("labeled/"): c for part, c in planned[name].counts.items()}
        assert 120 <= counts["train"]["ids"] <= 200
        assert 80 <= counts["query"]["ids"] <= 120
        assert 150 <= counts["query"]["images"] <= 250
        assert 600 <= counts["gallery"]["images"] <= 900


@pytest.mark.parametrize("scale", ["tiny", "small"])
@pytest.mark.parametrize("seed", [0, 7])
def test_plans_repeat_and_their_images_are_distinct(scale: str, seed: int) -> None:
    for name, plan in plans(scale, seed, FIRST).items():
        again = LAYOUTS[name](scale, stable_rng(seed, int.from_bytes(name.encode(), "big"), 5))
        assert again.shots == plan.shots
        moments = {(shot.person, shot.camera, shot.take, shot.box) for shot in plan.shots}
        assert len(moments) == len(plan.shots)
        assert all(0 <= shot.camera < DOMAINS[name].cameras for shot in plan.shots)


def test_spread() -> None:
    rng = np.random.default_rng(0)
    for total, parts, low, high in ((10, 3, 2, 5), (6, 3, 2, 9), (27, 3, 1, 9), (0, 4, 0, 3)):
        numbers = spread(total, parts, low, high, rng)
        assert sum(numbers) == total
        assert len(numbers) == parts
        assert all(low <= n <= high for n in numbers)
    with pytest.raises(ValueError, match="cannot be split"):
        spread(28, 3, 1, 9, rng)


# --- determinism -----------------------------------------------------------------------------------------------------
def pinned_shots(plan: Plan) -> list[Shot]:
    return [plan.shots[0], plan.shots[len(plan.shots) // 2], plan.shots[-1]]


def test_pixels_are_those_of_this_version() -> None:
    digests = {
        name: [pixel_digest(draw_shot(name, shot, "tiny", 0))[:12] for shot in pinned_shots(plan)]
        for name, plan in plans("tiny", 0).items()
    }
    assert digests == PINNED, "the drawing changed: raise standin.VERSION, calibrate again, pin the new digests"


def test_any_number_of_processes_draws_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, three, and the fixture's as many as there are cores; two sets are enough here."""
    few = ("market1501", "cuhk02")
    for module in (draw, tree):
        monkeypatch.setattr(module, "LAYOUTS", {name: LAYOUTS[name] for name in few})
    markers = [generate(tmp_path / f"by{n}", "tiny", 0, processes=n) for n in (1, 3)]
    assert markers[0] == markers[1]
    trees = [contents(tmp_path / f"by{n}") for n in (1, 3)]
    assert trees[0] == trees[1]
    whole = contents(tiny)
    assert all(whole[name] == digest for name, digest in trees[0].items() if name not in (MARKER, DIGESTS))


def test_the_hash_covers_names_and_pixels(tiny: Path) -> None:
    planned = plans("tiny", 0, FIRST).values()
    names = sorted(
        [*(shot.path for plan in planned for shot in plan.shots), *(f for plan in planned for f in plan.files)]
    )
    digests = contents(tiny)
    lines = "".join(f"{name} {digests[name]}\n" for name in names)
    assert hashlib.sha256(lines.encode()).hexdigest() == json.loads((tiny / MARKER).read_text())["hash"]


def test_another_seed_draws_other_people() -> None:
    shot = plans("tiny", 0)["market1501"].shots[0]
    assert draw_shot("market1501", shot, "tiny", 0) != draw_shot("market1501", shot, "tiny", 1)
    assert person_of("market1501", 0, 0) != person_of("msmt17", 0, 0)
    assert person_of("cuhk02", 0, 0) != person_of("cuhk03", 0, 0)


# --- domains ---------------------------------------------------------------------------------------------------------
def test_cuhk02_and_cuhk03_share_every_camera_and_nobody_else_does() -> None:
    for index in range(10):
        assert camera_of("cuhk02", index, 0) == camera_of("cuhk03", index, 0)
    luts = {name: camera_of(name, 0, 0).lut for name in LAYOUTS}
    assert len(set(luts.values())) == len(LAYOUTS) - 1


def test_labeled_and_detected_boxes_show_one_moment() -> None:
    """Same person, pose and place; the detected box is the looser one."""
    shots = {shot.path: shot for shot in plans("tiny", 0)["cuhk03"].shots}
    differences = []
    for path, labeled in shots.items():
        detected = shots.get(path.replace("/labeled/", "/detected/"))
        if "/labeled/" in path and detected is not None:
            assert (labeled.person, labeled.camera, labeled.take) == (detected.person, detected.camera, detected.take)
            differences.append(detected.box.error - labeled.box.error)
    assert len(differences) > 100
    assert min(differences) > 0


def test_an_empty_box_shows_the_place_alone() -> None:
    def photo(box: Box, person: int) -> np.ndarray:
        keys = stable_rng(5), stable_rng(6)
        return photograph("cuhk02", 0, person_of("cuhk02", person, 0), keys[0], box, keys[1], 0.5, 0)

    assert np.array_equal(photo(Box(empty=True), 1), photo(Box(empty=True), 2))
    assert not np.array_equal(photo(Box(), 1), photo(Box(), 2))


def test_colour_spreads_less_between_cameras_than_between_domains(tiny: Path) -> None:
    means = defaultdict(list)
    for name in ("market1501", "msmt17", "cuhk03"):
        dataset = load_dataset(name, tiny)
        cameras = defaultdict(list)
        for record in dataset.train:
            cameras[record.camid].append(np.asarray(Image.open(record.path)).mean(axis=(0, 1)))
        means[name] = [np.mean(values, axis=0) for values in cameras.values()]
    within = np.mean([np.std(values, axis=0).mean() for values in means.values()])
    between = np.std([np.mean(values, axis=0) for values in means.values()], axis=0).mean()
    assert between > within


# --- files and processes ---------------------------------------------------------------------------------------------
def test_a_finished_tree_is_kept(tiny: Path) -> None:
    before = (tiny / MARKER).stat().st_mtime_ns
    assert generate(tiny, "tiny", 0)["seed"] == 0
    assert (tiny / MARKER).stat().st_mtime_ns == before


def test_ensure_standin_uses_the_cache_folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDA_CACHE_DIR", str(tmp_path / "cache"))
    place = tmp_path / "cache" / f"standin-v{VERSION}-tiny-s0"
    shutil.copytree(tiny, place)
    assert ensure_standin("tiny", 0) == place


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LDA_CACHE_DIR", raising=False)
    assert cache_dir() == tmp_path / "lda-reid"
    monkeypatch.setenv("LDA_CACHE_DIR", "~/here")
    assert cache_dir() == Path.home() / "here"
    monkeypatch.delenv("LDA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/lda-reid"


def test_what_is_not_the_wanted_standin_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds another stand-in: .*'seed': 0.*wanted .*'seed': 3"):
        generate(tiny, "tiny", 3)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").touch()
    with pytest.raises(UsageError, match="not a stand-in"):
        generate(tmp_path / "photos", "tiny", 0)
    assert os.listdir(tmp_path) == ["photos"]
    with pytest.raises(UsageError, match=r"unknown scale 'smal' \(did you mean 'small'\?\)"):
        generate(tmp_path / "new", "smal", 0)
    with pytest.raises(UsageError, match="seed: -1"):
        ensure_standin("tiny", -1)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written \("):
        generate(tmp_path / "file" / "below" / "tree", "tiny", 0)


# The command, with two data sets so that it takes a second.
FEW = """
import sys
from lda.data.standin import draw, tree
from lda.data.standin.__main__ import main
draw.LAYOUTS = tree.LAYOUTS = {name: tree.LAYOUTS[name] for name in ("market1501", "cuhk02")}
sys.exit(main())
"""


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts a command; whatever still runs at the end of the test is killed."""
    started = []

    def start(program: list[str], *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, *program, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


def aside(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tmp-*"))


def wait_until_drawing(process: subprocess.Popen[str], folder: Path) -> None:
    for _ in range(600):
        if any(next(path.rglob("*.jpg"), None) for path in aside(folder)):
            return
        assert process.poll() is None
        time.sleep(0.05)
    raise AssertionError("nothing was drawn within 30 s")


def test_a_killed_generation_leaves_nothing_that_loads_and_is_cleaned_up(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "tree"
    process = run(["-m", "lda.data.standin"], "--output", str(root), "--scale", "small")  # with processes of its own
    wait_until_drawing(process, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not root.exists()
    (left,) = aside(tmp_path)
    deadline = time.monotonic() + 30
    while True:  # the drawing processes end with their parent
        before = sum(1 for _ in left.rglob("*"))
        time.sleep(0.5)
        if sum(1 for _ in left.rglob("*")) == before:
            break
        assert time.monotonic() < deadline
    other = tmp_path / f".tree.tmp-{os.getpid()}-0"
    other.mkdir()  # of a process that runs: stays
    for module in (draw, tree):
        monkeypatch.setattr(module, "LAYOUTS", {"cuhk02": LAYOUTS["cuhk02"]})
    generate(root, "tiny", 0)
    assert (root / MARKER).is_file()
    assert aside(tmp_path) == [other]


def test_two_processes_at_once_end_with_one_tree(tiny: Path, tmp_path: Path, run: Run) -> None:
    root, planned = tmp_path / "tree", plans("tiny", 0, ("market1501", "cuhk02"))
    both = [run(["-c", FEW], "--output", str(root), "--scale", "tiny") for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "2 data sets" in output
    assert aside(tmp_path) == []
    whole, drawn = contents(tiny), contents(root)
    del drawn[MARKER], drawn[DIGESTS]
    assert drawn.items() <= whole.items()
    assert len(drawn) == sum(len(plan.shots) + len(plan.files) for plan in planned.values())


def test_ctrl_c_ends_with_130_and_leaves_nothing(tmp_path: Path, run: Run) -> None:
    process = run(["-m", "lda.data.standin"], "--output", str(tmp_path / "tree"), "--scale", "small")
    wait_until_drawing(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tiny), "--scale", "tiny", "--contact-sheet", str(tmp_path / "a.png")]) == 0
    assert f"stand-in v{VERSION} tiny, seed 0, 9 data sets" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()
    assert main(["--output", str(tiny), "--scale", "tiny", "--seed", "5"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    nowhere = str(tmp_path / "a.png" / "sheet.png")
    assert main(["--output", str(tiny), "--scale", "tiny", "--contact-sheet", nowhere]) == 2
    assert "--contact-sheet: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "(default: small)" in capsys.readouterr().out


def test_contact_sheet_has_a_row_per_domain(tiny: Path, tmp_path: Path) -> None:
    contact_sheet(tiny, tmp_path / "sheet.png", persons=3)
    assert os.listdir(tmp_path) == ["sheet.png"]
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    blank = (pixels[:, 120:] == 255).all(axis=(1, 2))
    rows = int(np.sum(~blank[1:] & blank[:-1]))
    assert rows == len(LAYOUTS)
