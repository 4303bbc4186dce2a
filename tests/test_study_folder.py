"""What a study's folder finds: trainings that may be taken over, of this study and of its neighbours."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from study_files import write_unit

from lda import runs
from lda.code import Code
from lda.files import write_json
from sweeps.study_folder import StudyFolder

CODE = Code("c0de", "abc", False, {"torch": "2"})
HERE = {"code": "c0de", "versions": {"torch": "2"}}


@pytest.fixture
def neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two studies side by side, a unit each that learnt "t1"; and one in the first that learnt something else."""
    monkeypatch.setattr(runs, "this_code", lambda: CODE)
    for study, target, training in (("one", "prid", "t1"), ("one", "grid", "t2"), ("two", "viper", "t1")):
        folder = tmp_path / study / "trial-0000" / f"{target}-s0"
        folder.mkdir(parents=True)
        write_unit(folder, target, protocol="protocol1", training=training)
        write_json(folder / "env.json", HERE)
    return tmp_path


def found(root: Path) -> list[str]:
    return [f"{unit.parts[-3]}/{unit.name}" for unit in StudyFolder(root / "one").trained("t1")]


def test_a_training_is_found_by_its_hash_the_own_study_first(neighbours: Path) -> None:
    assert found(neighbours) == ["one/prid-s0", "two/viper-s0"]
    assert [unit.name for unit in StudyFolder(neighbours / "two").trained("t1")] == ["viper-s0", "prid-s0"]
    assert StudyFolder(neighbours / "one").trained("t3") == []


@pytest.mark.parametrize("then", [{**HERE, "code": "01d"}, {**HERE, "versions": {"torch": "3"}}, {}])
def test_what_other_code_trained_is_left_alone(neighbours: Path, then: dict[str, Any]) -> None:
    """A method that was mended since must not come back through another checkpoint, nor through one's own."""
    write_json(neighbours / "two/trial-0000/viper-s0/env.json", then)
    assert found(neighbours) == ["one/prid-s0"]
    write_json(neighbours / "one/trial-0000/prid-s0/env.json", then)
    assert found(neighbours) == []


def test_what_cannot_be_read_next_door_hurts_nobody(neighbours: Path) -> None:
    (neighbours / "two/trial-0000/viper-s0/config.json").write_text('{"format": 1')
    (neighbours / "three/trial-0000/x").mkdir(parents=True)
    assert found(neighbours) == ["one/prid-s0"]


# --- events ----------------------------------------------------------------------------------------------------------


def test_a_line_that_a_full_disk_cut_off_hurts_no_other(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.event("unit", "first")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": "2026-11-25T10')  # and no room for more
    folder.event("unit", "second")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'[1]\n{"time": 3}\n\x00\x00\n')
    folder.event("unit", "third")
    events, end = folder.events()
    assert [event.text for event in events] == ["first", "second", "third"]
    assert folder.events(end) == ([], end)


@pytest.mark.parametrize("seed", range(20))
def test_events_torn_anywhere_still_tell_the_rest(tmp_path: Path, seed: int) -> None:
    folder = StudyFolder(tmp_path)
    texts = [f"event {number}" for number in range(8)]
    for text in texts:
        folder.event("unit", text)
    path = tmp_path / "events.jsonl"
    whole, draw = path.read_bytes(), random.Random(seed)
    start = draw.randrange(len(whole))
    length = draw.randrange(1, 60)
    path.write_bytes(whole[:start] + b"\0" * draw.choice([0, length]) + whole[start + length :])
    folder.event("unit", "after")
    found = [event.text for event in folder.events()[0]]
    hurt = 2 + length // (min(len(line) for line in whole.splitlines()) + 1)
    assert found[-1] == "after"
    assert set(found) <= {*texts, "after"}
    assert len(found) >= len(texts) + 1 - hurt


def test_a_status_that_is_torn_is_left_out(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.workers.mkdir()
    write_json(folder.workers / "a-0-1.json", {"worker": "a-0-1", "state": "running"})
    (folder.workers / "a-0-2.json").write_text('{"worker": "a-')
    (folder.workers / "a-0-3.json").touch()
    assert [status["worker"] for status in folder.statuses()] == ["a-0-1"]


def test_a_folder_whose_study_json_is_torn_is_no_finished_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.json").write_text('{"format": 2, "stu')
    assert StudyFolder(tmp_path).read_study() is None
    assert "study.json" in capsys.readouterr().err
