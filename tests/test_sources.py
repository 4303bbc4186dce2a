"""Tasks: labels, identity keys, the parts that train, held-out identities, everything missing reported at once."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import trees

from lda.data import load_dataset
from lda.data.catalogue import find
from lda.data.options import DataOptions
from lda.data.records import ImageRecord
from lda.data.sources import EvaluationSet, SourceDomain, Target, Task, _queries, build_task, evaluation_splits
from lda.data.survey import Count
from lda.errors import UsageError
from lda.protocols import PROTOCOLS


def _by_name(task: Task) -> dict[str, SourceDomain]:
    return {source.name: source for source in task.sources}


@pytest.mark.parametrize("protocol", ["protocol2", "protocol3", "in_domain"])
@pytest.mark.parametrize("target", ["market1501", "msmt17", "cuhk03"])
def test_sources_and_target(tiny_sets: Path, protocol: str, target: str) -> None:
    task = build_task(protocol, target, tiny_sets)
    assert tuple(source.name for source in task.sources) == PROTOCOLS[protocol].sources(target)
    dataset = load_dataset(target, tiny_sets)
    assert task.test_splits == (EvaluationSet(target, dataset.query, dataset.gallery, camera_rule=True),)
    assert task.validation == ()
    assert task.content.standin
    assert task.content.target == "0123abcd"
    assert task.content.sources == dict.fromkeys(PROTOCOLS[protocol].sources(target), "0123abcd")
    assert set(task.versions) == {*PROTOCOLS[protocol].sources(target), target}
    for source in task.sources:
        assert source.labels.dtype == np.int64
        assert len(source.labels) == len(source.records)
        assert set(source.labels.tolist()) == set(range(source.num_ids))
        assert [r.path for r in source.records] == sorted(r.path for r in source.records)


def test_training_part_only_in_protocol_2(tiny_sets: Path) -> None:
    sources = _by_name(build_task("protocol2", "cuhk03", tiny_sets))
    for name, source in sources.items():
        assert set(source.records) == set(load_dataset(name, tiny_sets).train)
    both = _by_name(build_task("protocol2", "cuhk03", tiny_sets, DataOptions(msmt17_train="train+val")))
    assert len(both["msmt17"].records) == len(sources["msmt17"].records) + 3


def test_everything_but_distractors_in_protocol_3(tiny_sets: Path) -> None:
    sources = _by_name(build_task("protocol3", "cuhk03", tiny_sets))
    market = load_dataset("market1501", tiny_sets)
    kept = {r for r in (*market.train, *market.query, *market.gallery) if r.pid > 0}
    assert set(sources["market1501"].records) == kept
    assert sources["market1501"].num_ids == 7
    # MSMT17: person 0 exists in train and in test and is no distractor; "all" includes list_val.
    assert sources["msmt17"].num_ids == 3 + 2
    assert len(sources["msmt17"].records) == 12 + 3 + 4 + 4


def test_equal_numbers_of_different_people_do_not_meet(tiny_sets: Path) -> None:
    msmt17 = _by_name(build_task("protocol3", "cuhk03", tiny_sets))["msmt17"]
    people = {(r.path.parts[-3], r.pid): label for r, label in zip(msmt17.records, msmt17.labels.tolist(), strict=True)}
    assert len(people) == len(set(people.values())) == 5
    assert list(people.values()) == [people[key] for key in people]
    for record, label in zip(msmt17.records, msmt17.labels.tolist(), strict=True):
        assert people[record.path.parts[-3], record.pid] == label


def test_labels_are_positions_of_the_sorted_keys(tiny_sets: Path) -> None:
    market = _by_name(build_task("protocol3", "cuhk03", tiny_sets))["market1501"]
    labels = {record.pid: label for record, label in zip(market.records, market.labels.tolist(), strict=True)}
    assert labels == {1: 0, 3: 1, 5: 2, 2: 3, 7: 4, 11: 5, 30: 6}  # ("test", pid) sorts before ("train", pid)


@pytest.mark.parametrize("protocol", ["protocol2", "protocol3"])
def test_held_out_identities(tiny_sets: Path, protocol: str) -> None:
    whole = _by_name(build_task(protocol, "market1501", tiny_sets))
    task = build_task(protocol, "market1501", tiny_sets, validation_fraction=0.1)
    assert [images.name for images in task.validation] == [source.name for source in task.sources]
    for source, images in zip(task.sources, task.validation, strict=True):
        held = {r.path for r in (*images.query, *images.gallery)}
        assert held.isdisjoint(r.path for r in source.records)
        assert held | {r.path for r in source.records} == {r.path for r in whole[source.name].records}
        assert source.num_ids == whole[source.name].num_ids - 2  # 10 % of a few, and never fewer than two
        pids = {r.pid for r in (*images.query, *images.gallery)}
        assert pids == {0, 1}  # renumbered: MSMT17 numbers may repeat across its parts
        assert images.camera_rule == (source.name != "cuhk_sysu")
        gallery = {(r.pid, r.camid) for r in images.gallery}
        for query in images.query:
            if images.camera_rule:
                assert any(pid == query.pid and camid != query.camid for pid, camid in gallery)
            else:
                assert any(pid == query.pid for pid, _ in gallery)
        asked = Counter((r.pid, r.camid) for r in images.query)
        assert set(asked.values()) == {1}
        assert {pid for pid, _ in asked} == {0, 1}


def test_the_draw_is_that_of_the_name(tiny_sets: Path) -> None:
    """Held-out persons are the first in the order of SHA-256 of "set/part/pid"."""
    task = build_task("protocol2", "market1501", tiny_sets, validation_fraction=0.4)
    again = build_task("protocol2", "market1501", tiny_sets, validation_fraction=0.4)
    assert task.validation == again.validation
    sysu = task.validation[task.sources.index(_by_name(task)["cuhk_sysu"])]
    held = {int(r.path.name[1]) for r in sysu.gallery}
    order = sorted(range(1, 6), key=lambda pid: hashlib.sha256(f"cuhk_sysu/train/{pid}".encode()).digest())
    assert held == set(order[:2])


def test_a_larger_fraction_keeps_the_smaller(tmp_path: Path) -> None:
    for pid in range(40):
        for camera in (1, 2):
            trees.image(tmp_path / f"Market-1501-v15.09.15/bounding_box_train/{pid + 1:04d}_c{camera}s1_000000_00.jpg")
    counts = trees.market1501(tmp_path)
    counts["train"] = {"ids": 40, "images": 80 + 24 - 4, "cameras": 3}  # 4 names are in both
    trees.mark(tmp_path, market1501=counts)

    def held(fraction: float) -> set[Path]:
        task = build_task("in_domain", "market1501", tmp_path, validation_fraction=fraction)
        return {r.path for r in (*task.validation[0].query, *task.validation[0].gallery)}

    sizes = [held(fraction) for fraction in (0.05, 0.1, 0.25, 0.5)]
    assert [len({path.name[:4] for path in size}) for size in sizes] == [2, 4, 10, 20]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]


def _images(*camids: int) -> list[ImageRecord]:
    return [ImageRecord(Path(f"{number}.jpg"), 0, camid) for number, camid in enumerate(camids)]


@pytest.mark.parametrize(
    ("camids", "asked"),
    [
        ((0, 0, 1, 1), [0, 1]),  # a query in both cameras, both have a match
        ((0, 1), [0]),  # the second query would take the only match of the first
        ((0, 1, 1), [0]),  # a query in camera 1 would have its own camera only
        ((0, 0, 1), [0]),
        ((0, 1, 2), [0, 1]),
        ((0, 0, 1, 2), [0, 1]),
        ((3, 3, 5, 5, 5, 9), [3, 5, 9]),
    ],
)
def test_every_query_keeps_a_match(camids: tuple[int, ...], asked: list[int]) -> None:
    assert [record.camid for record in _queries(_images(*camids))] == asked


def test_queries_against_all_small_cases() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        images = _images(*rng.integers(0, 4, rng.integers(2, 9)).tolist())
        if len({r.camid for r in images}) < 2:
            continue
        queries = _queries(images)
        rest = [r for r in images if r not in queries]
        assert queries
        assert len({r.camid for r in queries}) == len(queries)
        assert all(any(r.camid != query.camid for r in rest) for query in queries)


def test_too_few_identities_to_hold_out(tmp_path: Path) -> None:
    counts = trees.cuhk03_np(tmp_path)
    for path in (tmp_path / "cuhk03-np").rglob("bounding_box_train/*_c2_*"):
        path.unlink()
    for boxes in ("labeled", "detected"):
        counts[f"{boxes}/train"] = {"ids": 3, "images": 6, "cameras": 1}
    trees.mark(tmp_path, cuhk03=counts)
    build_task("in_domain", "cuhk03", tmp_path)
    with pytest.raises(UsageError, match=r"CUHK03: source validation needs 2 identities .*, got 0 of 3"):
        build_task("in_domain", "cuhk03", tmp_path, validation_fraction=0.1)


def test_all_missing_sets_are_reported_at_once(tiny_sets: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sets / "cuhk_sysu", tmp_path / "cuhk_sysu")
    shutil.copy(tiny_sets / "STANDIN.json", tmp_path)
    with pytest.raises(UsageError) as caught:
        build_task("protocol3", "cuhk03", tmp_path)
    for name in ("Market-1501 not found", "MSMT17 not found", "CUHK03 not found"):
        assert name in str(caught.value)
    assert "CUHK-SYSU" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"^data root \S*gone does not exist or is not a folder$"):
        build_task("protocol3", "cuhk03", tmp_path / "gone")


def test_a_target_alone(tiny_sets: Path) -> None:
    task = build_task("protocol2", "market1501", tiny_sets)
    target = evaluation_splits("market1501", tiny_sets)
    assert target == Target(task.test_splits, "v15.09.15", "0123abcd", standin=True)
    detected = evaluation_splits("cuhk03", tiny_sets, DataOptions(cuhk03_boxes="detected"))
    assert detected.version == "detected"
    assert "detected" in detected.splits[0].query[0].path.parts
    with pytest.raises(UsageError, match="CUHK-SYSU has no query and gallery"):
        evaluation_splits("cuhk_sysu", tiny_sets)


# --- stand-in or real ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entrance", ["root", "own folder", "link to the own folder"])
def test_drawn_pictures_are_called_so_from_every_entrance(standin_tiny: Path, tmp_path: Path, entrance: str) -> None:
    own = standin_tiny / "Market-1501-v15.09.15"
    (tmp_path / "Market-1501-v15.09.15").symlink_to(own)
    root = {"root": standin_tiny, "own folder": own, "link to the own folder": tmp_path}[entrance]
    target = evaluation_splits("market1501", root)
    task = build_task("in_domain", "market1501", root)
    assert (target.kind, task.content.kind) == ("stand-in", "stand-in")
    assert target.content == task.content.target == evaluation_splits("market1501", standin_tiny).content


def test_one_drawn_set_makes_a_run_the_stand_ins(real_sets: Path) -> None:
    assert build_task("protocol2", "market1501", real_sets).content.kind == "real"
    for name in ("cuhk03-np", "cuhk_sysu"):
        shutil.copy(real_sets / "published.json", real_sets / name / "STANDIN.json")
    task = build_task("protocol2", "market1501", real_sets)
    assert task.content.kind == "stand-in"
    assert task.content.sources["cuhk03"] == "0123abcd" != task.content.sources["msmt17"]
    assert evaluation_splits("market1501", real_sets).kind == "real"
    assert build_task("in_domain", "market1501", real_sets).content.kind == "real"


@pytest.fixture
def real_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny sets without a marker, whose counts pass for the published ones; `published.json` would be their marker."""
    counts = trees.protocol_sets(tmp_path)
    (tmp_path / "STANDIN.json").rename(tmp_path / "published.json")
    for name in ("market1501", "msmt17"):
        monkeypatch.setattr(find(name), "PUBLISHED", {part: Count(**entry) for part, entry in counts[name].items()})
    monkeypatch.setattr(find("cuhk_sysu"), "PUBLISHED", Count(**counts["cuhk_sysu"]["train"]))
    by_boxes: dict[str, dict[str, Count]] = {"labeled": {}, "detected": {}}
    for part, entry in counts["cuhk03"].items():
        boxes, _, name = part.partition("/")
        by_boxes[boxes][name] = Count(**entry)
    monkeypatch.setattr(find("cuhk03"), "PUBLISHED", by_boxes)
    return tmp_path


