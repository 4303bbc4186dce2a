"""Study files: every mistake is one line that names file, key, value and the nearest valid key."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lda import methods
from lda.config import preset
from lda.errors import UsageError
from lda.protocols import PROTOCOLS
from sweeps.plan.spec import StudySpec, differences, flat, from_dict, from_flat, same_study, to_dict
from sweeps.plan.study_files import STUDIES, load, resolve, study_file, study_names

GOOD: dict[str, Any] = {
    "title": "t",
    "cost": "c",
    "protocol": "protocol3",
    "search": {"trials": 3, "space": {"bank_momentum": {"low": 0.5, "high": 0.99}}},
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def read(path: Path, **options: Any) -> StudySpec:
    return resolve(load(path), path, **options)


def search(**changes: Any) -> dict[str, Any]:
    return {**GOOD["search"], **changes}


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_are_valid_and_start_from_the_defaults(name: str) -> None:
    spec = read(study_file(name))
    assert spec.targets == tuple(t for t in spec.targets if t in PROTOCOLS[spec.protocol].targets)
    base = preset("standin")
    own = list(methods.find("lda").searched)
    assert list(spec.space("lda")) == ([] if spec.rows else own) or name == "readings"
    assert spec.defaults_of("lda") == {key: base.value(key) for key in spec.space("lda")}
    assert spec.compare or spec.first_points[0] == spec.defaults
    assert from_dict(to_dict(spec)) == spec
    opening = study_file(name).read_text().split("\ntitle:")[0]
    assert f"python sweeps/run.py --study {name}" in opening
    assert "Poster" in opening


def test_real_data_takes_the_real_preset(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert read(path).config("cuhk03", 0, {}).network.backbone == "small"
    assert read(path, real_data=True).config("cuhk03", 0, {}).network.backbone == "resnet50"
    steps = read(path).config("cuhk03", 0, {}).schedule.total_steps
    long = write(tmp_path, preset="standin_long")
    assert read(long).config("cuhk03", 0, {}).schedule.total_steps > steps
    assert read(long, real_data=True).config("cuhk03", 0, {}).network.backbone == "resnet50"
    assert read(long, real_data=True, preset="standin").config("cuhk03", 0, {}).schedule.total_steps == steps


def test_settings_of_a_target(tmp_path: Path) -> None:
    path = write(tmp_path, per_target={"msmt17": {"steps_per_epoch": 7}})
    steps = {target: read(path).config(target, 0, {}).schedule.steps_per_epoch for target in ("cuhk03", "msmt17")}
    assert steps == {"cuhk03": 20, "msmt17": 7}
    assert read(path, overrides={"steps_per_epoch": 3}).config("msmt17", 0, {}).schedule.steps_per_epoch == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"msmt": {}}, "msmt17"),
        ({"msmt17": {"seed": 3}}, "per_target.msmt17.seed: is set for the whole study, use --seed"),
        ({"msmt17": {"steps_per_epok": 3}}, "did you mean 'steps_per_epoch'"),
        ({"msmt17": {"epochs": 0}}, "per_target.msmt17.epochs: 0 is out of range"),
        ({"msmt17": {"bank_momentum": 0.5}}, "per_target.msmt17.bank_momentum: is set for every target alike"),
    ],
)
def test_settings_of_a_target_that_are_wrong(tmp_path: Path, settings: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        read(write(tmp_path, per_target=settings))


def test_fresh_seeds_of_the_confirmation(tmp_path: Path) -> None:
    spec = read(write(tmp_path), seed=7, confirm_seeds=3)
    assert (spec.seed, list(spec.confirm_seeds)) == (7, [8, 9, 10])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"titel": "x"}, "titel: unknown key 'titel' (did you mean 'title'?)"),
        ({"search": search(trails=3)}, "search.trails: unknown key 'trails' (did you mean 'trials'?)"),
        (
            {"search": search(space={"bank_momentum": {"low": 0.5, "hihg": 0.9}})},
            "search.space.bank_momentum.hihg: unknown key 'hihg' (did you mean 'high'?)",
        ),
        ({"search": search(trials=0)}, "search.trials: expected 1 or more, got 0"),
        (
            {"search": search(sampler="tpee")},
            "search.sampler: unknown value 'tpee' (did you mean 'tpe'?)",
        ),
        ({"search": None}, "search: expected"),
        ({"protocol": "protocol4"}, "unknown protocol 'protocol4' (did you mean 'protocol"),
        ({"targets": ["viper"]}, "unknown target of Protocol-3 'viper'"),
        ({"base": {"epoch": 3}}, "unknown setting 'epoch' (did you mean 'epochs'?)"),
        ({"base": {"epochs": 0}}, "epochs: 0 is out of range, expected 1 to"),
        ({"base": {"seed": 3}}, "base.seed: is set for the whole study, use --seed"),
        (
            {"base": {"bank_momentum": 0.9}},
            "search.space.bank_momentum: is set for every trial as well",
        ),
        ({"search": search(space={"bank_momentm": {"low": 0, "high": 1}})}, "did you mean 'bank_momentum'?"),
        (
            {"search": search(space={"bank_momentum": {"low": 0.5, "high": 1.5}})},
            "search.space.bank_momentum: 1.5 is out of range, expected 0.0 to 0.9999",
        ),
        (
            {"search": search(space={"bank_momentum": {"low": 0.5}})},
            "search.space.bank_momentum: expected low and high",
        ),
        (
            {"search": search(space={"threads": {"low": 1, "high": 2}})},
            "search.space.threads: cannot be swept: it cannot change what is learnt",
        ),
        ({"search": search(space={"donor": {"low": 1, "high": 2}})}, "search.space.donor: expected choices"),
        (
            {"search": search(space={"donor": {"choices": ["uniform", "rnd"]}})},
            "search.space.donor: unknown value 'rnd'",
        ),
        (
            {"search": search(space={"alignment_weight": {"low": 0.0, "high": 1, "log": True}})},
            "search.space.alignment_weight.low: 0.0 on a log scale",
        ),
        ({"search": search(space={"epochs": {"low": 1.5, "high": 4}})}, "search.space.epochs: expected a whole number"),
        (
            {"search": search(space={"bank_momentum": {"low": 0.1, "high": 0.5}})},
            "search.space.bank_momentum: 0.9 is outside the swept range 0.1 to 0.5 (the default",
        ),
        (
            {"search": search(enqueue=[{"bank_momentum": 0.4}])},
            "search.enqueue.0.bank_momentum: 0.4 is outside the swept",
        ),
        ({"search": search(enqueue=[{"gem_p": 2.0}])}, "search.enqueue.0.gem_p: unknown swept setting 'gem_p'"),
        ({"search": search(sampler="grid")}, "search.space.bank_momentum: the grid sampler needs choices, or a step"),
        ({"grace_seconds": 30}, "grace_seconds: 30 is below three heartbeats of 20 s"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert expected in message


@pytest.mark.parametrize("text", ["- a\n", "3", ""])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="expected keys and values"):
        load(path)


def test_yaml_that_cannot_be_read_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("title: x\nsearch: {trials: 3\n")
    with pytest.raises(UsageError, match=r"mine.yaml: line 3: not valid YAML"):
        load(path)


HEAD = "title: t\ncost: c\nprotocol: protocol3\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "search: {trials: 3}\nsearch: {trials: 4}\n",
            "line 5: not valid YAML: the key 'search' stands twice",
        ),
        ("search:\n  trials: 3\n  sampler: gp\n  trials: 4\n", "line 7: not valid YAML: the key 'trials' stands twice"),
        ("search: {trials: 3, trials: 3}\n", "line 4: not valid YAML: the key 'trials' stands twice, first in line 4"),
        ("search:\n  space:\n    gem_p: {}\n    gem_p: {}\n", "line 7: not valid YAML: the key 'gem_p' stands twice"),
        ("search: {}\n? [a]\n: 1\n", "not valid YAML: found unhashable key"),
        ("search: {}\n---\na: 1\n", "not valid YAML: but found another document"),
        ("search: !!python/object:os.system {}\n", "not valid YAML: could not determine a constructor"),
        ("search: {}\0\n", "not valid YAML: unacceptable character"),
        ("search: " + "[" * 3000 + "]" * 3000, "lists or keys inside each other without end"),
        ("search: {}\nseed: 2024-01-45\n", "day is out of range"),
        ("search: {}\non: 3\n", "Keys should be strings, got True"),
        ("search: {hours: .inf}\n", "search.hours: expected a finite number, got inf"),
        (f"search: {{}}\nseed: {2**30}\n", "seed: expected less than or equal to 1073741823, got 1073741824"),
        (f"search: {{trials: {10**12}}}\n", "search.trials: expected less than or equal to 100000"),
        ("search: {}\ntargets: [cuhk03, cuhk03]\n", "targets: each once, got ['cuhk03', 'cuhk03']"),
        ("search: {}\ntargets: [CUHK03]\n", "unknown target of Protocol-3 'CUHK03' (did you mean 'cuhk03'?)"),
        ("search: {sampler: grid, space: {gem_p: {low: 1, high: 9, step: 1.0e-9}}}\n", "a grid of 8000000001 points"),
    ],
)
def test_text_that_is_no_study_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + text)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert told in str(caught.value)
    assert "mine.yaml: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_keys_that_are_merged_may_be_overruled(tmp_path: Path) -> None:
    """YAML's own way to say a key twice."""
    path = tmp_path / "mine.yaml"
    space = "    gem_p: &range {low: 1.0, high: 4.0}\n    bank_momentum: {<<: *range, low: 0.5, high: 0.9}\n"
    path.write_text(f"{HEAD}search:\n  space:\n{space}")
    assert read(path).search.space["bank_momentum"].high == 0.9


