"""What a study's folder finds: trainings that may be taken over, of this study and of its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_files import write_unit

from lda import runs
from lda.files import write_json
from sweeps.study_folder import StudyFolder

HERE = {"commit": "abc", "dirty": False, "versions": {"torch": "2"}}


@pytest.fixture
def neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two studies side by side, a unit each that learnt "t1"; and one in the first that learnt something else."""
    monkeypatch.setattr(runs, "environment", lambda device: HERE)
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


@pytest.mark.parametrize(
    "then", [{**HERE, "commit": "def"}, {**HERE, "dirty": True}, {**HERE, "versions": {"torch": "3"}}, {}]
)
def test_a_neighbour_of_other_code_is_left_alone(neighbours: Path, then: dict[str, Any]) -> None:
    """A method that was mended since must not come back through another study's checkpoint."""
    for target in ("one/trial-0000/prid-s0", "two/trial-0000/viper-s0"):
        write_json(neighbours / target / "env.json", then)
    assert found(neighbours) == ["one/prid-s0"]


@pytest.mark.parametrize("now", [{**HERE, "commit": ""}, {**HERE, "dirty": True}])
def test_code_that_cannot_be_told_apart_shares_within_the_study_only(
    neighbours: Path, now: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "environment", lambda device: now)
    assert found(neighbours) == ["one/prid-s0"]


def test_what_cannot_be_read_next_door_hurts_nobody(neighbours: Path) -> None:
    (neighbours / "two/trial-0000/viper-s0/config.json").write_text('{"format": 1')
    (neighbours / "three/trial-0000/x").mkdir(parents=True)
    assert found(neighbours) == ["one/prid-s0"]
