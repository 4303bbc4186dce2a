"""Studies that compare methods: what is planned, what runs, at equal compute, and what the table says."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import BASE, Command, no_leftovers

from analysis.comparison import AVERAGE, protocol_table
from analysis.report_figures import pictures
from analysis.report_page import page
from analysis.study import load_study
from analysis.tables import render
from lda import methods
from lda.config import preset
from lda.errors import UsageError
from lda.runs import Result
from sweeps.list.study import confirm_jobs
from sweeps.plan.compute import at_equal_passes, train_passes
from sweeps.plan.spec import StudySpec, named_point, unnamed_point
from sweeps.plan.study_files import load, resolve, study_file

__all__ = ["no_leftovers"]


def spec_of(folder: Path, search: dict[str, Any] | None = None, **changes: Any) -> StudySpec:
    content = {
        "title": "Test", "cost": "seconds", "protocol": "protocol3", "compare": ["lda", "baseline", "mixstyle"],
        "search": {"trials": 0, "pruning": {"rule": "none"}, **(search or {})}, "base": dict(BASE), **changes,
    }  # fmt: skip
    file = folder / "compared.yaml"
    file.write_text(yaml.safe_dump(content))
    return load(file)


def resolved(folder: Path, search: dict[str, Any] | None = None, /, **options: Any) -> StudySpec:
    changes = {key: options.pop(key) for key in ("base", "methods", "confirm") if key in options}
    return resolve(spec_of(folder, search, **changes), folder / "compared.yaml", **options)


def test_the_study_of_all_methods_has_every_one_at_equal_compute() -> None:
    file = study_file("methods")
    spec = resolve(load(file), file)
    assert spec.entrants == (methods.CONTROL, *(name for name in methods.names() if name != methods.CONTROL))
    assert spec.compute == "passes"
    assert spec.preset is not None
    plain = preset(spec.preset).schedule
    for name in spec.entrants:
        config = spec.config(spec.targets[0], 1, {"method": name})
        passes = config.schedule.total_steps * train_passes(config)
        assert config.schedule.epochs == plain.epochs, "warm-up and milestones stay where they were"
        assert abs(passes - plain.total_steps) <= plain.epochs * train_passes(config) / 2, name


def test_equal_passes_are_steps_over_what_the_method_declares() -> None:
    one = preset("standin", method="baseline", steps_per_epoch=21)
    assert at_equal_passes(one) == one
    two = preset("standin", method="lda", steps_per_epoch=21)
    assert train_passes(two) == 2
    assert at_equal_passes(two).schedule.steps_per_epoch == round(21 / 2)
    assert at_equal_passes(two.replace(steps_per_epoch=1)).schedule.steps_per_epoch == 1


def test_each_method_is_searched_by_its_own_settings(tmp_path: Path) -> None:
    spec = resolved(tmp_path, {"trials": 2})
    assert spec.entrants == ("baseline", "lda", "mixstyle")
    assert list(spec.space("lda")) == ["consistency_weight", "alignment_weight", "bank_momentum"]
    assert list(spec.space("mixstyle")) == ["mixstyle_p", "mixstyle_alpha"]
    assert list(spec.space("baseline")) == list(methods.find("baseline").searched)
    assert spec.num_trials == len(spec.first_points) == 3 + 2 * sum(bool(spec.space(m)) for m in spec.entrants)
    assert spec.first_points[1] == {
        "method": "lda", "lda/consistency_weight": 0.1, "lda/alignment_weight": 0.1, "lda/bank_momentum": 0.9,
    }  # fmt: skip
    assert spec.first_points.count({"method": "mixstyle"}) == 2
    point = {"mixstyle_p": 0.5}
    assert unnamed_point(named_point("mixstyle", point)) == {"method": "mixstyle", **point}


def test_what_is_fixed_for_a_method_is_not_searched(tmp_path: Path) -> None:
    spec = resolved(tmp_path, {"trials": 2}, overrides={"bank_momentum": 0.5, "gem_p": 1.0})
    assert "bank_momentum" not in spec.space("lda")
    assert spec.config("cuhk03", 0, {"method": "lda"}).value("bank_momentum") == 0.5
    assert spec.config("cuhk03", 0, {"method": "mixstyle"}).value("gem_p") == 1.0


def test_without_a_search_the_defaults_run_under_the_names_of_their_methods(tmp_path: Path) -> None:
    spec = resolved(tmp_path, confirm={"seeds": 2})
    jobs = confirm_jobs(spec, [])
    assert [(job.trial, job.origin, job.seed) for job in jobs] == [
        ("trial-baseline", "baseline", 1), ("trial-lda", "default", 1), ("trial-mixstyle", "default", 1),
        ("trial-baseline", "baseline", 2), ("trial-lda", "default", 2), ("trial-mixstyle", "default", 2),
    ]  # fmt: skip
    assert spec.num_trials == 0
    assert spec.num_confirmations(0) == len(jobs)


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        ({"space": {"gem_p": {"low": 1, "high": 2}}}, {}, "search.space: a study that compares methods sweeps what"),
        ({"sampler": "gp"}, {}, "search.sampler: gp takes one space for all trials; use tpe or random"),
        ({"trials": 1, "pruning": {"rule": "percentile"}}, {}, "trials of different methods do not compare"),
        ({}, {"confirm": {"seeds": 0}}, "confirm.seeds: with search.trials 0 nothing would run"),
        ({}, {"overrides": {"method": "lda"}}, "this study compares methods; choose among them by --methods"),
        ({}, {"overrides": {"dsbn_affine": "shared"}}, "dsbn_affine: is a setting of method dsbn"),
        ({}, {"compare": ["lad"]}, "unknown method 'lad' .did you mean 'lda'"),
        ({}, {"compare": ["dsbn"]}, "--methods: unknown method of this study 'dsbn'"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, search: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolved(tmp_path, search, **options)


def test_a_study_of_one_method_has_no_methods_to_pick(tmp_path: Path) -> None:
    file = study_file("smoke")
    with pytest.raises(UsageError, match="--methods: this study is of one method; choose it by --set method=NAME"):
        resolve(load(file), file, compare=["lda"])


def command_of(folder: Path, standin: Path, trials: int) -> Command:
    search = {"space": {}, "trials": trials}
    spec = {"compare": ["lda", "baseline", "mixstyle"], "compute": "passes", "confirm": {"seeds": 2 - trials}}
    spec["targets"] = ["cuhk03"]
    return Command(folder, standin, spec=spec, search=search)


@pytest.mark.slow
def test_methods_are_compared_on_fresh_seeds_and_another_may_join(tmp_path: Path, standin_tiny: Path) -> None:
    command = command_of(tmp_path, standin_tiny, 0)
    assert command.run("--methods", "baseline,lda") == 0, command.output
    assert command.run() == 0, command.output
    study = load_study(command.study)
    assert study.record.compare == ("baseline", "lda", "mixstyle")
    assert sorted(study.trials["name"]) == ["trial-baseline", "trial-lda", "trial-mixstyle"]
    assert study.units["confirms"].all()
    for name, steps in (("baseline", 4), ("lda", 2), ("mixstyle", 4)):
        assert Result.read(command.study / f"trial-{name}" / "cuhk03-s1").steps == steps
    table = (
        protocol_table(study).query("target == @AVERAGE", local_dict={"AVERAGE": AVERAGE}).set_index("configuration")
    )
    assert table.loc["default", "label"].tolist() == ["LDA", "MixStyle"]
    assert table["seeds"].tolist() == [2, 2, 2]
    text = render(study)
    assert "equal passes" in text
    assert "[95% bootstrap interval]" in text
    for word in ("ICLR 2021", "passes/image", "target images", "What a method is and costs"):
        assert word in text
    assert [picture.name for picture in pictures(study)["results"]][:1] == ["results"]


@pytest.mark.slow
def test_each_method_gets_as_many_trials_and_its_best_is_confirmed(tmp_path: Path, standin_tiny: Path) -> None:
    command = command_of(tmp_path, standin_tiny, 1)
    assert command.run() == 0, command.output
    study = load_study(command.study)
    tried = study.trials[study.trials["origin"] == "search"]["name"]
    searched = [json.loads((command.study / name / "trial.json").read_text())["params"] for name in tried]
    names = [params["method"] for params in searched]
    assert sorted(names) == sorted(m for m in ("baseline", "lda", "mixstyle") if methods.find(m).searched)
    lda = next(params for params in searched if params["method"] == "lda")
    assert set(lda) == {"method", "consistency_weight", "alignment_weight", "bank_momentum"}
    table = protocol_table(study)
    labels = table["label"].drop_duplicates().tolist()
    assert labels[0] == "plain BN"
    assert {"LDA", "LDA, best of 2", "MixStyle", "MixStyle, best of 2"} <= set(labels)
    assert table["confirmed"].all()
    assert "best of 2" in page(study, {}, date(2026, 1, 1))
