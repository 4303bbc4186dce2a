"""analysis.study_figures by tables and artists, and analysis.report as a page that stands alone."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from study_files import write_json, write_study, write_trial, write_unit

from analysis import report
from analysis.house_style import new_figure
from analysis.records import Axis
from analysis.report_figures import Picture, pictures
from analysis.report_page import page as report_page
from analysis.study import Study, load_study
from analysis.study_figures import (
    draw_history,
    draw_parameter,
    draw_training,
    history,
    parameter_figure,
    parameter_scores,
    parameters,
    training_curves,
    training_figure,
)
from analysis.tables import render

ROOT = Path(__file__).parent.parent
FIGURES = [
    "results", "cost", "cmc", "queries", "selection", "history", "parameters", "training", "features",
    "buffer_bank", "buffer_bank_distances", "buffer_bank_pairs",
]  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Five trials, the last two ended early; defaults, best and baseline confirmed on one fresh seed."""
    folder = write_study(tmp_path / "protocol3", scores=(0.50, 0.55, 0.52), confirm_seeds=(1,))
    write_trial(folder / "trial-0003", 3, None, [], state="pruned", reason="below the median")
    write_trial(folder / "trial-0004", 4, None, [], state="failed", reason="loss/id_e is nan <at step 3>")
    return load_study(folder)


def one_axes() -> Axes:
    axes = new_figure(1, 1, 4, 3)[1][0, 0]
    assert isinstance(axes, Axes)
    return axes


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]  # type: ignore[arg-type]


def test_history(study: Study) -> None:
    table = history(study)
    assert table["number"].tolist() == [0, 1, 2, 3, 4]
    assert table["score"].tolist()[:3] == pytest.approx([50.0, 55.0, 52.0])
    assert table["score"].isna().tolist() == [False] * 3 + [True] * 2
    assert table["best"].tolist() == pytest.approx([50.0, 55.0, 55.0, 55.0, 55.0])
    axes = one_axes()
    assert draw_history(axes, table) is axes
    assert points(axes, "defaults") == [(0, 50)]
    assert points(axes, "trial") == [(1, pytest.approx(55)), (2, 52)]
    assert points(axes, "pruned or failed") == [(3, 50), (4, 50)]
    assert axes.get_ylabel() == "selection score, %"


def test_parameters_with_the_scale_of_the_study(study: Study) -> None:
    assert parameters(study) == ["alignment_weight", "bank_momentum"]
    table = parameter_scores(study, "alignment_weight")
    assert table["number"].tolist() == [0, 1, 2]
    assert table["value"].iloc[0] == 0.1
    space = study.record.space
    axes = one_axes()
    assert draw_parameter(axes, table, "alignment_weight", space["alignment_weight"]) is axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < 0.01 < 5.0 < axes.get_xlim()[1]
    assert points(axes, "defaults") == [(0.1, 50)]
    assert len(points(axes, "trial")) == 2
    linear = draw_parameter(one_axes(), parameter_scores(study, "bank_momentum"), "m", space["bank_momentum"])
    assert linear.get_xscale() == "linear"


def test_choices_are_places_on_the_axis() -> None:
    values = [True, False, True]
    table = pd.DataFrame({"number": [0, 1, 2], "origin": ["default", "search", "search"], "value": values})
    table["score"] = [50.0, 51.0, 52.0]
    axes = draw_parameter(one_axes(), table, "flip_test", Axis(choices=(False, True)))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["False", "True"]
    assert points(axes, "trial") == [(0, 51), (1, 52)]
    unknown_axis = draw_parameter(one_axes(), table.assign(value=["w2", "kl", "w2"]), "distance", None)
    assert [tick.get_text() for tick in unknown_axis.get_xticklabels()] == ["kl", "w2"]


