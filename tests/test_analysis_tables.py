"""analysis.comparison, text_tables and tables: numbers against slow loops, words against what must be said."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from study_files import write_study, write_trial, write_unit

from analysis import buffer_bank, comparison, report, tables
from analysis.comparison import bootstrap_interval, protocol_table
from analysis.published import POSTER, PUBLISHED, newer_table, published_table
from analysis.tables import render
from analysis.text_tables import Grid, as_latex, as_markdown, as_text
from lda.data.catalogue import names
from lda.errors import UsageError
from lda.protocols import PROTOCOLS
from lda.runs import Cost

ROOT = Path(__file__).parent.parent
TARGETS = ("cuhk03", "msmt17", "market1501")


def vary(folder: Path, trial: str, values: dict[tuple[str, int], float], method: str = "lda") -> None:
    """Rewrite units with given mAPs."""
    for (target, seed), mean_ap in values.items():
        write_unit(folder / trial / f"{target}-s{seed}", target, seed=seed, method=method, mAP=mean_ap)


def test_search_seed_only(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    table = protocol_table(folder)
    assert table["configuration"].drop_duplicates().tolist() == ["default", "best"]
    assert table["label"].drop_duplicates().tolist() == ["LDA, defaults (trial 0)", "LDA, best of 3 (trial 1)"]
    assert table["target"].tolist() == [*TARGETS, "average"] * 2
    assert table["mAP"].tolist() == pytest.approx([30.0] * 4 + [35.0] * 4)
    assert table["rank1"].tolist() == pytest.approx([40.0] * 4 + [45.0] * 4)
    assert table["mAP_std"].isna().all()
    assert table["mAP_gain"].isna().all()
    assert not table["confirmed"].any()
    assert set(table["data"]) == {"stand-in"}


def test_confirmed_means_spreads_and_gains_against_a_loop(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1, 2, 3))
    rng = np.random.default_rng(0)
    own = {(target, seed): float(rng.uniform(0.3, 0.5)) for target in TARGETS for seed in (1, 2, 3)}
    base = {(target, seed): float(rng.uniform(0.1, 0.4)) for target in TARGETS for seed in (1, 2, 3)}
    vary(folder, "trial-0001", own)
    vary(folder, "trial-baseline", base, method="baseline")
    table = protocol_table(folder)
    assert table["configuration"].drop_duplicates().tolist() == ["baseline", "default", "best"]
    assert table["confirmed"].all()
    best = table[table["configuration"] == "best"].set_index("target")
    for target in TARGETS:
        runs = [100 * own[target, seed] for seed in (1, 2, 3)]
        gains = [100 * (own[target, seed] - base[target, seed]) for seed in (1, 2, 3)]
        assert best.loc[target, "mAP"] == pytest.approx(statistics.mean(runs))
        assert best.loc[target, "mAP_std"] == pytest.approx(statistics.stdev(runs))
        assert best.loc[target, "mAP_gain"] == pytest.approx(statistics.mean(gains))
        low, high = best.loc[target, ["mAP_gain_low", "mAP_gain_high"]]
        assert min(gains) - 1e-9 <= low < high <= max(gains) + 1e-9
    averages = [statistics.mean(100 * own[target, seed] for target in TARGETS) for seed in (1, 2, 3)]
    assert best.loc["average", "mAP"] == pytest.approx(statistics.mean(averages))
    assert best.loc["average", "mAP_std"] == pytest.approx(statistics.stdev(averages))
    assert best.loc["average", "seeds"] == 3
    assert table[table["configuration"] == "baseline"]["mAP_gain"].isna().all()


def test_bootstrap_against_a_loop() -> None:
    pairs = np.random.default_rng(1).normal(1.0, 2.0, (3, 5))
    draw = np.random.default_rng(2)
    means = []
    for _ in range(4000):
        resampled = [statistics.mean(row[draw.integers(5)] for _ in range(5)) for row in pairs.tolist()]
        means.append(statistics.mean(resampled))
    low, high = bootstrap_interval(pairs)
    assert [low, high] == pytest.approx(list(np.percentile(means, [2.5, 97.5])), abs=0.1)
    assert (low, high) == bootstrap_interval(pairs)  # seeded
    assert np.isnan(bootstrap_interval(pairs[:, :1])).all()
    assert bootstrap_interval(np.full((2, 3), 1.5)) == (1.5, 1.5)


def test_a_confirmation_cut_short_counts_on_its_complete_seeds(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1, 2))
    (folder / "trial-0001" / "market1501-s2" / "result.json").unlink()
    table = protocol_table(folder)
    assert set(table["seeds"]) == {1}
    assert table["confirmed"].all()
    (folder / "trial-0001" / "msmt17-s1" / "result.json").unlink()
    table = protocol_table(folder)
    assert table["configuration"].drop_duplicates().tolist() == ["default", "best"]
    assert not table["confirmed"].any()


def test_further_confirmed_trials_have_rows(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1,))
    units = [f"{target}-s{seed}" for target in TARGETS for seed in (0, 1)]
    for target in TARGETS:
        write_unit(folder / "trial-0002" / f"{target}-s1", target, seed=1, mAP=0.9)
    write_trial(folder / "trial-0002", 2, 0.52, units)
    table = protocol_table(folder)
    assert table["label"].drop_duplicates().tolist()[-1] == "LDA, trial 2"
    assert table["mAP"].iloc[-1] == pytest.approx(90.0)


def test_nothing_finished_yet(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", scores=(0.5,))
    (folder / "trial-0000" / "msmt17-s0" / "result.json").unlink()
    write_trial(folder / "trial-0000", 0, None, [], state="running")
    with pytest.raises(UsageError, match=r"no trial has finished every target yet \(trials: 1 running\)"):
        render(folder)
    with pytest.raises(UsageError, match="none started"):
        render(write_study(tmp_path / "empty", scores=()))


@pytest.mark.parametrize("format", ["text", "markdown", "latex"])
def test_every_table_says_what_it_shows(tmp_path: Path, format: str) -> None:
    text = render(write_study(tmp_path / "study", confirm_seeds=(1, 2)), format).replace("\\_", "_")
    for words in ("STAND-IN", "source_validation", "2 per target (fresh", "fused", "labeled", "CUHK03", "MSMT17"):
        assert words in text
    for words in ("Market-1501", "Average", "Rank-1", "baseline, plain BN", "LDA, best of 3 (trial 1)", "Points above"):
        assert words in text
    assert "Published" not in text


def test_protocol_1_shows_the_spread_over_its_splits(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "one", protocol="protocol1")
    lines = render(folder).splitlines()
    assert any(line.split() == ["test", "splits", "10", "per", "target"] for line in lines)
    assert "Mean ± standard deviation over the 10 test splits of a target" in lines
    (row,) = [line for line in lines if line.startswith("LDA, defaults (trial 0)  ")]
    assert row.split()[4:] == [*["30.0±3.0", "40.0±6.0"] * 4, "30.0", "40.0"]
    assert not any("over seeds" in line for line in lines)

    two = render(write_study(tmp_path / "two", protocol="protocol1", confirm_seeds=(1, 2)))
    assert two.index("over the 10 test splits") < two.index("Mean ± standard deviation over seeds")
    table = protocol_table(tmp_path / "two").query("configuration == 'baseline'").set_index("target")
    assert table.loc["grid", "mAP_split_std"] == pytest.approx(statistics.mean([2.2, 2.4]))
    assert table.loc["grid", "mAP_std"] == pytest.approx(statistics.stdev([22, 24]))
    assert np.isnan(table.loc["average", "mAP_split_std"])


def test_a_single_split_is_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", protocol="protocol1")
    for path in folder.glob("trial-*/*/result.json"):
        result = json.loads(path.read_text())
        result |= {"num_splits": 1, "mAP_std": None, "rank1_std": None}
        path.write_text(json.dumps(result))
    text = render(folder)
    assert "1 per target, of the protocol's 10" in text
    assert "±" not in text


def test_an_interval_from_few_seeds_says_so(tmp_path: Path) -> None:
    for seeds, said in ((1, False), (2, True), (5, False)):
        folder = write_study(tmp_path / str(seeds), confirm_seeds=range(1, seeds + 1))
        assert (f"An interval from {seeds} seeds is hardly more than their range" in render(folder)) == said


def test_oracle_and_real_data_are_named(tmp_path: Path) -> None:
    text = render(write_study(tmp_path / "study", selection="oracle", data="real"))
    assert "ORACLE" in text
    assert "real data sets" in text
    assert "STAND-IN" not in text


def test_the_conditions_and_labels_of_a_study_of_lda(tmp_path: Path) -> None:
    lines = render(write_study(tmp_path / "study", confirm_seeds=(1,))).splitlines()
    assert lines[:10] == [
        "Protocol-3, study study",
        "  data           STAND-IN (drawn pedestrians, no real data set: not comparable with published numbers)",
        "  selection      source_validation (held-out source identities; the target is never looked at)",
        "  seeds          1 per target (fresh, never used by the search)",
        "  inference      fused, no flip test",
        "  CUHK03 images  labeled boxes, new protocol",
        "  numbers        percent",
        "  budget         preset standin: 200 steps a run, 200 to 400 training passes",
        "  mAP            average precision by step",
        "",
    ]
    assert [line.split("  ")[0] for line in lines[13:16]] == [
        "baseline, plain BN",
        "LDA, defaults (trial 0)",
        "LDA, best of 3 (trial 1)",
    ]
    assert "  Equal steps, not equal compute: training passes per image 2 (LDA), 1 (plain BN)" in lines


@pytest.mark.parametrize(
    ("ways", "line"),
    [
        (("none", "none", "none"), "fused, no flip test"),
        (("again (20, 6, 0.3)",) * 3, "fused, no flip test, again (20, 6, 0.3)"),
        (("none", "again (20, 6, 0.3)", "none"), "fused, no flip test, again (20, 6, 0.3), no re-ranking"),
    ],
)
def test_re_ranking_is_named_and_so_is_its_absence_beside_it(tmp_path: Path, ways: Sequence[str], line: str) -> None:
    folder = write_study(tmp_path / "study")
    for target, way in zip(TARGETS, ways, strict=True):
        for trial in ("trial-0000", "trial-0001", "trial-baseline"):
            write_unit(folder / trial / f"{target}-s0", target, reranking=way)
    assert f"  inference      {line}\n" in render(folder)


def test_another_method_appears_under_its_own_name(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1,), method="meta", cost=Cost(1.0, 4.0, "vector"))
    text = render(folder)
    for label in ("baseline, plain BN", "META, defaults (trial 0)", "META, best of 3 (trial 1)"):
        assert f"\n{label}  " in text
    assert "LDA" not in text
    assert text.count("plain BN") == 2  # its row, its selection score
    assert "Equal steps" not in text
    assert "  inference      no flip test\n" in text


def test_a_method_compared_with_itself_is_told_apart_by_its_rows(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    for target in TARGETS:
        write_unit(folder / "trial-0001" / f"{target}-s0", target, cost=Cost(1.0, 1.0, "vector"))
    note = "training passes per image 2 (LDA, defaults (trial 0)), 1 (LDA, best of 3 (trial 1))"
    assert note in " ".join(render(folder).split())


@pytest.mark.parametrize("format", ["text", "markdown", "latex", "csv"])
def test_who_looked_at_the_target_is_marked(tmp_path: Path, format: str) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1,), method="mda", target_data=True)
    text = " ".join(render(folder, format).replace("\\_", "_").split())
    assert "MDA [target images], defaults (trial 0)" in text
    if format == "csv":
        rows = pd.read_csv(io.StringIO(render(folder, format)))
        assert rows.groupby("configuration")["target_data"].unique().explode().to_dict() == {
            "baseline": False,
            "best": True,
            "default": True,
        }
        return
    assert "target images" in text
    assert "MDA [target images] LOOKED AT unlabelled images of the target, the other rows did not" in text
    alone = render(write_study(tmp_path / "alone", method="mda", target_data=True), format)
    assert "every method LOOKED AT unlabelled images of the target" in alone


def test_a_reconstruction_says_what_it_is(tmp_path: Path) -> None:
    text = render(write_study(tmp_path / "study", method="ramoe", reconstructed="the router"), "markdown")
    assert "| RAMOE [reconstruction], defaults (trial 0) |" in text
    assert text.count("- RAMOE [reconstruction], our reading of what is not published: the router\n") == 1


def test_text_is_aligned_and_fits_a_terminal(tmp_path: Path) -> None:
    lines = render(write_study(tmp_path / "study", confirm_seeds=(1, 2))).splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("CUHK03  "))
    names, heads, rule, *rows = lines[start : start + 6]
    assert len({len(line) for line in (names, heads, rule, *rows)}) == 1
    for name in ("CUHK03", "MSMT17", "Market-1501", "Average"):
        end = names.index(name) + len(name)
        assert heads[:end].endswith("Rank-1")
        assert all(row[end - 1].isdigit() for row in rows)
    assert max(map(len, lines)) <= 125


def test_grid_rendering_exactly() -> None:
    columns = [("A long name", "x"), ("A long name", "y"), ("B", "x"), ("B", "y")]
    grid = Grid("T", columns, [["r_1", "1", "2", "3", "4±1"]], ["50% of *"])
    assert as_text("Title", [("data", "d")], [grid]).splitlines() == [
        "Title",
        "  data  d",
        "",
        "T",
        "      A long name        B",
        "      x         y   x    y",
        "--------------------------",
        "r_1   1         2   3  4±1",
        "  50% of *",
    ]
    assert as_markdown("Title", [("data", "d")], [grid]).splitlines()[5:10] == [
        "",
        "|  | A long name x | A long name y | B x | B y |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| r\\_1 | 1 | 2 | 3 | 4±1 |",
        "",
    ]
    assert as_latex("Title", [("data", "d")], [grid]).splitlines() == [
        "% Title: T",
        "\\noindent T\\par\\smallskip",
        "\\noindent\\begin{tabular}{lrrrr}",
        "\\toprule",
        " & \\multicolumn{2}{c}{A long name} & \\multicolumn{2}{c}{B} \\\\",
        "\\cmidrule(lr){2-3} \\cmidrule(lr){4-5}",
        " & x & y & x & y \\\\",
        "\\midrule",
        "r\\_1 & 1 & 2 & 3 & 4$\\pm$1 \\\\",
        "\\bottomrule",
        "\\end{tabular}",
        "\\par\\smallskip\\noindent{\\footnotesize data: d. 50\\% of *.\\par}",
    ]


def test_csv_rows_carry_their_conditions(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1, 2))
    rows = pd.read_csv(io.StringIO(render(folder, "csv", published=True)))
    ours, poster = rows[rows["configuration"] != "published"], rows[rows["configuration"] == "published"]
    assert set(ours["data"]) == {"stand-in"}
    assert (poster["data"] == "real (printed on the poster)").sum() == 28
    assert (poster["data"].str.startswith("real (printed on ")).all()
    assert len(poster) == 28 + 4 * 4
    table = protocol_table(folder)
    assert ours["mAP"].tolist() == pytest.approx(table["mAP"].tolist(), abs=1e-3)
    assert ours["seeds"].tolist() == table["seeds"].tolist()


def test_published_rows_only_on_request_and_labelled(tmp_path: Path) -> None:
    text = render(write_study(tmp_path / "study"), published=True)
    assert "OTHER DATA than above, which is stand-in: do not compare" in text
    assert "LDA (poster)" in text
    assert "49.7    64.2" in text
    assert "Published since, not on the poster, real data sets; OTHER DATA" in text
    assert "ReNorm: second-hand: printed by a later method" in text
    real = render(write_study(tmp_path / "real", data="real"), published=True)
    assert "OTHER DATA" not in real
    in_domain = write_study(tmp_path / "in_domain", protocol="in_domain")
    with pytest.raises(UsageError, match="the poster has no table for in-domain"):
        render(in_domain, published=True)


def test_published_numbers_are_whole_and_their_averages_known() -> None:
    published = pd.read_csv(PUBLISHED)
    assert (published["source"] == POSTER).sum() == 101
    assert set(published["target"]) - {"average"} <= set(names())
    wrong = []
    for name in ("protocol1", "protocol2", "protocol3"):
        rows = published_table(name)
        targets = PROTOCOLS[name].targets
        for method, group in rows.groupby("method"):
            cells = group.set_index("target")[["mAP", "rank1"]].astype(float)
            assert set(cells.index) == {*targets, "average"}
            for metric in ("mAP", "rank1"):
                mean = cells.loc[list(targets), metric].mean(skipna=False)
                if abs(mean - cells.loc["average", metric]) > 0.0501:
                    wrong.append((name, method, metric))
    # The poster's own arithmetic: these printed averages do not follow from their cells, and the notes say so.
    assert wrong == [("protocol1", "LDA", "mAP"), ("protocol1", "LDA", "rank1"), ("protocol1", "RaMoE", "mAP")]
    averages = published_table("protocol1").query("target == 'average'").set_index("method")
    assert averages.loc[["LDA", "RaMoE"], "note"].str.contains("column mean").all()


def test_newer_rows_say_where_they_were_read_and_their_averages_follow() -> None:
    for name, targets in ((name, PROTOCOLS[name].targets) for name in ("protocol1", "protocol2", "protocol3")):
        rows = newer_table(name)
        assert set(rows["method"]) == {"BAU", "ReNorm", "CLIP-FGDI", "DSM-CLIP"}
        assert (rows["note"].str.contains("second-hand") | rows["note"].str.contains("its own repository")).all()
        for method, group in rows.groupby("method"):
            cells = group.set_index("target")[["mAP", "rank1"]].astype(float)
            assert "average" in cells.index
            if set(targets) <= set(cells.index):
                off = (cells.loc[list(targets)].mean() - cells.loc["average"]).abs()
                assert off.max() < 0.0501, (name, method)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "protocol3")
    script = run("analysis/tables.py", str(folder))
    assert (script.returncode, script.stdout, script.stderr) == (0, render(folder), "")
    output = tmp_path / "out" / "table.md"
    assert tables.main([str(folder), "--format", "markdown", "--output", str(output)]) == 0
    assert output.read_text() == render(folder, "markdown")
    bad = run("-m", "analysis.tables", str(tmp_path / "protocol4"))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [tables, report, buffer_bank])
def test_an_interrupted_command_says_so(command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    for module in (comparison, tables, report, buffer_bank):
        monkeypatch.setattr(module, "load_study", interrupted)
    assert command.main([str(write_study(tmp_path / "protocol3"))]) == 130


def test_the_command_on_a_disk_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "protocol3")
    (tmp_path / "file").write_text("")
    assert tables.main([str(folder), "--output", str(tmp_path / "file" / "table")]) == 2
    assert capsys.readouterr().err.startswith("error: --output: ")
    assert tables.main([str(folder), "--format", "word"]) == 2
