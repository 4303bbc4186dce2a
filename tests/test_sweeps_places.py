"""Where a study's results lie: restored, run again or named; carried in one file; never in another study's folder."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import optuna
import pytest
import yaml
from studies import Command, no_leftovers

from lda.files import read_json, write_json
from sweeps.carry import main as carry
from sweeps.list.study import TOKEN

__all__ = ["no_leftovers"]

POINTS = {"sampler": "grid", "space": {"bank_momentum": {"choices": [0.9, 0.7]}}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, standin_tiny: Path) -> Command:
    """A study of two trials that is over. Copy it, see `copy`."""
    folder = tmp_path_factory.mktemp("finished")
    command = Command(folder, standin_tiny, search=POINTS)
    assert command.run() == 0, command.output
    return command


@pytest.fixture
def command(finished: Command, tmp_path: Path) -> Command:
    """A copy of the finished study, on another disk of the same machine."""
    shutil.copytree(finished.study, tmp_path / "runs" / "mine", symlinks=True)
    return Command(tmp_path, finished.data_root, search=POINTS)


def contents(study: Path) -> dict[str, bytes]:
    """Every file of the study that tells of its results, the tables' inputs."""
    found = [*study.glob("trial-*/*/*.json*"), *study.glob("trial-*/trial.json"), *study.glob("trial-*/*/*.npz")]
    return {path.relative_to(study).as_posix(): path.read_bytes() for path in found}