@pytest.mark.parametrize("protocol", ["protocol2", "protocol3", "in_domain"])
@pytest.mark.parametrize("target", ["market1501", "msmt17", "cuhk03"])
def test_a_target_has_the_same_hash_in_training_and_alone(real_sets: Path, protocol: str, target: str) -> None:
    """Whatever else of its data set is read for training: Protocol-3 reads both training lists of MSMT17."""
    task = build_task(protocol, target, real_sets)
    assert task.content.target == evaluation_splits(target, real_sets).content
    hashes = [task.content.target, *task.content.sources.values()]
    assert all(len(one) == 64 for one in hashes)
    assert len(set(hashes)) == len(hashes)


def test_task_is_frozen(tiny_sets: Path) -> None:
    task = build_task("in_domain", "cuhk03", tiny_sets)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.target = "x"  # type: ignore[misc]


@pytest.fixture(scope="module")
def protocol_1_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("protocol-1")
    trees.mark(root, **trees.protocol_sets(root), prid=trees.prid(root), grid=trees.grid(root),
               viper=trees.viper(root), ilids=trees.ilids(root))  # fmt: skip
    return root


@pytest.mark.parametrize(
    ("target", "query", "gallery"), [("prid", 100, 649), ("grid", 125, 900), ("viper", 316, 316), ("ilids", 60, 60)]
)
def test_protocol_1(protocol_1_sets: Path, target: str, query: int, gallery: int) -> None:
    task = build_task("protocol1", target, protocol_1_sets, validation_fraction=0.1)
    assert [source.name for source in task.sources] == ["market1501", "cuhk02", "cuhk03", "cuhk_sysu"]
    assert [(len(split.query), len(split.gallery)) for split in task.test_splits] == [(query, gallery)] * 10
    assert task.test_splits == evaluation_splits(target, protocol_1_sets).splits
    assert all(split.single_shot for split in task.test_splits)
    cuhk03 = _by_name(task)["cuhk03"]
    assert cuhk03.num_ids == 3 + 2 - 2  # train and test persons, without the held-out
    # Nothing for the same-camera rule to drop: mINP equals mAP on single-shot targets.
    for split in task.test_splits:
        cameras = {record.pid: record.camid for record in split.query}
        assert all(cameras.get(record.pid) != record.camid for record in split.gallery if record.pid)
