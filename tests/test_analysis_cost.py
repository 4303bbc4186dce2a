"""What accuracy costs: the table behind the picture, its artists, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_files import write_study

from analysis.comparison import AVERAGE, protocol_table, seed_table
from analysis.cost_figure import cost_figure, cost_table, differing, draw_cost, main
from analysis.house_style import new_figure
from analysis.study import load_study


def test_seeds_stand_behind_the_means_of_the_table(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", confirm_seeds=(1, 2)))
    seeds, table = seed_table(study), protocol_table(study)
    for metric in ("mAP", "rank1"):
        means = seeds.groupby(["label", "target"])[metric].mean()
        expected = table.set_index(["label", "target"])[metric]
        pd.testing.assert_series_equal(means.sort_index(), expected.sort_index(), check_names=False)
    assert sorted(seeds.loc[seeds["target"] == AVERAGE, "seed"].unique()) == [1, 2]


def test_every_configuration_lies_at_its_cost(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", confirm_seeds=(1, 2)))
    table, seeds = cost_table(study), seed_table(study)
    assert differing(table) == ["passes", "test_forwards"]
    assert dict(zip(table["label"], table["passes"], strict=True))["baseline, plain BN"] == 200
    axes = draw_cost(new_figure(1, 1, 4, 3)[1][0, 0], table, seeds[seeds["target"] == AVERAGE], "passes")
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["plain BN", "LDA"]
    np.testing.assert_array_equal(lines["LDA"].get_xdata(), [400, 400])
    own = table[table["method"] == "LDA"].sort_values("passes", kind="stable")
    np.testing.assert_allclose(lines["LDA"].get_ydata(), own["mAP"])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["200", "400"]
    assert len(cost_figure(study).axes) == 2


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "study")
    assert main([str(folder), "--output", str(tmp_path / "a.jpg")]) == 2
    assert "expected a name that ends in .png or .pdf" in capsys.readouterr().err
    assert main([str(folder), "--output", str(tmp_path / "a.png")]) == 2
    assert "every configuration costs the same" in capsys.readouterr().err
