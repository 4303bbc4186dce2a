"""The files of a unit survive what happens to runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_files import a_result

from lda import runs
from lda.config import preset
from lda.errors import DamagedError, UsageError
from lda.files import atomic, write_json
from lda.runs import (
    BUFFER_BANK,
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    QUERIES,
    RESULT,
    Result,
    RunFolder,
    UnitFolder,
    Weights,
    environment,
    finished,
    is_unit,
    read_metrics,
    read_unit,
    training_of,
    unit_folders,
    unit_of,
)
from lda.unit import run_unit


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), atomic(path) as file:
        file.writelines(["half", 3])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_atomic_under_sigkill(tmp_path: Path) -> None:
    """A process killed while it rewrites a file over and over leaves a whole one."""
    code = (
        "import sys; from pathlib import Path; from lda.files import write_json\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1; write_json(Path(sys.argv[1]), {'n': n, 'filling': ['x' * 1000] * 200})\n"
        "    print(n, flush=True) if n == 3 else None\n"
    )
    path = tmp_path / "file.json"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert json.loads(path.read_text())["n"] >= 3


def test_files_are_as_readable_as_the_users_others(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(tmp_path / "file.json", {})
    assert (tmp_path / "file.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "file.json", {"mAP": float("nan")})
    assert list(tmp_path.iterdir()) == []


SETTINGS = {"target": "cuhk03", "seed": 0, "method": "lda", "bank_momentum": 0.9, "milestones": [6]}


def run_folder(path: Path, unit: str = "aaa", **changes: Any) -> RunFolder:
    """A folder whose unit has begun."""
    run = RunFolder(path, unit, "ttt", {**SETTINGS, **changes})
    with run.owned():
        run.write_config()
        run.replace_rows([])
    return run


def test_folder_never_mixes_two_units(tmp_path: Path) -> None:
    run_folder(tmp_path)
    run_folder(tmp_path)
    with pytest.raises(UsageError, match=r"holds another run \(unit aaa, this is bbb\).*differ in: bank_momentum\."):
        run_folder(tmp_path, "bbb", bank_momentum=0.5)
    with pytest.raises(UsageError, match=r"differ in: method, gate_rate\. Choose another"):
        run_folder(tmp_path, "bbb", method="metabin", gate_rate=0.1)
    with pytest.raises(UsageError, match=r"differ in: the data\."):
        run_folder(tmp_path, "bbb")
    assert read_unit(tmp_path).unit == "aaa"


def test_a_unit_is_told_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "trial-0000" / "cuhk03-s0"
    run = run_folder(folder)
    assert is_unit(folder)
    assert unit_folders(folder.parent) == [folder]
    assert unit_folders(tmp_path) == []
    assert (unit_of(folder), training_of(folder)) == ("aaa", "ttt")
    unit = read_unit(folder)
    assert (unit.unit, unit.training, unit.target, unit.seed, unit.method) == ("aaa", "ttt", "cuhk03", 0, "lda")
    assert unit.settings == SETTINGS
    assert unit.result is None
    assert not finished(folder)
    assert run.checkpoint == folder / "checkpoint.pt"
    run.write_environment("cpu")
    assert json.loads((folder / "env.json").read_text())["device"] == "cpu"


def test_result_finishes_a_unit(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    assert run.result() is None
    result = a_result(unit="aaa", training="ttt")
    run.write_result(result)
    assert finished(tmp_path)
    assert run.result() == read_unit(tmp_path).result == result
    with pytest.raises(AssertionError, match="its own unit's folder"):
        run.write_result(dataclasses.replace(result, unit="bbb"))


@pytest.mark.parametrize("protocol", ["protocol1", "protocol3"])
def test_what_is_written_is_read(tmp_path: Path, protocol: str) -> None:
    target = "prid" if protocol == "protocol1" else "cuhk03"
    result = a_result(target, protocol=protocol, effective_rank=None, reconstructed="the router", target_data=True)
    result.write(tmp_path)
    assert Result.read(tmp_path) == result
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["format"] == 2
    absent = {"kept", "weights", "reranking"} | (
        set() if protocol == "protocol1" else {"mAP_std", "rank1_std", "splits"}
    )
    assert set(content) - {"format"} == FIELDS - absent
    assert content["selection"].keys() == {"rule", "score", "per_source", "scores", "left_out"}


def test_weights_are_recorded_and_older_records_have_none(tmp_path: Path) -> None:
    a_result(weights=Weights("ab" * 32, 312, 312)).write(tmp_path)
    assert Result.read(tmp_path).weights == Weights("ab" * 32, 312, 312)
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["weights"] == {"sha256": "ab" * 32, "matched": 312, "needed": 312}
    write_json(tmp_path / "result.json", {**content, "weights": {"sha256": "ab" * 32}})
    with pytest.raises(UsageError, match=r"result\.json: weights\.matched is missing$"):
        Result.read(tmp_path)
    del content["weights"]
    write_json(tmp_path / "result.json", content)
    assert Result.read(tmp_path).weights is None


FIELDS = {field.name for field in dataclasses.fields(Result)}
OPTIONAL = {
    field.name
    for field in dataclasses.fields(Result)
    if not field.default is field.default_factory is dataclasses.MISSING
}


@pytest.mark.parametrize("key", sorted(FIELDS - OPTIONAL))
def test_an_entry_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    a_result().write(tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    del content[key]
    write_json(tmp_path / "result.json", content)
    with pytest.raises(UsageError, match=rf"result\.json: {key} is missing$"):
        Result.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mAP": "0.3"}, "mAP: expected a valid number, got '0.3'"),
        ({"seed": 0.5}, "seed: expected a valid integer, got 0.5"),
        ({"flip_test": "no"}, "flip_test: expected a valid boolean, got 'no'"),
        ({"data": "drawn"}, "data: unknown value 'drawn' (did you mean 'real'?); expected one of: stand-in, real"),
        ({"cost": {"train_passes": 1, "test": "vector"}}, "cost.test_forwards is missing"),
        (
            {"cost": {"train_passes": 1, "test_forwards": 1, "test": "vectors"}},
            "cost.test: unknown value 'vectors' (did you mean 'vector'?); expected one of: vector, pairs",
        ),
        ({"splits": [{"mAP": 0.3}]}, "splits.0.rank1 is missing"),
        ({"rank_1": 0.3}, "rank_1: unknown key 'rank_1' (did you mean 'rank1'?); "),
        (
            {"selection": {"rule": "oracle", "score": 0.5, "per_source": {}, "rules": 1}},
            "selection.rules: unknown key 'rules' (did you mean 'rule'?); expected one of: rule, score, per_source",
        ),
        ({"format": 1}, " was written by an older version (format 1); run it again, or use the version that wrote it"),
        ({"format": 3}, "expected format 2, got 3; a newer version wrote it, update this one"),
    ],
)
def test_an_entry_that_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    a_result().write(tmp_path)
    path = tmp_path / "result.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(UsageError) as told:
        Result.read(tmp_path)
    assert str(told.value).startswith(str(path))
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_config_of_an_older_version_or_with_a_hole_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"unit": "aaa", "config": SETTINGS})
    for read in (read_unit, run_folder):
        with pytest.raises(
            UsageError, match=r"config\.json was written by an older version \(format 1\); run it again"
        ):
            read(tmp_path)
    settings = {key: value for key, value in SETTINGS.items() if key != "method"}
    write_json(path, {"format": 2, "unit": "aaa", "training": "ttt", "config": settings})
    with pytest.raises(UsageError, match=r"config\.json: config\.method is missing$"):
        read_unit(tmp_path)


@pytest.mark.parametrize("content", ["", '{"mAP": 0.', "\0" * 500, "[1]", None])
def test_a_damaged_result_is_named_and_counts_as_none(tmp_path: Path, content: str | None, capsys: Any) -> None:
    """None: a link to nothing. A result of another format is no damage, see above."""
    run = run_folder(tmp_path)
    if content is None:
        (tmp_path / RESULT).symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / RESULT).write_text(content)
    assert run.result() is run.known_result() is read_unit(tmp_path).result is None
    assert not finished(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / RESULT}: expected a JSON ")
    assert line.endswith("; the unit counts as unfinished")


def test_a_unit_that_lost_its_config_does_not_vanish(tmp_path: Path, capsys: Any) -> None:
    run = run_folder(tmp_path / "cuhk03-s0")
    run.write_result(a_result(unit="aaa", training="ttt"))
    (run.path / CONFIG).unlink()
    assert unit_folders(tmp_path) == [run.path]
    with pytest.raises(DamagedError, match=r"config\.json: expected a JSON file"):
        read_unit(run.path)
    assert unit_of(run.path) == ""
    assert "cuhk03-s0 is passed over" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"holds another run \(unit aaa, this is bbb\)"):
        RunFolder(run.path, "bbb", "ttt", SETTINGS).own_result()


def test_a_link_to_a_unit_that_is_gone_makes_room(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "cuhk03-s0"
    folder.symlink_to(tmp_path / "gone")
    assert run_folder(folder).known_result() is None
    assert not folder.is_symlink()
    assert "is a link to a folder that is gone; removed" in capsys.readouterr().err


def test_folders_in_the_place_of_files_and_leftovers_are_cleared(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / METRICS / "inside").mkdir(parents=True)
    for name in (".result.json.ab3_defg", ".buffer_bank.npz.00000000", ".mine.txt.00000000", ".result.json"):
        (tmp_path / name).touch()
    run_folder(tmp_path)
    left = {CONFIG, METRICS, f"{METRICS}.1", ".mine.txt.00000000", ".result.json"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert (tmp_path / f"{METRICS}.1" / "inside").is_dir()
    assert f"is a folder where a file belongs; it is {METRICS}.1 now" in capsys.readouterr().err


def test_a_result_is_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        a_result(mAP=float("nan")).write(tmp_path)
    assert not finished(tmp_path)


def test_every_entry_is_documented_once() -> None:
    described = re.findall(r"^ {8}([\w, ]+):", Result.__doc__ or "", flags=re.MULTILINE)
    assert sorted(", ".join(described).split(", ")) == sorted(FIELDS)


def test_a_real_run_writes_what_is_documented(standin_tiny: Path, tmp_path: Path) -> None:
    """The files are those of the module's docstring, and each is read back as it was written."""
    settings: dict[str, Any] = {"epochs": 1, "steps_per_epoch": 2, "warmup_epochs": 0, "milestones": ()}
    settings |= {"bank_warmup_updates": 0, "threads": 1, "wandb": "disabled", "image_height": 32, "image_width": 16}
    config = preset("standin", protocol="protocol3", target="cuhk03", **settings)
    result = run_unit(config, tmp_path, data_root=standin_tiny)
    files = {CONFIG, ENVIRONMENT, METRICS, CHECKPOINT, RESULT}
    files |= {UnitFolder(tmp_path).kept(name).name for name in (BUFFER_BANK, QUERIES)}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all(name in (runs.__doc__ or "") for name in files)
    unit = read_unit(tmp_path)
    assert unit.result == result
    assert unit.settings == config.to_dict()
    assert (unit.unit, unit.training) == (result.unit, result.training)
    assert (
        set(json.loads((tmp_path / RESULT).read_text()))
        == {"format", "reference", "kept", "data_sets"} | FIELDS - OPTIONAL
    )
    assert result.title == "LDA"
    assert result.cost.train_passes == 2
    assert result.parameters > 0


