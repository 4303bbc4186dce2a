"""analysis.study on small study folders in the real format."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from study_files import write_json, write_study, write_trial, write_unit

from analysis.comparison import CONDITIONS
from analysis.study import METRIC_NAMES, load_metrics, load_study, print_name
from lda.errors import UsageError
from lda.runs import Result, print_method


def test_a_study_becomes_tables(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "protocol3", confirm_seeds=(1, 2)))
    assert study.name == "protocol3"
    assert study.targets == ["cuhk03", "msmt17", "market1501"]
    assert study.data == "stand-in"
    assert study.trials["name"].tolist() == ["trial-0000", "trial-0001", "trial-0002", "trial-baseline"]
    assert study.trials["param/bank_momentum"].iloc[0] == 0.9
    assert len(study.units) == 3 * (3 + 3 + 1 + 2)
    unit = study.units.set_index(["trial", "target", "seed"]).loc[("trial-0001", "msmt17", 2)]
    assert (unit["unit"], unit["method"], bool(unit["confirms"])) == ("msmt17-s2", "lda", True)
    assert (unit["mAP"], unit["score"], unit["selection"]) == (pytest.approx(0.37), 0.55, "source_validation")
    assert study.units["target"].iloc[:9].tolist() == ["cuhk03"] * 3 + ["msmt17"] * 3 + ["market1501"] * 3
    confirms = study.units[study.units["confirms"].astype(bool)]
    assert set(confirms["seed"]) == {1, 2}


def test_best_and_default(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", scores=(0.6, 0.5, 0.55, 0.55), confirm_seeds=(1,))
    write_trial(folder / "trial-0004", 4, None, [], state="pruned", reason="below the median")
    study = load_study(folder)
    trials = {
        "best": study.best_trial(),
        "searched": study.best_searched_trial(),
        "default": study.default_trial(),
        "baseline": study.baseline_trial(),
    }
    assert {key: trial["name"] for key, trial in trials.items() if trial is not None} == {
        "best": "trial-0000",
        "searched": "trial-0002",  # the first of equals; better than no other trial, though not than the defaults
        "default": "trial-0000",
        "baseline": "trial-baseline",
    }
    assert study.trials.set_index("name").loc["trial-0004", "reason"] == "below the median"


def test_a_study_that_just_began(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", scores=())
    study = load_study(folder)
    assert study.trials.empty
    assert study.units.empty
    assert study.best_trial() is study.default_trial() is None
    write_unit(folder / "trial-0000" / "cuhk03-s0", "cuhk03", finished=False)
    write_trial(folder / "trial-0000", 0, None, ["cuhk03-s0"], state="running")
    study = load_study(folder)
    assert study.units["finished"].tolist() == [False]
    assert study.best_trial() is None
    assert study.data == "stand-in"


def test_targets_are_those_of_the_study_in_table_order(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    spec = json.loads((folder / "study.json").read_text())
    write_json(folder / "study.json", {**spec, "targets": ["market1501", "cuhk03"]})
    assert load_study(folder).targets == ["cuhk03", "market1501"]


def test_metrics_of_a_killed_run(tmp_path: Path) -> None:
    write_unit(tmp_path, "cuhk03", finished=False)
    whole = load_metrics(tmp_path)
    assert whole["step"].tolist() == [*range(20, 201, 20), 100, 200]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 220, "loss/id_')
    assert load_metrics(tmp_path).equals(whole)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 240}\n')
    assert load_metrics(tmp_path).equals(whole)  # the torn line is left out, and so is one without an epoch
    assert load_metrics(tmp_path / "nothing").empty


def test_what_is_no_study_is_explained(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "protocol3", scores=(0.5,))
    with pytest.raises(UsageError, match=r"protocl3 does not exist; expected .* \(did you mean .*protocol3\?\)"):
        load_study(tmp_path / "protocl3")
    with pytest.raises(UsageError, match=r"holds no study\.json; .*: protocol3$"):
        load_study(tmp_path)
    with pytest.raises(UsageError, match="is a single run; expected a study's folder"):
        load_study(folder / "trial-0000" / "cuhk03-s0")
    spec = json.loads((folder / "study.json").read_text())
    write_json(folder / "study.json", {**spec, "protocol": "protocol9"})
    with pytest.raises(UsageError, match=r"study\.json: unknown protocol 'protocol9' \(did you mean"):
        load_study(folder)
    write_json(folder / "study.json", {**spec, "targets": "cuhk03"})
    with pytest.raises(UsageError, match=r"study\.json: targets: expected .*array.*, got 'cuhk03'"):
        load_study(folder)
    write_json(folder / "study.json", {key: value for key, value in spec.items() if key != "space"})
    with pytest.raises(UsageError, match=r"study\.json: space is missing; the study's own command writes it again$"):
        load_study(folder)


def test_trial_files_are_checked_key_by_key(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "protocol3", scores=(0.5,))
    path = folder / "trial-0000" / "trial.json"
    trial = json.loads(path.read_text())
    write_json(path, {**trial, "origin": "defaults"})
    (flaw,) = load_study(folder).flaws
    assert str(flaw) == "trial-0000 (trial.json damaged)"
    assert "trial.json: origin: unknown value 'defaults' (did you mean 'default'?)" in flaw.detail
    write_json(path, {key: value for key, value in trial.items() if key != "confirm_units"})
    (flaw,) = load_study(folder).flaws
    assert flaw.detail.endswith("trial.json: confirm_units is missing")


def test_files_of_an_older_version_are_told_in_one_line(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "protocol3", scores=(0.5,))
    unit = folder / "trial-0000" / "cuhk03-s0"
    for path in (unit / "result.json", unit / "config.json", folder / "study.json"):
        content = json.loads(path.read_text())
        del content["format"]
        write_json(path, content)
        expected = f"{path} was written by an older version (format 1); run it again, or use the version that wrote it"
        if path.parent == unit:
            flaw = next(flaw for flaw in load_study(folder).flaws if flaw.where == "trial-0000/cuhk03-s0")
            assert (str(flaw), flaw.detail) == (f"trial-0000/cuhk03-s0 ({path.name} of another version)", expected)
        else:
            with pytest.raises(UsageError) as told:
                load_study(folder)
            assert str(told.value) == expected


def test_a_column_for_every_plain_entry_of_a_result(tmp_path: Path) -> None:
    """Finished or not: the names are those of lda.runs."""
    finished = load_study(write_study(tmp_path / "finished")).units
    running = write_study(tmp_path / "running", scores=())
    write_unit(running / "trial-0000" / "cuhk03-s0", "cuhk03", finished=False)
    write_trial(running / "trial-0000", 0, None, ["cuhk03-s0"], state="running")
    empty = load_study(write_study(tmp_path / "empty", scores=())).units
    assert set(finished.columns) == set(load_study(running).units.columns) == set(empty.columns)
    unit = finished.iloc[0]
    result = Result.read(unit["path"])
    for field in dataclasses.fields(Result):
        value = getattr(result, field.name)
        if field.name not in ("unit", "selection") and isinstance(value, str | int | float | bool):
            assert unit[field.name] == value, field.name
    assert (unit["train_passes"], unit["test_forwards"], unit["test"]) == (2.0, 4.0, "vector")
    assert set(METRIC_NAMES) | set(CONDITIONS) <= set(finished.columns)


def test_print_name() -> None:
    assert print_name("market1501") == "Market-1501"
    assert print_name("my_own_set") == "my_own_set"


def test_methods_are_marked_where_a_reader_must_know_more() -> None:
    assert print_method("LDA", "", False) == "LDA"
    assert print_method("RaMoE", "the router", False) == "RaMoE [reconstruction]"
    assert print_method("MDA", "the latent mode", True) == "MDA [reconstruction, target images]"


def test_reading_needs_no_heavy_package() -> None:
    code = "import sys, analysis.tables; print(sorted({'torch', 'optuna', 'wandb', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
