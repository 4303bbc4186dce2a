"""Studies of rows: methods with settings, compared as they are, each beside the control and the row above."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from studies import BASE, Command, no_leftovers

from analysis.comparison import AVERAGE, holm, protocol_table, sign_flip_p
from analysis.tables import render
from lda.errors import UsageError
from lda.runs import Result
from sweeps.list.study import confirm_jobs
from sweeps.plan.spec import StudySpec, flat, from_flat
from sweeps.plan.study_files import load, resolve, study_file

__all__ = ["no_leftovers"]

ROWS: dict[str, Any] = {
    "baseline": {"title": "plain BN"},
    "in": {"title": "plain IN", "method": "baseline", "set": {"baseline_norm": "instance"}},
    "shared": {"title": "AN, shared affine", "method": "lda", "set": {"an_affine": "shared", "bank_warmup_updates": 0}},
}


def spec_of(folder: Path, rows: dict[str, Any] = ROWS, **changes: Any) -> StudySpec:
    content = {
        "title": "Test", "cost": "seconds", "protocol": "protocol3", "rows": rows, "base": dict(BASE),
        "search": {"trials": 0, "pruning": {"rule": "none"}}, **changes,
    }  # fmt: skip
    (folder / "rows.yaml").write_text(yaml.safe_dump(content))
    return resolve(load(folder / "rows.yaml"), folder / "rows.yaml")


def test_a_row_is_a_method_with_settings(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert spec.entrants == ("baseline", "in", "shared")
    configs = {name: spec.config("cuhk03", 1, {"method": name}) for name in spec.entrants}
    assert [config.method.name for config in configs.values()] == ["baseline", "baseline", "lda"]
    assert configs["in"].value("baseline_norm") == "instance"
    assert configs["shared"].value("an_affine") == "shared"
    assert configs["shared"].value("steps_per_epoch") == 4
    jobs = confirm_jobs(spec, [])
    assert [(job.trial, job.origin) for job in jobs[:3]] == [
        ("trial-baseline", "baseline"), ("trial-in", "default"), ("trial-shared", "default"),
    ]  # fmt: skip
    assert from_flat(flat(spec)) == spec


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ({"a": {"title": "A", "method": "lad"}}, {}, "unknown method 'lad' .did you mean 'lda'"),
        ({"a": {"title": "A"}}, {}, "unknown method 'a'"),
        (
            {"lda": {"title": "A", "set": {"an_afine": "shared"}}},
            {},
            "rows.lda: unknown setting 'an_afine' .did you mean 'an_affine'",
        ),
        ({"lda": {"title": "A", "set": {"an_affine": "sharing"}}}, {}, "rows.lda: an_affine: unknown value 'sharing'"),
        ({"lda": {"title": "A", "set": {"seed": 3}}}, {}, "rows.lda: set.seed: is set for the whole study"),
        ({"lda": {"title": "A", "set": {"method": "snr"}}}, {}, "rows.lda: set.method: is a key of the row itself"),
        ({"lda": {"title": "A", "titel": "A"}}, {}, "rows.lda.titel: unknown key 'titel' .did you mean 'title'"),
        (ROWS, {"search": {"trials": 2}}, "search.trials: rows are compared as they are"),
        (ROWS, {"compare": ["lda"]}, "compare: a study has either methods or rows"),
    ],
)
def test_mistakes_are_told(rows: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        spec_of(tmp_path, rows, **changes)


@pytest.mark.parametrize("name", ["ablation", "inference", "sensitivity"])
def test_the_studies_of_rows_resolve(name: str) -> None:
    spec = resolve(load(study_file(name)), study_file(name))
    assert next(iter(spec.entrants)) == "baseline"
    hashes = {row: spec.config("cuhk03", 1, {"method": row}).unit_hash({"a": "1"}, "2") for row in spec.entrants}
    assert len(set(hashes.values())) == len(hashes), "no row stands twice"


def test_signs_are_flipped_in_every_way() -> None:
    pairs = np.array([[0.5, 1.0, -0.2], [0.7, 0.1, 0.9]])
    flat = pairs.ravel()
    means = [np.mean(flat * signs) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([abs(mean) >= abs(flat.mean()) - 1e-12 for mean in means])
    assert sign_flip_p(pairs) == pytest.approx(expected)
    assert sign_flip_p(np.ones((1, 5))) == pytest.approx(2 / 2**5)
    assert np.isnan(sign_flip_p(np.ones((1, 1))))


def test_holm_corrects_the_smallest_most() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, np.nan, 0.04, 0.03])), [0.03, np.nan, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])


@pytest.mark.slow
def test_a_study_of_rows_runs_and_is_tabulated(tmp_path: Path, standin_tiny: Path) -> None:
    command = Command(tmp_path, standin_tiny, spec={"rows": ROWS, "confirm": {"seeds": 2}, "targets": ["cuhk03"]})
    content = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    content["search"] = {"trials": 0, "pruning": {"rule": "none"}}
    del content["methods"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert command.run("--workers", "2") == 0, command.output
    table = protocol_table(command.study)
    assert list(dict.fromkeys(table["label"])) == ["plain BN", "plain IN", "AN, shared affine"]
    results = {
        (row, target, seed): 100 * Result.read(command.study / f"trial-{row}" / f"{target}-s{seed}").mAP
        for row in ROWS for target in ("cuhk03",) for seed in (1, 2)
    }  # fmt: skip
    average = table[table["target"] == AVERAGE].set_index("label")

    def gaps(row: str, other: str) -> list[float]:
        return [value - results[(other, *key[1:])] for key, value in results.items() if key[0] == row]

    shared = average.loc["AN, shared affine"]
    assert shared["mAP_gain"] == pytest.approx(np.mean(gaps("shared", "baseline")))
    assert shared["mAP_step"] == pytest.approx(np.mean(gaps("shared", "in")))
    assert np.isnan(average.loc["plain BN", "mAP_step"])
    raw = [sign_flip_p(np.array(gaps(row, "baseline"))) for row in ("in", "shared")]
    np.testing.assert_allclose(average["mAP_gain_p"].to_numpy()[1:], holm(np.array(raw)))
    text = render(command.study)
    assert "Points above the row before, paired by seed [95% bootstrap interval]" in text
    assert "Holm-corrected over the rows of a column" in text