def test_nothing_swept_has_no_figure(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", scores=(0.5,))
    trial = json.loads((folder / "trial-0000" / "trial.json").read_text())
    write_json(folder / "trial-0000" / "trial.json", {**trial, "params": {}})
    assert parameter_figure(load_study(folder)) is None


def test_training_curves_of_every_unit(study: Study) -> None:
    curves = training_curves(study)
    units = curves.drop_duplicates(["trial", "target", "seed"])
    assert len(units) == len(study.units) == 3 * (2 + 2 + 1 + 1)
    roles = dict(zip(units["trial"], units["role"], strict=True))
    assert roles == {
        "trial-0000": "default",
        "trial-0001": "best",
        "trial-0002": "search",
        "trial-baseline": "baseline",
    }
    validation = curves[(curves["curve"] == "val/mAP") & (curves["trial"] == "trial-0001") & (curves["seed"] == 0)]
    assert validation["value"].tolist() == pytest.approx([27.5, 55.0] * 3)
    axes = one_axes()
    panel = curves[(curves["curve"] == "loss/total") & (curves["target"] == "msmt17")]
    assert draw_training(axes, panel) is axes
    assert len(axes.lines) == 4  # of defaults, best and baseline the mean over runs, in a band
    assert len(axes.collections) == 3
    labels = [str(line.get_label()) for line in axes.lines]
    assert sorted(label for label in labels if not label.startswith("_")) == [
        "baseline",
        "best of the search",
        "defaults",
        "other trials",
    ]
    front = max(axes.lines, key=lambda line: line.get_zorder())
    assert to_rgb(front.get_color()) == to_rgb("#0173b2")


def test_training_figure_names_targets_and_the_oracle(study: Study, tmp_path: Path) -> None:
    figure = training_figure(study)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes[:3]] == [
        "unseen target CUHK03",
        "unseen target MSMT17",
        "unseen target Market-1501",
    ]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["training loss", "mAP on held-out sources, %"]
    with (study.folder / "trial-0000" / "cuhk03-s0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "epoch": 10, "val/oracle": 0.4}\n')
    figure = training_figure(study)
    assert figure is not None
    assert figure.axes[6].get_ylabel() == "mAP on the TARGET, %"
    assert training_figure(load_study(write_study(tmp_path / "empty", scores=()))) is None


def flat(study: Study) -> list[Picture]:
    return [picture for section in pictures(study).values() for picture in section]


class Page(HTMLParser):
    """Collects what a page refers to, its pictures and its sortable tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.pictures: list[bytes] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "src" and value is not None and value.startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(value.partition(",")[2], validate=True))
            elif name in ("src", "href", "action"):
                self.references.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_stands_alone(study: Study) -> None:
    figures = flat(study)
    text = report_page(study, pictures(study), date(2026, 1, 2))
    page = Page(text)
    assert page.open == []
    anchors = [reference for reference in page.references if reference.startswith("#")]
    assert anchors == page.references
    assert [f'id="{anchor[1:]}"' for anchor in anchors if f'id="{anchor[1:]}"' not in text] == []
    assert "url(" not in text
    assert "@import" not in text
    assert [figure.name for figure in figures] == FIGURES
    for picture in page.pictures:
        height, width, _ = image.imread(io.BytesIO(picture)).shape
        assert min(height, width) > 300
    assert len(page.pictures) == len(figures)
    assert page.tags.count("table") == 6  # results, gains, costs, failures, trials, units
    assert page.tags.count("textarea") == 3


def test_the_page_says_what_it_shows(study: Study) -> None:
    text = report_page(study, {}, date(2026, 1, 2))
    for words in ("Protocol-3, study protocol3", "2026-01-02", "STAND-IN", "source_validation", "1 per target (fresh"):
        assert words in text
    for words in ("alignment_weight (0.01 to 5.0, log scale)", "commit", "0123abc", "torch 2.15.0", "below the median"):
        assert words in text
    assert "loss/id_e is nan &lt;at step 3&gt;" in text
    assert text.count('<p class="banner">') == 1
    assert "$" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)


def test_the_page_marks_what_a_method_is(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", method="mda", reconstructed="the latent mode", target_data=True)
    text = report_page(load_study(folder), {}, date(2026, 1, 2))
    assert "every method LOOKED AT unlabelled images of the target" in text
    assert "MDA [reconstruction, target images], our reading of what is not published: the latent mode" in text
    assert text.count("<td>MDA [reconstruction, target images]</td>") == 9  # units
    assert pictures(load_study(folder))["bank"] == []


def test_every_figure_says_stand_in(study: Study) -> None:
    for picture in flat(study):
        title = picture.figure.get_suptitle() or picture.figure.axes[0].get_title(loc="left")
        assert "stand-in data" in title, picture.name


def test_real_data_has_no_banner(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", data="real"))
    assert '<p class="banner">' not in report_page(study, {}, date(2026, 1, 2))


def test_a_study_under_way_has_a_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", scores=())
    write_unit(folder / "trial-0000" / "cuhk03-s0", "cuhk03", finished=False)
    write_trial(folder / "trial-0000", 0, None, ["cuhk03-s0"], state="running")
    path = report.write_report(load_study(folder), tmp_path / "out", date(2026, 1, 2))
    text = path.read_text()
    assert Page(text).open == []
    assert "no trial has finished every target yet (trials: 1 running)" in text
    assert "STAND-IN" in text
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "features.csv", "features.pdf", "features.png", "index.html", "training.csv", "training.pdf", "training.png",
    ]  # fmt: skip


def test_the_command_writes_a_folder(study: Study, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "analysis" / "report.py"), str(study.folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / done.stdout.strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-protocol3", path.parent.name)
    assert path.parent.parent == tmp_path / "reports"
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"index.html", "table.md", "table.csv", "table.tex"} | {
        f"{figure}.{kind}" for figure in FIGURES for kind in ("png", "pdf", "csv")
    }
    assert (path.parent / "table.md").read_text() == render(study, "markdown")


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_cells_sort_by_their_exact_value(study: Study) -> None:
    text = report_page(study, {}, date(2026, 1, 2))
    values = [float(value) for value in re.findall(r'data-value="([^"]+)"', text)]
    assert np.isfinite(values).all()
    momentum = study.trials["param/bank_momentum"].dropna()
    assert set(momentum) <= set(values)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
def test_pressing_a_head_sorts(study: Study, tmp_path: Path) -> None:
    press = """<script>
      const table = document.querySelector("table.sortable"), heads = [...table.tHead.rows[0].cells];
      const column = heads.findIndex(head => head.textContent === "selection score");
      const order = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent).join(" ");
      const seen = [0, 1].map(() => { heads[column].firstChild.click(); return order(); });
      document.title = seen.join(" | ");
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(report_page(study, {}, date(2026, 1, 2)).replace("</body>", press))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    title = re.search(r"<title>(.*)</title>", done.stdout)
    assert title is not None
    up, down = (order.split() for order in title[1].split(" | "))
    assert up == ["trial-0000", "trial-0002", "trial-0001", "trial-0003", "trial-0004", "trial-baseline"]
    assert down == ["trial-0001", "trial-0002", "trial-0000", "trial-0003", "trial-0004", "trial-baseline"]