def test_a_unit_that_vanished_is_restored_and_not_run_again(command: Command) -> None:
    before = contents(command.study)
    shutil.rmtree(command.study / "trial-0001" / "cuhk03-s0")
    (command.study / "trial-0000" / "market1501-s0" / "result.json").write_bytes(b"")
    assert command.run() == 0, command.output
    assert contents(command.study) == before
    assert not (command.study / "trial-0001" / "cuhk03-s0" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_unit_that_is_nowhere_is_run_again_and_said(finished: Command, tmp_path: Path) -> None:
    """As after a power cut: the storage knows of it, its files are gone, and so is the copy."""
    shutil.copytree(finished.study, tmp_path / "kept")
    before = read_json(finished.study / "trial-0001" / "cuhk03-s0" / "result.json")
    shutil.rmtree(finished.study / "trial-0001" / "cuhk03-s0")
    _sql(finished.study, "DELETE FROM lda_unit_files WHERE place = 'trial-0001/cuhk03-s0'")
    try:
        assert finished.run() == 0, finished.output
        assert any("trial-0001/cuhk03-s0: finished, but the files are gone" in event for event in finished.events())
        again = read_json(finished.study / "trial-0001" / "cuhk03-s0" / "result.json")
        assert {**again, "seconds": 0, "images_per_second": 0} == {**before, "seconds": 0, "images_per_second": 0}
    finally:
        shutil.rmtree(finished.study)
        shutil.copytree(tmp_path / "kept", finished.study)


@pytest.mark.slow
def test_what_lies_on_another_machine_only_is_named_and_the_study_not_called_done(command: Command) -> None:
    """The copy stands for another machine: its folder is another one."""
    shutil.rmtree(command.study / "trial-0001" / "cuhk03-s0")
    _sql(command.study, "DELETE FROM lda_unit_files WHERE place = 'trial-0001/cuhk03-s0'")
    assert command.run() == 1
    assert "1 finished units are not here and not in the storage: trial-0001/cuhk03-s0 (on " in command.output


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_study_json_is_made_again_from_the_storage(command: Command, damage: str) -> None:
    before = read_json(command.study / "study.json")
    (command.study / "study.json").unlink()
    if damage == "empty":
        (command.study / "study.json").touch()
    assert command.run() == 0, command.output
    assert read_json(command.study / "study.json")[TOKEN] == before[TOKEN]


# --- whose folder ----------------------------------------------------------------------------------------------------


def refused(command: Command, *options: str) -> str:
    """The line of a command that refuses, which must write nothing into its study's folder."""
    before = {path: path.stat().st_mtime_ns for path in command.study.rglob("*")}
    assert command.run(*options) == 2, command.output
    assert {path: path.stat().st_mtime_ns for path in command.study.rglob("*")} == before
    return command.output.splitlines()[-1]


def test_a_renamed_study_does_not_begin_a_second_one_in_its_folder(command: Command) -> None:
    (command.folder / "mine.yaml").rename(command.folder / "other.yaml")
    command.study.rename(command.study.with_name("other"))
    arguments = ["--study", "other.yaml", "--data-root", str(command.data_root), "--output", "runs"]
    other = command.folder / "runs" / "other"
    before = contents(other)
    script = str(Path(__file__).parents[1] / "sweeps" / "run.py")
    done = subprocess.run([sys.executable, script, *arguments], cwd=command.folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is the folder of study 'mine', not of 'other'" in done.stderr
    assert contents(other) == before
    assert sorted(path.name for path in other.glob("trial-*")) == ["trial-0000", "trial-0001"]


def test_trials_that_no_storage_knows_are_not_written_over(command: Command) -> None:
    (command.study / "study.json").unlink()
    (command.study / "optuna.db").unlink()
    assert "holds trials and no readable study.json" in refused(command)


def test_the_folder_of_a_study_of_the_same_name_is_not_taken(command: Command) -> None:
    content = read_json(command.study / "study.json")
    write_json(command.study / "study.json", {**content, TOKEN: "another"})
    assert "holds another study 'mine' than sqlite:///" in refused(command)


@pytest.mark.slow
def test_other_code_does_not_go_on_unless_wanted(command: Command) -> None:
    with_code = json.dumps({"digest": "0" * 12, "commit": "a1b2c3d4e5", "dirty": True})
    _sql(command.study, f"UPDATE study_user_attributes SET value_json = '{with_code}' WHERE key = 'code'")
    line = refused(command)
    assert "begun with other code (commit a1b2c3d with local changes; this is " in line
    assert "--allow-mixed-code" in line
    assert command.run("--allow-mixed-code") == 0, command.output


def _sql(study: Path, statement: str) -> None:
    import sqlite3

    connection = sqlite3.connect(study / "optuna.db")
    connection.execute(statement)
    connection.commit()
    connection.close()


# --- carried ---------------------------------------------------------------------------------------------------------


def test_a_study_is_carried_whole_and_goes_on(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.tar.gz"
    assert carry(["export", str(command.study), str(file)]) == 0
    there = tmp_path / "there"
    there.mkdir()
    assert carry(["import", str(file), "--output", str(there / "runs")]) == 0
    assert contents(there / "runs" / "mine") == contents(command.study)
    assert carry(["import", str(file), "--output", str(there / "runs")]) == 0  # once more adds nothing
    on = Command(there, command.data_root, search={**POINTS, "enqueue": [{"bank_momentum": 0.7}]})
    assert on.run() == 0, on.output
    assert "2 of 2 trials" in on.output
    assert on.results().keys() == command.results().keys()


def test_a_study_that_went_on_is_brought_back(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, back = tmp_path / "mine.tar.gz", tmp_path / "back.tar.gz"
    assert carry(["export", str(command.study), str(back)]) == 0
    shutil.rmtree(command.study / "trial-0001")
    assert carry(["import", str(back), "--output", str(command.folder / "runs")]) == 0
    assert "2 finished units added" in capsys.readouterr().out
    _sql(command.study, "UPDATE trial_values SET value = 0.123")  # the two lists tell of different ends now
    assert carry(["export", str(command.study), str(file)]) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    assert carry(["import", str(back), "--output", str(other)]) == 0
    assert carry(["import", str(file), "--output", str(other)]) == 2
    assert "two studies by now" in capsys.readouterr().err


def test_a_file_that_is_damaged_or_none_is_refused_and_writes_nothing(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.tar.gz"
    assert carry(["export", str(command.study), str(file)]) == 0
    whole, output = file.read_bytes(), tmp_path / "there"
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(whole[: len(whole) // 2])
    assert carry(["import", str(broken), "--output", str(output)]) == 2
    _tampered(file, broken, "trial-0000/cuhk03-s0/result.json")
    assert carry(["import", str(broken), "--output", str(output)]) == 2
    assert "trial-0000/cuhk03-s0/result.json is damaged" in capsys.readouterr().err
    broken.write_text("no archive")
    assert carry(["import", str(broken), "--output", str(output)]) == 2
    assert not output.exists()


def _tampered(file: Path, target: Path, name: str) -> None:
    with tarfile.open(file) as tar, tarfile.open(target, "w:gz") as out:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            content = b"{}" if member.name == name else stream.read()
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))


def test_a_study_is_exported_with_what_lies_in_the_storage_only(command: Command, tmp_path: Path) -> None:
    shutil.rmtree(command.study / "trial-0001" / "cuhk03-s0")
    assert carry(["export", str(command.study), str(tmp_path / "mine.tar.gz")]) == 0
    with tarfile.open(tmp_path / "mine.tar.gz") as tar:
        assert "trial-0001/cuhk03-s0/result.json" in tar.getnames()


def test_the_spec_of_the_copied_list_is_the_studys(command: Command, tmp_path: Path) -> None:
    assert carry(["export", str(command.study), str(tmp_path / "mine.tar.gz")]) == 0
    assert carry(["import", str(tmp_path / "mine.tar.gz"), "--output", str(tmp_path / "there")]) == 0
    url = f"sqlite:///{tmp_path / 'there' / 'mine' / 'optuna.db'}"
    study = optuna.load_study(study_name="mine", storage=url)
    spec = yaml.safe_load((command.folder / "mine.yaml").read_text())
    assert study.user_attrs["spec"]["title"] == spec["title"]
    assert len(study.trials) == 2
