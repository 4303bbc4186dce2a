"""The poster's tables in its own shape: every number as printed, best and second, what is wrong with its averages."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_files import write_study, write_unit

from analysis import tables
from analysis.published import main, poster_grid, poster_protocols, published_table, render
from analysis.text_tables import Grid, Mark, as_html, as_latex, as_markdown, as_text, best_marks
from lda.protocols import PROTOCOLS, Protocol

PROTOCOL_NAMES = ("protocol1", "protocol2", "protocol3")
METRICS = {"mAP": "mAP", "rank1": "Rank-1"}


def test_places_against_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    for rows in (1, 2, 3, 7):
        values = rng.integers(10, 14, (rows, 6)) / 10 + rng.uniform(-0.04, 0.04, (rows, 6))
        values[rng.random((rows, 6)) < 0.3] = math.nan
        marks = best_marks(values.tolist())
        for column in range(6):
            own = [f"{value:.1f}" for value in values[:, column] if not math.isnan(value)]
            for row, value in enumerate(values[:, column]):
                better = {other for other in own if other > f"{value:.1f}"}
                place = 0 if math.isnan(value) or len(own) < 2 or len(better) > 1 else len(better) + 1
                assert marks.get((row, column), Mark()).place == place


def test_marks_in_every_language() -> None:
    marks = {(0, 0): Mark(1), (1, 0): Mark(2, footnote=1), (1, 1): Mark(footnote=0)}
    grid = Grid("", [("", "x"), ("", "y")], [["a", "2%", "-"], ["b", "1_0", "3"]], ["n"], marks, "of two", ["f", "g"])
    assert as_text("T", [("d", "e")], [grid]).splitlines()[3:] == [
        "          x      y",
        "------------------",
        "a        2%      -",
        "b   1_0 [b]  3 [a]",
        "  [a] f",
        "  [b] g",
        "  n",
    ]
    assert as_markdown("T", [("d", "e")], [grid]).splitlines()[6:] == [
        "| a | **2%** | - |",
        "| b | <ins>1\\_0</ins><sup>b</sup> | 3<sup>a</sup> |",
        "",
        "- <sup>a</sup> f",
        "- <sup>b</sup> g",
        "- Best of a column in bold, second underlined, of two",
        "- n",
    ]
    latex = as_latex("T", [("d", "e")], [grid])
    assert (
        "\na & \\textbf{2\\%} & - \\\\\nb & \\underline{1\\_0}\\textsuperscript{b} & 3\\textsuperscript{a} \\\\\n"
        in latex
    )
    assert "d: e. \\textsuperscript{a} f. \\textsuperscript{b} g. Best of a column in bold, second" in latex
    assert "<td><strong>2%</strong></td>" in as_html(grid)
    assert "<td><u>1_0</u><sup>b</sup></td>" in as_html(grid)


@pytest.mark.parametrize("name", PROTOCOL_NAMES)
def test_every_cell_is_the_printed_one(name: str) -> None:
    protocol = PROTOCOLS[name]
    grid, printed = poster_grid(protocol, "T"), published_table(name)
    heads = [f"{upper} {lower}".strip() for upper, lower in grid.columns]
    assert [row[0].split(" (")[0].rstrip("*") for row in grid.rows] == printed["method"].drop_duplicates().tolist()
    for label, *cells in grid.rows:
        group = printed[printed["method"] == label.split(" (")[0].rstrip("*")]
        assert label.endswith(f" ({group['venue'].iloc[0]})")
        assert ("*" in label) == (group["starred"] == "yes").all()
        for cell, head in zip(cells, heads, strict=True):
            if head == "trained on":
                duke = group["sources"].str.contains("dukemtmcreid").all()
                assert cell == ("M+D+C2+C3+CS" if duke else "M+C2+C3+CS")
                continue
            shown, metric = head.rsplit(" ", 1)
            target = next(t for t in [*protocol.targets, "average"] if tables.print_target(t) == shown)
            value = group.set_index("target").loc[target, {v: k for k, v in METRICS.items()}[metric]]
            assert cell.split(" (")[0] == ("–" if np.isnan(value) else f"{value:.1f}")  # noqa: RUF001 - the dash is meant


def test_wrong_averages_stand_beside_what_follows_from_their_rows() -> None:
    grids = {protocol.name: poster_grid(protocol, "T") for protocol in poster_protocols()}
    assert list(grids) == list(PROTOCOL_NAMES)
    found = {
        (name, grid.rows[row][0], grid.rows[row][column + 1]): grid.footnotes[mark.footnote]
        for name, grid in grids.items()
        for (row, column), mark in grid.marks.items()
        if mark.footnote is not None
    }
    assert {key: note.split(":")[0] for key, note in found.items()} == {
        ("protocol1", "RaMoE (CVPR'21)", "62.0 (69.1)"): "RaMoE",
        ("protocol1", "LDA (poster)", "74.7 (74.6)"): "LDA",
        ("protocol1", "LDA (poster)", "67.1 (66.9)"): "LDA",
    }
    assert all(re.search("column mean", note) for note in found.values())
    assert sum(len(grid.footnotes) for grid in grids.values()) == 2


@pytest.mark.parametrize("protocol", poster_protocols(), ids=lambda protocol: protocol.name)
def test_best_and_second_are_the_posters_whichever_average_counts(protocol: Protocol) -> None:
    grid = poster_grid(protocol, "T")
    for column, (upper, lower) in enumerate(grid.columns):
        if lower == "trained on":
            continue
        cells = [row[column + 1] for row in grid.rows]
        for pick in (0, -1):  # what is printed, what is in brackets
            numbers = {
                row: float(re.findall(r"[\d.]+", cell)[pick]) for row, cell in enumerate(cells) if cell[0].isdigit()
            }
            ordered = sorted(set(numbers.values()), reverse=True)
            places = {row: ordered.index(number) + 1 for row, number in numbers.items() if number in ordered[:2]}
            marked = {row: mark.place for (row, c), mark in grid.marks.items() if c == column and mark.place}
            assert marked == places, (upper, lower)


def test_csv_in_the_posters_shape() -> None:
    rows = pd.read_csv(io.StringIO(render(poster_protocols(), "csv")))
    assert rows.groupby("protocol").size().to_dict() == {"Protocol-1": 9, "Protocol-2": 7, "Protocol-3": 7}
    ramoe = rows[(rows["protocol"] == "Protocol-1") & (rows["method"] == "RaMoE")].iloc[0]
    assert (ramoe["Average mAP"], ramoe["Average mAP, recomputed"]) == (62.0, 69.075)
    assert "column mean 69.075" in ramoe["note"]
    assert np.isnan(ramoe["CUHK03 mAP"])
    third = rows[rows["protocol"] == "Protocol-3"]
    assert (third["Average mAP"] - third["Average mAP, recomputed"]).abs().max() < 0.0501
    assert set(third["sources"]) == {"leave-one-out"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--protocol", "protocol3", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "| LDA (poster) | <ins>48.4</ins> | <ins>49.4</ins> | **25.9** | **53.6** |" in text
    assert "Protocol-1" not in text
    assert main(["--output", str(tmp_path / "all.tex"), "--format", "latex"]) == 0
    assert (tmp_path / "all.tex").read_text() == render(poster_protocols(), "latex")
    capsys.readouterr()
    assert main(["--protocol", "protocol4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- the same in a study's tables ------------------------------------------------------------------------------------


def vary(folder: Path, mean: dict[str, float]) -> None:
    """Trial -> mAP of all its units."""
    for trial, value in mean.items():
        for target in ("cuhk03", "msmt17", "market1501"):
            write_unit(folder / trial / f"{target}-s1", target, seed=1, mAP=value)


def test_best_and_second_of_a_study(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1,))
    vary(folder, {"trial-0001": 0.5, "trial-0000": 0.45})
    markdown = tables.render(folder, "markdown")
    (best,) = [line for line in markdown.splitlines() if line.startswith("| LDA, best of 3 (trial 1) |")]
    (second,) = [line for line in markdown.splitlines() if line.startswith("| LDA, defaults (trial 0) |")]
    assert best.split(" | ")[1::2] == ["**50.0**"] * 4
    assert second.split(" | ")[1::2] == ["<ins>45.0</ins>"] * 4
    assert "\\textbf{50.0}" in tables.render(folder, "latex")
    for format in ("text", "csv"):
        assert not re.search(r"\*\*|<ins>|bold", tables.render(folder, format))
    gains = markdown.split("Points above the baseline")[1]
    assert "**" not in gains.replace("paired by seed**", "")


def test_a_row_alone_is_not_the_best(tmp_path: Path) -> None:
    text = tables.render(write_study(tmp_path / "study", scores=(0.5,)), "markdown")
    assert "bold" not in text


def test_who_looked_at_the_target_competes_with_its_like(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=(1,), method="mda", target_data=True)
    assert "<ins>" not in tables.render(folder, "markdown")  # the baseline alone did not look
    alone = tables.render(write_study(tmp_path / "alone", method="mda", target_data=True), "markdown")
    assert "Best of a column in bold, second underlined\n" in alone


def test_published_rows_have_tables_of_their_own(tmp_path: Path) -> None:
    text = tables.render(write_study(tmp_path / "study"), "markdown", published=True)
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    kinds = [{"trial" in row for row in table.splitlines()[2:] if "baseline" not in row} for table in found]
    assert kinds == [{True}, {False}, {False}]


# --- LaTeX -----------------------------------------------------------------------------------------------------------


def test_latex_compiles(tmp_path: Path) -> None:
    """With nothing but booktabs: the poster's tables, and a study's beside them."""
    program = shutil.which("tectonic") or shutil.which("pdflatex")
    if program is None:
        pytest.skip("neither tectonic nor pdflatex is here")
    study = tables.render(write_study(tmp_path / "study", confirm_seeds=(1, 2)), "latex", published=True)
    body = "\n\\clearpage\n".join([render(poster_protocols(), "latex"), study])
    document = f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{body}\\end{{document}}\n"
    (tmp_path / "tables.tex").write_text(document, encoding="utf-8")
    options = [] if program.endswith("tectonic") else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run(
        [program, *options, "tables.tex"], cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False
    )
    if "booktabs.sty' not found" in done.stdout:
        pytest.skip(f"{program} has no booktabs")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000
