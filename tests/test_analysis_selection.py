"""How well a selection rule orders runs: against loops, on rules that are right, wrong, and nothing."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_files import write_json, write_study

from analysis.selection import Runs, gain, main, picked, read_runs, regret, rho, table
from analysis.study import load_study


def runs(rule: np.ndarray, mAP: np.ndarray) -> Runs:  # noqa: N803
    count, _, seeds = mAP.shape
    names = [f"trial-{index:04}" for index in range(count)]
    return Runs(names, names, ["lda"] * count, list(range(seeds)), mAP, {"rule": rule})


@pytest.fixture
def found() -> np.ndarray:
    return np.random.default_rng(0).normal(50, 5, (6, 3, 2))


def test_rho_of_a_right_and_a_wrong_rule(found: np.ndarray) -> None:
    assert rho(runs(2 * found + 3, found), "rule") == pytest.approx(1)
    assert rho(runs(-found, found), "rule") == pytest.approx(-1)
    other = np.random.default_rng(1).normal(size=found.shape)
    by_hand = []
    for target in range(3):
        a = [statistics.fmean(row) for row in other[:, target]]
        b = [statistics.fmean(row) for row in found[:, target]]
        ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
        by_hand.append(1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) / (6 * 35))
    assert rho(runs(other, found), "rule") == pytest.approx(statistics.fmean(by_hand))


def test_a_pick_is_measured_on_the_other_seeds(found: np.ndarray) -> None:
    rule = np.zeros_like(found)
    rule[4, :, 0] = rule[1, :, 1] = 1  # seed 0 picks 4, seed 1 picks 1
    given = runs(rule, found)
    np.testing.assert_allclose(picked(given, "rule"), [found[4, :, 1].mean(), found[1, :, 0].mean()])
    pick = (found[4, :, 1].mean() + found[1, :, 0].mean()) / 2
    assert regret(given, "rule") == pytest.approx(max(one.mean() for one in found) - pick)
    assert gain(given, "rule", 40.0) == pytest.approx(pick - 40)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Four trials, whose source validation is right and whose proxy domain is wrong; one unit lacks a rule's number."""
    folder = write_study(tmp_path / "s", scores=(0.50, 0.55, 0.52, 0.60))
    for path in folder.glob("trial-*/*/result.json"):
        said = json.loads(path.read_text())
        score = said["selection"]["score"]
        rules = {"source_validation": score, "proxy_domain": 1 - score, "oracle": said["mAP"]}
        if path.parent.name != "cuhk03-s0":
            rules["leave_one_source_out"] = score
        said["selection"]["scores"] = rules
        write_json(path, said)
    return folder


def test_rules_of_a_study(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_study(study)
    found = read_runs(loaded)
    assert list(found.scores) == ["source_validation", "proxy_domain", "oracle"]  # the fourth is not known everywhere
    assert found.mAP.shape == (4, 3, 1)
    grid = table(loaded, found)
    assert [row[1].split()[0] for row in grid.rows] == ["+1.00", "-1.00", "+1.00"]
    assert [row[3].split()[0] for row in grid.rows] == ["0.0", "10.0", "0.0"]
    assert [row[4].split()[0] for row in grid.rows] == ["+10.0", "+0.0", "+10.0"]  # above trial 0, the defaults
    assert main([str(study), "--output", str(tmp_path / "out")]) == 0
    assert "STAND-IN" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "selection.md", "selection.csv", "selection.png", "selection.pdf",
    }  # fmt: skip
    lines = pd.read_csv(tmp_path / "out" / "selection.csv")
    assert len(lines) == 12
    assert lines["mAP"].max() == pytest.approx(40.0)


def test_too_few_configurations_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_study(tmp_path / "s", scores=(0.5, 0.6)))]) == 2
    assert "2 configurations are finished, 3 or more are needed" in capsys.readouterr().err
