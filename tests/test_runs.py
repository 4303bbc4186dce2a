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
from lda.errors import UsageError
from lda.files import atomic, write_json
from lda.runs import (
    BUFFER_BANK,
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RESULT,
    Result,
    RunFolder,
    UnitFolder,
    environment,
    finished,
    is_unit,
    read_metrics,
    read_unit,
    unit_folders,
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
    return RunFolder(path, unit, "ttt", {**SETTINGS, **changes})


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
    over_splits = {"mAP_std", "rank1_std", "splits"}
    assert set(content) - {"format"} == FIELDS - (set() if protocol == "protocol1" else over_splits)
    assert content["selection"].keys() == {"rule", "score", "per_source"}


FIELDS = {field.name for field in dataclasses.fields(Result)}
OPTIONAL = {field.name for field in dataclasses.fields(Result) if field.default is not dataclasses.MISSING}


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
            {"selection": {"rule": "oracle", "score": 0.5, "per_source": {}, "scores": 1}},
            "selection.scores: unknown key 'scores' (did you mean 'score'?); expected one of: rule, score, per_source",
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


def test_damaged_result_is_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (tmp_path / "result.json").write_text('{"mAP": 0.')
    with pytest.raises(UsageError, match=r"result\.json: expected a JSON file"):
        run.result()


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
    files = {CONFIG, ENVIRONMENT, METRICS, CHECKPOINT, RESULT, UnitFolder(tmp_path).kept(BUFFER_BANK).name}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all(name in (runs.__doc__ or "") for name in files)
    unit = read_unit(tmp_path)
    assert unit.result == result
    assert unit.settings == config.to_dict()
    assert (unit.unit, unit.training) == (result.unit, result.training)
    assert set(json.loads((tmp_path / RESULT).read_text())) == {"format", "reference"} | FIELDS - OPTIONAL
    assert result.title == "LDA"
    assert result.cost.train_passes == 2
    assert result.parameters > 0


def test_metrics_survive_a_half_written_line_and_rewind(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for step in (5, 10, 15):
        run.log({"step": step, "loss/total": 1.0 / step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 20, "loss')
    assert [row["step"] for row in read_metrics(path)] == [5, 10, 15]
    run.rewind(10)
    assert [row["step"] for row in read_metrics(path)] == [5, 10]
    path.write_text('{"step": 5\n{"step": 10}\n')
    with pytest.raises(UsageError, match="line 1 is not valid JSON"):
        read_metrics(path)


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