def test_exponents_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: t\ncost: c\nprotocol: protocol3\nbase: {weight_decay: 5e-4}\n"
        "search: {trials: 2, space: {alignment_weight: {low: 1e-2, high: 1e0, log: true}}}\n"
    )
    assert isinstance(yaml.safe_load(path.read_text())["base"]["weight_decay"], str)  # the trap
    spec = read(path)
    assert spec.base["weight_decay"] == 5e-4
    assert spec.search.space["alignment_weight"].bounds == (0.01, 1.0)


def test_set_fixes_a_swept_setting(tmp_path: Path) -> None:
    space = {"bank_momentum": {"low": 0.5, "high": 0.99}, "alignment_weight": {"low": 0.01, "high": 1.0}}
    path = write(tmp_path, search=search(space=space, enqueue=[{"bank_momentum": 0.6, "alignment_weight": 0.5}]))
    spec = read(path, overrides={"bank_momentum": 0.2})
    assert list(spec.search.space) == ["alignment_weight"]
    assert spec.search.enqueue == ({"alignment_weight": 0.5},)
    assert spec.config("cuhk03", 0, {}).value("bank_momentum") == 0.2


def test_nothing_left_to_sweep(tmp_path: Path) -> None:
    """One trial then: others would only repeat it."""
    spec = read(write(tmp_path), overrides={"bank_momentum": 0.6}, trials=5)
    assert (spec.search.trials, spec.first_points) == (1, [{}])
    spec = read(write(tmp_path, search={"trials": 5}), overrides={"method": "baseline"})
    assert (spec.search.trials, spec.control) == (1, None)


