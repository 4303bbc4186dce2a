"""The parts of a report by numbers and artists: queries, the rule, importance, words; and its pages in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import date
from pathlib import Path

import numpy as np
import optuna
import pytest
from scipy import stats
from study_files import write_bank, write_json, write_study

from analysis import report
from analysis.bank_numbers import domain_distances, read_bank
from analysis.bank_pairs import closeness, course, named_pair, pairs_figure, pairs_of_layers
from analysis.house_style import new_figure
from analysis.importance import importance_figure, importances
from analysis.query_figures import (
    cmc_table,
    differences,
    draw_cmc,
    draw_differences,
    read_queries,
    shown_configurations,
)
from analysis.report_page import page
from analysis.report_words import failures, headline, unnamed
from analysis.rule_figure import rank_correlation, rule_figure, scored
from analysis.study import load_study
from lda.runs import QUERIES, UnitFolder
from sweeps.importance import write_importance
from sweeps.study_folder import StudyFolder


def test_curves_and_gaps_are_those_of_the_files(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", confirm_seeds=(1, 2)))
    table = cmc_table(study)
    one = study.units[(study.units["trial"] == "trial-baseline") & (study.units["seed"] == 1)].iloc[0]
    own = table[(table["label"] == "baseline, plain BN") & (table["seed"] == 1) & (table["target"] == one["target"])]
    assert own["rank"].tolist() == list(range(1, 21))
    assert own["share"].iloc[0] == pytest.approx(100 * one["rank1"])
    looks = shown_configurations(study)
    assert list(looks) == ["baseline, plain BN", "LDA, best of 3 (trial 1)", "LDA, defaults (trial 0)"]
    axes = draw_cmc(new_figure(1, 1, 4, 3)[1][0, 0], table[table["target"] == "cuhk03"], looks)
    assert len(axes.lines) == len(axes.collections) == 3

    gaps = differences(study)
    means = gaps.groupby(["label", "target"])["difference"].mean()
    for (label, target), found in means.items():
        trial = {"LDA, defaults (trial 0)": "trial-0000"}.get(label, "trial-0001")
        runs = study.units[study.units["confirms"].astype(bool) & (study.units["target"] == target)]
        mAP = {name: rows["mAP"].astype(float).mean() for name, rows in runs.groupby("trial")}  # noqa: N806
        assert found == pytest.approx(mAP[trial] - mAP["trial-baseline"])
    assert (gaps.groupby(["label", "target"]).size() == 2 * 20).all()  # the query without a match is skipped
    axes = draw_differences(new_figure(1, 1, 4, 3)[1][0, 0], gaps[gaps["target"] == "cuhk03"], looks)
    assert [text.get_text() for text in axes.texts] == ["100% up, 0% down"] * 2


def test_queries_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", confirm_seeds=(1,)))
    path = UnitFolder(study.units.iloc[0]["path"]).kept(QUERIES)
    path.write_bytes(path.read_bytes()[:40])
    assert read_queries(path.parent) is None
    path.unlink()
    assert read_queries(path.parent) is None


def test_the_rule_beside_the_target(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", scores=(0.5, 0.6, 0.4, 0.55)))
    table = scored(study)
    assert table["score"].tolist() == pytest.approx([50, 60, 40, 55])
    assert table["mAP"].tolist() == pytest.approx([30, 40, 20, 35])
    assert rank_correlation(table) == pytest.approx(1.0)
    shuffled = table.assign(mAP=[20.0, 30.0, 40.0, 10.0])
    assert rank_correlation(shuffled) == pytest.approx(stats.spearmanr(table["score"], shuffled["mAP"]).statistic)
    assert np.isnan(rank_correlation(table[:2]))
    figure = rule_figure(study)
    assert figure is not None
    assert "rho +1.00" in figure.get_suptitle()
    assert rule_figure(load_study(write_study(tmp_path / "few", scores=(0.5, 0.6)))) is None


def test_importance_of_a_setting_that_matters_alone(tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    folder = StudyFolder(write_study(tmp_path / "study"))
    search.optimize(lambda trial: trial.suggest_float("a", 0, 1) + 0 * trial.suggest_float("b", 0, 1), n_trials=9)
    write_importance(search, folder)
    assert not (folder.path / "importance.json").exists()  # too few to say anything
    search.optimize(lambda trial: trial.suggest_float("a", 0, 1) + 0 * trial.suggest_float("b", 0, 1), n_trials=31)
    write_importance(search, folder)
    study = load_study(folder.path)
    table = importances(study)
    assert set(table["trials"]) == {40}
    assert set(table["evaluator"]) == {"fANOVA", "PED-ANOVA"}
    assert (table[table["setting"] == "a"]["share"] > 0.8).all()
    figure = importance_figure(study)
    assert figure is not None
    assert "n = 40" in figure.get_suptitle()
    (folder.path / "importance.json").write_text("{")
    assert importances(study).empty
    assert importance_figure(study) is None


def test_pairs_of_a_bank(tmp_path: Path) -> None:
    write_bank(tmp_path / "buffer_bank.npz", ["market1501", "cuhk02", "cuhk03", "cuhk_sysu"])
    bank = read_bank(tmp_path / "buffer_bank.npz")
    distances = domain_distances(bank)
    assert named_pair(distances) == ("cuhk02", "cuhk03")
    others = [distances.loc[a, b] for a, b in [("market1501", "cuhk02"), ("market1501", "cuhk03"),
              ("market1501", "cuhk_sysu"), ("cuhk02", "cuhk_sysu"), ("cuhk03", "cuhk_sysu")]]  # fmt: skip
    assert closeness(distances, "cuhk02", "cuhk03") == pytest.approx(
        distances.loc["cuhk02", "cuhk03"] / np.mean(others)
    )
    layers = pairs_of_layers(bank)
    own = layers[(layers["first"] == "cuhk02") & (layers["second"] == "cuhk03")]
    assert own["distance"].mean() == pytest.approx(distances.loc["cuhk02", "cuhk03"])
    rows = [
        {"step": step, "epoch": 1, "bank/cuhk02-cuhk03": 0.1 * step, "bank/cuhk02-cuhk_sysu": 0.4} for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert course(tmp_path)["distance"].tolist() == pytest.approx([0.1, 0.2, 0.4, 0.4])
    figure = pairs_figure(bank, tmp_path, "A bank")
    assert figure is not None
    assert len(figure.axes) == 3
    assert "CUHK02 - CUHK03: 0." in figure.get_suptitle()


def test_the_headline_says_what_how_sure_and_at_what_cost(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", confirm_seeds=(1, 2)))
    text = " ".join(headline(study))
    assert "LDA, best of 3 (trial 1): 36.5 [36.2, 36.8] mAP, +13.5 [+13.2, +13.8] above plain BN." in text
    assert "n = 2 fresh seeds each. Chosen by source_validation." in text
    assert "preset standin: 200 steps a run" in text
    assert headline(load_study(write_study(tmp_path / "none", scores=()))) == []


def test_what_went_wrong_is_listed(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1,))
    (folder / "trial-0002" / "cuhk03-s0" / "result.json").write_text("{")
    rows = failures(load_study(folder))
    assert rows["trial"].tolist() == ["trial-0002/cuhk03-s0"]
    assert "result.json damaged" in rows["what"].iloc[0]


def test_an_anonymous_page_names_nobody(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "secret-person" / "study", confirm_seeds=(1,))
    (folder / "trial-0002" / "cuhk03-s0" / "result.json").write_text("{")
    study = load_study(folder)
    assert "secret-person" in page(study, {}, date(2026, 1, 2))
    text = page(study, {}, date(2026, 1, 2), anonymous=True)
    for word in ("secret-person", str(tmp_path), study.record.command, "0123abc"):
        assert word not in text
    assert unnamed("trial-3 on gpu-7.lab: /home/me/runs/a: bad") == "trial-3 on a machine: .../a: bad"
    assert unnamed("mAP / Rank-1, 1/2") == "mAP / Rank-1, 1/2"


@pytest.mark.slow
def test_several_studies_have_a_page_that_leads_to_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, output = tmp_path / "runs", tmp_path / "out"
    write_study(runs / "one", scores=(0.5,))
    write_study(runs / "two", scores=())
    write_json(runs / "three" / "study.json", {"format": 2})
    assert report.main([str(runs), "--output", str(output)]) == 0
    text = (output / "index.html").read_text()
    for name in ("one", "two"):
        assert f'href="{name}/index.html"' in text
        assert (output / name / "index.html").exists()
    assert "three" in text
    assert "left out" in capsys.readouterr().err
    assert report.main([str(tmp_path), "--output", str(output)]) == 2  # no study below it


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
@pytest.mark.parametrize(("width", "dark"), [(375, False), (1440, True)])
def test_nothing_overflows_and_no_request_leaves(tmp_path: Path, width: int, dark: bool) -> None:
    """In a frame of this width (a window cannot be so narrow), in either theme."""
    study = load_study(write_study(tmp_path / "study", confirm_seeds=(1, 2)))
    inner = tmp_path / "inner.html"
    inner.write_text(page(study, {}, date(2026, 1, 2)))
    probe = """<script>onload = () => { const frame = document.querySelector("iframe"), page = frame.contentDocument;
      const style = frame.contentWindow.getComputedStyle(page.body);
      const requests = frame.contentWindow.performance.getEntriesByType("resource").length;
      document.title = [page.documentElement.scrollWidth, requests, style.backgroundColor].join("|"); }</script>"""
    outer = tmp_path / "outer.html"
    outer.write_text(f'<iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe>{probe}')
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", *scheme]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [*command, profile, "--dump-dom", outer.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    scroll, requests, background = found[1].split("|")
    assert int(scroll) <= width
    assert requests == "0"
    assert background == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")