def test_metrics_survive_a_half_written_line_and_are_cut_back(tmp_path: Path, capsys: Any) -> None:
    run = run_folder(tmp_path)
    for step in (5, 10, 15):
        run.log({"step": step, "loss/total": 1.0 / step})
    assert run.sync_rows() == 3
    path = tmp_path / METRICS
    with path.open("a") as file:
        file.write('{"step": 20, "loss')
    assert [row["step"] for row in read_metrics(path)] == [5, 10, 15]
    rows = run.first_rows(2)
    assert rows is not None
    run.replace_rows(rows)
    assert [row["step"] for row in read_metrics(path)] == [5, 10]
    assert run.sync_rows() == 2
    assert run.first_rows(3) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bad", [b"", b'{"step": 5', b"\0" * 9, b"7", b'{"loss": 1}', b"\xff\xfe", b"[" * 50000])
def test_bad_lines_of_metrics_are_named_and_left_out(tmp_path: Path, bad: bytes, capsys: Any) -> None:
    run, path = run_folder(tmp_path), tmp_path / METRICS
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    assert run.rows() == [{"step": 1}, {"step": 3}]
    assert (run.first_rows(1), run.first_rows(2)) == ([{"step": 1}], None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {path}: line 2: expected a JSON object with a step; left out"


def test_metrics_that_cannot_be_read_say_nothing(tmp_path: Path, capsys: Any) -> None:
    run = run_folder(tmp_path)
    (tmp_path / METRICS).unlink()
    assert run.rows() == run.first_rows(0) == []
    assert run.first_rows(1) is None
    assert capsys.readouterr().err == ""
    (tmp_path / METRICS).mkdir()
    assert run.rows() == []
    assert "Is a directory" in capsys.readouterr().err


def test_environment_names_the_runs_parents() -> None:
    env = environment("cpu")
    assert env["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(env) == {"code", "commit", "dirty", "python", "versions", "host", "platform", "device", "command"}
    json.dumps(env)


def test_what_a_method_keeps_is_read_back(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    run.keep("prototypes", {"domains": np.array(["a", "b"]), "centres": np.eye(2)})
    assert [path.name for path in tmp_path.glob("*.npz")] == ["prototypes.npz"]
    with np.load(UnitFolder(tmp_path).kept("prototypes"), allow_pickle=False) as arrays:
        assert arrays["domains"].tolist() == ["a", "b"]
        np.testing.assert_array_equal(arrays["centres"], np.eye(2))
    assert run.damaged_kept() == []
    path = run.kept("prototypes")
    content = path.read_bytes()
    for damaged in (b"", content[:-30], content.replace(b"\xf0\x3f", b"\0\0"), b"\0" * len(content)):
        path.write_bytes(damaged)
        (line,) = run.damaged_kept()
        assert line.startswith(f"{path}: ")
    path.unlink()
    assert run.damaged_kept() == []
    assert run.damaged_kept(["prototypes"]) == [f"{path}: missing"]
