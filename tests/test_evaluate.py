"""`python -m lda.evaluate`: agrees with the run, takes test settings only, says stand-in from every entrance;
several checkpoints on several targets are the same numbers side by side."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.matrix import main as draw
from lda import evaluate, matrix
from lda.checkpoint import read_checkpoint
from lda.config import preset
from lda.runs import Result
from lda.unit import run_unit


@pytest.fixture(scope="module")
def finished(standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished units by name: LDA, and LDA without Network-A."""
    settings: dict[str, Any] = {"epochs": 1, "steps_per_epoch": 4, "warmup_epochs": 0, "bank_warmup_updates": 0}
    settings |= {"milestones": (), "threads": 1, "wandb": "disabled"}
    made = {}
    for name, own in {"both": {}, "expert": {"network_a": "none", "inference": "expert"}}.items():
        made[name] = tmp_path_factory.mktemp(name)
        run_unit(preset("standin", **settings, **own), made[name], data_root=standin_tiny)
    return made


def run(folder: Path, *more: str) -> int:
    return evaluate.main(["--checkpoint", str(folder / "checkpoint.pt"), *more])


def test_agrees_with_the_run(finished: dict[str, Path], standin_tiny: Path, capsys: Any) -> None:
    where = ["--data-root", str(standin_tiny), "--target", "market1501"]
    assert run(finished["both"], *where) == 0
    result = Result.read(finished["both"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["mAP"] == pytest.approx(result.mAP, abs=1e-6)
    assert (shown["data"], shown["inference"], shown["target_data"]) == ("stand-in", "fused", False)
    assert run(finished["both"], *where, "--set", "inference=expert") == 0
    assert json.loads(capsys.readouterr().out)["inference"] == "expert"


def test_a_sets_own_folder_says_stand_in_as_well(finished: dict[str, Path], standin_tiny: Path, capsys: Any) -> None:
    """W1: the loader says what it read, whatever the root."""
    own = next(path for path in standin_tiny.iterdir() if path.name.startswith("Market-1501"))
    seen = []
    for root in (standin_tiny, own):
        assert run(finished["both"], "--data-root", str(root), "--target", "market1501") == 0
        seen.append(json.loads(capsys.readouterr().out))
    assert seen[0] == seen[1]
    assert seen[0]["data"] == "stand-in"


@pytest.mark.parametrize(
    ("which", "settings", "message"),
    [
        ("both", ["method=baseline"], "--set method: is a setting of training, which is over"),
        ("both", ["backbone=resnet50"], "--set backbone: is a setting of training"),
        (
            "both",
            ["bank_momentum=0.1"],
            "a test of lda can be told: camera_statistics, camera_images, inference, test_donors, unseen_expert, f",
        ),
        ("both", ["network_a=none"], "--set network_a: is a setting of training"),
        ("both", ["baseline_norm=batch"], "baseline_norm: is a setting of method baseline; this run's method is lda"),
        ("expert", ["inference=fused"], "inference: 'fused' needs Network-A, but network_a is none"),
        ("both", ["inference=fusd"], "did you mean 'fused'"),
        ("both", ["x=1"], "unknown setting 'x'"),
    ],
)
def test_what_is_no_test_setting_is_refused(
    which: str, settings: list[str], message: str, finished: dict[str, Path], standin_tiny: Path, capsys: Any
) -> None:
    """W2 and W3: nothing of training can be changed, and the method is asked what it can do."""
    where = ["--data-root", str(standin_tiny), "--target", "market1501"]
    assert run(finished[which], *where, "--set", *settings) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_bad_target_and_checkpoint_are_one_line(
    finished: dict[str, Path], standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run(finished["both"], "--data-root", str(standin_tiny), "--target", "market") == 2
    assert "did you mean 'market1501'" in capsys.readouterr().err
    assert run(tmp_path, "--target", "market1501") == 2
    assert "there is no such file; a run writes it as" in capsys.readouterr().err


# --- several checkpoints, several targets ----------------------------------------------------------------------------
def run_all(folders: dict[str, Path], *more: str) -> int:
    return evaluate.main(["--checkpoint", *(str(folder / "checkpoint.pt") for folder in folders.values()), *more])


def test_a_matrix_is_the_single_numbers_side_by_side(
    finished: dict[str, Path], standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    """Equal to one on one, sources marked; a cell that is there is not tested again, one that is not is."""
    where = ["--data-root", str(standin_tiny), "--target", "cuhk03", "market1501"]
    command = [*where, "--output", str(tmp_path / "m")]
    assert run_all(finished, *command) == 0
    shown = capsys.readouterr()
    assert shown.err.count(" on CUHK03, a source of it: mAP ") == 2
    found = matrix.read(tmp_path / "m.json")
    assert [row.sources for row in found.rows] == [("msmt17", "cuhk_sysu", "cuhk03")] * 2
    for row, folder in zip(found.rows, finished.values(), strict=True):
        line = next(line for line in shown.out.splitlines() if line.startswith(row.label))
        for column in found.columns:
            cell = found.cell(row, column)
            assert cell is not None
            if column.target == "cuhk03":
                assert run(folder, *where[:3], column.target) == 0
                single = json.loads(capsys.readouterr().out)
                assert (cell.mAP, cell.rank1, cell.mINP) == (single["mAP"], single["rank1"], single["mINP"])
            else:
                assert cell.mAP == pytest.approx(Result.read(folder).mAP, abs=1e-6)
            assert cell.source == (column.target == "cuhk03")
            assert f"{100 * cell.mAP:.1f} / {100 * cell.rank1:.1f}{' *' * cell.source}" in line
    assert run_all(finished, *command) == 0
    again = capsys.readouterr()
    assert (again.out, "[" in again.err) == (shown.out, False)
    assert "4 of 4 cells are in" in again.err
    matrix.write(replace(found, cells=found.cells[1:3]), tmp_path / "m.json")  # what an interrupt leaves
    assert run_all(finished, *command) == 0
    last = capsys.readouterr()
    assert (last.out, last.err.count("] ")) == (shown.out, 2)
    assert draw([str(tmp_path / "m.json")]) == 0
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_holds_for_its_settings_only(
    finished: dict[str, Path], standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    """Also when one checkpoint alone is given an output; the cells of both commands stay."""
    command = ["--data-root", str(standin_tiny), "--target", "market1501", "--output", str(tmp_path / "m.json")]
    assert run(finished["both"], *command) == 0
    assert run(finished["both"], *command, "--set", "inference=expert") == 0
    assert capsys.readouterr().err.count("[1/1]") == 2
    found = matrix.read(tmp_path / "m.json")
    assert [cell.inference for cell in found.cells] == ["fused", "expert"]
    assert found.done() == 1


def test_what_is_missing_is_named_or_skipped(
    finished: dict[str, Path], standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    name = "Market-1501-v15.09.15"
    (tmp_path / name).symlink_to(standin_tiny / name)
    where = ["--data-root", str(tmp_path), "--target", "all"]
    assert run(finished["both"], *where) == 2
    everything = "MSMT17, CUHK03, PRID2011, GRID, VIPeR, i-LIDS"
    assert capsys.readouterr().err == f"error: not below {tmp_path}: {everything}; --skip-missing goes on without\n"
    assert run(finished["both"], *where, "--skip-missing") == 0
    shown = capsys.readouterr()
    assert f"not below the data root, left out: {everything}\n" in shown.out
    assert "[1/1] " in shown.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "inference=fused"], "{expert}/checkpoint.pt: inference: 'fused' needs Network-A"),
        (["--set", "epochs=1"], "{both}/checkpoint.pt: --set epochs: is a setting of training"),
        (["--split", "1"], "{both}/checkpoint.pt: test_split: market1501 has 1 split(s)"),
        (["{damaged}"], "checkpoint '{damaged}' cannot be read"),
        (["{trapezoid}"], "average_precision: {both}/checkpoint.pt says step, {trapezoid} trapezoid; numbers side by"),
        (["{both}/checkpoint.pt"], "--checkpoint {both}/checkpoint.pt: is given twice"),
        (["--target", "market1501", "all"], "--target all: means every target there is; leave the other names out"),
        (["--target", "cuhk_sysu", "market1501"], "CUHK-SYSU has no query and gallery"),
        (["--output", "{damaged}"], "{damaged}.json: expected a JSON file"),
    ],
)  # fmt: skip
def test_a_matrix_is_refused_before_anything_runs(
    more: list[str], message: str, finished: dict[str, Path], standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    places = {name: str(folder) for name, folder in finished.items()}
    for name in ("damaged", "trapezoid"):
        places[name] = str(tmp_path / name / "checkpoint.pt")
        (tmp_path / name).mkdir()
    Path(places["damaged"]).write_bytes((finished["both"] / "checkpoint.pt").read_bytes()[:10_000])
    if "{trapezoid}" in more:
        saved = read_checkpoint(finished["both"] / "checkpoint.pt")
        replace(saved, config=saved.config.replace(average_precision="trapezoid")).save(Path(places["trapezoid"]))
    (tmp_path / "damaged/checkpoint.pt.json").write_text("{")
    given = [word.format(**places) for word in more]
    checkpoints = [*(f"{folder}/checkpoint.pt" for folder in finished.values()), *given[: not given[0].startswith("-")]]
    options = ["--data-root", str(standin_tiny), "--target", "market1501", "msmt17", *given[len(checkpoints) - 2 :]]
    assert evaluate.main(["--checkpoint", *checkpoints, *options]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_an_interrupted_matrix_goes_on(finished: dict[str, Path], standin_tiny: Path, tmp_path: Path) -> None:
    """A real process, on every target there is."""
    command = [
        sys.executable,
        "-m",
        "lda.evaluate",
        "--checkpoint",
        *(str(f / "checkpoint.pt") for f in finished.values()),
    ]
    command += ["--target", "all", "--data-root", str(standin_tiny), "--output", str(tmp_path / "m")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "m.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    kept = matrix.read(tmp_path / "m.json").done()
    assert process.returncode == 130
    assert f"interrupted; {kept} of 14 cells are in {tmp_path}/m.json" in error
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == f"{kept} of 14 cells are in {tmp_path}/m.json"
    assert done.stderr.count("] ") == 14 - kept
    assert len((tmp_path / "m.csv").read_text().splitlines()) == 15
