"""A study with a damaged file is shown without it and says so; words of people break no format."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
from pathlib import Path

import pytest
from study_files import write_json, write_study

from analysis import buffer_bank, report, tables
from analysis.comparison import protocol_table
from analysis.study import load_study
from analysis.tables import conditions, render
from analysis.text_tables import Grid, as_csv, as_latex, as_markdown


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("whole") / "protocol3", scores=(0.5, 0.55), confirm_seeds=(1,))


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "protocol3"))


def torn(content: bytes, draw: random.Random) -> bytes:
    """A file after a full disk or a power cut."""
    at = draw.randrange(len(content))
    length = draw.randrange(1, 200)
    return draw.choice(
        [b"", content[:at], content[:at] + b"\0" * length + content[at + length :], b"\0" * len(content)]
    )


FILES = ["trial.json", "*/config.json", "*/result.json", "*/metrics.jsonl", "*/env.json", "*/buffer_bank.npz"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_a_torn_file_is_named_and_everything_else_is_shown(
    study: Path, name: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(f"{name} {seed}")
    path = draw.choice(sorted(study.glob(f"trial-*/{name}")))
    if path.suffix == ".npz":
        path = study / "trial-0001" / "cuhk03-s0" / path.name  # the one that is drawn
    before = path.read_bytes()
    path.write_bytes(torn(before, draw))
    # A trial left out may be all that a table needs; then it says so and fails.
    for command in (tables, buffer_bank):
        arguments = [str(study)] if command is tables else [str(study), "--output", str(study / "figures")]
        code = command.main(arguments)
        shown = capsys.readouterr()
        assert code in (0, 1), shown.err
        assert "Traceback" not in shown.err
        # The first command tells of the study's files, once a process; the second of the bank.
        read = path.suffix == (".json" if command is tables else ".npz")
        unharmed = path.read_bytes() == before
        assert unharmed or not read or path.name in shown.err


def test_a_report_of_a_damaged_study_says_what_is_left_out(study: Path, tmp_path: Path) -> None:
    (study / "trial-0001" / "cuhk03-s1" / "result.json").write_bytes(b"")
    (study / "trial-0000" / "market1501-s1" / "metrics.jsonl").write_bytes(b"\0" * 99)
    assert report.main([str(study), "--output", str(tmp_path / "page")]) == 0
    (page,) = (tmp_path / "page").rglob("*.html")
    text = page.read_text(encoding="utf-8")
    assert "trial-0001/cuhk03-s1 (result.json damaged)" in text
    assert "trial-0000/market1501-s1 (metrics.jsonl" in text
    assert '<p class="banner">Left out of all that follows: trial-0001/cuhk03-s1 (result.json damaged)</p>' in text
    caption = next(line for line in text.splitlines() if line.startswith('<figure id="figure-history"'))
    assert "Left out: trial-0001/cuhk03-s1 (result.json damaged), trial-0000/market1501-s1 (metrics.jsonl" in caption


@pytest.mark.slow
def test_a_report_of_which_nothing_is_left_fails(study: Path, tmp_path: Path) -> None:
    for path in study.glob("trial-*/*/result.json"):
        path.write_bytes(b"")
    assert report.main([str(study), "--output", str(tmp_path / "page")]) == 1
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert '<p class="banner">Left out of all that follows: ' in text


def test_a_table_without_all_confirmations_says_so(study: Path) -> None:
    for target in ("cuhk03", "market1501", "msmt17"):
        shutil.rmtree(study / "trial-baseline" / f"{target}-s1")
    text = render(study)
    assert "confirmation runs are here" in text
    assert "trial-baseline (none of its runs is here)" in text
    assert "the confirmation is incomplete" in text


def test_units_of_several_codes_are_told(study: Path) -> None:
    found = load_study(study)
    assert "code" not in dict(conditions(found, protocol_table(found)))
    path = study / "trial-0001" / "cuhk03-s1" / "env.json"
    env = json.loads(path.read_text())
    write_json(path, {**env, "commit": "fedcba9876", "dirty": True, "code": "c0dec0dec0de"})
    assert "units from commits 0123abc, fedcba9 + local changes (code c0dec0d): not of one code" in render(study)
    path.unlink()
    assert "units from commits 0123abc, unknown: not of one code" in render(study)


def test_commits_that_share_all_sources_are_one_code(study: Path) -> None:
    for number, path in enumerate(sorted(study.glob("trial-*/*/env.json"))):
        env = json.loads(path.read_text())
        write_json(path, {**env, "commit": f"{number:07}", "code": "c0dec0dec0de"})
    assert "units from commits" not in render(study)


# --- words of people -------------------------------------------------------------------------------------------------

NASTY = "50% of $x_1$ & {more} #1 ~^\\ <b>|</b>\nnext = line"


def test_nasty_words_stay_words_in_latex_and_markdown() -> None:
    grid = Grid(NASTY, [("", "mAP")], [["[a", "*1"], [NASTY, "2.0"]], [])
    latex = as_latex(NASTY, [("data", NASTY)], [grid])
    escaped = r"50\% of \$x\_1\$ \& \{more\} \#1 \textasciitilde{}\textasciicircum{}\textbackslash{} "
    assert escaped in latex
    assert "next = line" in latex
    assert "{}[a" in latex
    assert r"\|" in as_markdown(NASTY, [("data", NASTY)], [grid])
    assert "\\<b>" in as_markdown(NASTY, [("data", NASTY)], [grid])


def test_no_cell_of_a_csv_is_a_formula(study: Path) -> None:
    content = json.loads((study / "study.json").read_text())
    write_json(study / "study.json", {**content, "title": "=HYPERLINK(1)"})
    rows = list(csv.DictReader(io.StringIO(render(study, "csv"))))
    assert rows
    import pandas as pd

    text = as_csv(pd.DataFrame({"word": ["=1+1", "@x", 'say "a, b"', "-2"], "number": [-1.5, 2.0, 3.0, -4.0]}), "%.1f")
    found = list(csv.reader(io.StringIO(text)))
    assert [row[0] for row in found[1:]] == ["'=1+1", "'@x", 'say "a, b"', "'-2"]
    assert [row[1] for row in found[1:]] == ["-1.5", "2.0", "3.0", "-4.0"]