def test_a_method_brings_its_own_space_and_settings(tmp_path: Path) -> None:
    path = write(tmp_path, search={"trials": 2}, methods={"lda": {"donor": "round_robin"}})
    spec = read(path)
    assert list(spec.search.space) == ["consistency_weight", "alignment_weight", "bank_momentum"]
    assert spec.control == "baseline"
    assert spec.config("cuhk03", 0, {}).value("donor") == "round_robin"
    assert spec.config("cuhk03", 0, {"method": "baseline"}).method.name == "baseline"  # LDA's settings stay behind
    other = read(path, overrides={"method": "mldg", "mldg_beta": 1.0})
    assert list(other.search.space) == ["mldg_inner", "mldg_inner_rate"]
    assert other.config("cuhk03", 0, {}).value("mldg_beta") == 1.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"methods": {"ldaa": {}}}, "unknown method 'ldaa' (did you mean 'lda'?)"),
        ({"methods": {"lda": {"epochs": 3}}}, "methods.lda.epochs: unknown setting of its own 'epochs'"),
        ({"methods": {"lda": {"donor": "other"}}}, "donor: unknown value 'other'"),
        ({"base": {"method": "mldg"}}, "search.space.bank_momentum: is a setting of methods lda"),
        ({"search": search(space={"epochs": {"low": 2, "high": 4}})}, "set search.pruning.rule to none"),
    ],
)
def test_methods_and_their_settings_are_checked(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        read(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_first_points(tmp_path: Path) -> None:
    space = {"bank_momentum": {"choices": [0.5, 0.9]}, "donor": {"choices": ["uniform", "round_robin"]}}
    path = write(tmp_path, search=search(space=space, sampler="grid", trials=9, enqueue=[{"donor": "round_robin"}]))
    points = read(path).first_points
    assert points[0] == {"bank_momentum": 0.9, "donor": "uniform"}
    assert points[1] == {"bank_momentum": 0.9, "donor": "round_robin"}  # a key left out takes its default
    assert len(points) == 4  # the grid, nothing twice


def test_a_study_file_comes_back_from_study_json(tmp_path: Path) -> None:
    """study.json holds every key once, beside what else it says."""
    space = {"bank_momentum": {"choices": [0.5, 0.9]}, "gem_p": {"low": 1.0, "high": 5.0, "step": 1.0}}
    changed = search(space=space, sampler="grid", hours=2, device_hours=3.5, retries=1, enqueue=[{"gem_p": 2.0}])
    spec = read(write(tmp_path, search=changed, base={"epochs": 2}), seed=3)
    content = json.loads(json.dumps(flat(spec)))
    assert from_flat({**content, "format": 2, "command": "python sweeps/run.py"}) == spec
    assert content["budget"] == {"trials": 3, "hours": 2.0, "device_hours": 3.5, "retries": 1}
    assert "search" not in content


def test_what_may_change_while_a_study_lasts(tmp_path: Path) -> None:
    path = write(tmp_path)
    spec = read(path)
    more = read(path, trials=50, confirm_seeds=5, overrides={"wandb": "disabled"})
    assert differences(same_study(spec), same_study(more)) == []
    other = dataclasses.replace(read(path, overrides={"epochs": 3}), seed=4)
    found = differences(same_study(spec), same_study(other))
    assert found == ["base.epochs (None before, 3 now)", "seed (0 before, 4 now)"]


def test_studies_by_name_and_by_file(tmp_path: Path) -> None:
    assert study_file("smoke") == STUDIES / "smoke.yaml"
    assert study_file(str(write(tmp_path))) == tmp_path / "mine.yaml"
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        study_file("smok")
    with pytest.raises(UsageError, match="there is no such file"):
        study_file("missing.yaml")
