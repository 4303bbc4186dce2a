"""What happens after the last trial: a table, figures of what was kept, and a W&B run whatever failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from study_files import write_study
from test_tracking import records

from sweeps.finish import finish
from sweeps.plan.spec import StudySpec
from sweeps.plan.study_files import load, resolve, study_file
from sweeps.study_folder import StudyFolder

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StudySpec:
    """A study whose W&B run is logged offline."""
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    return resolve(load(study_file("protocol3")), study_file("protocol3"), overrides={"wandb": "offline"})


def ended(spec: StudySpec, folder: Path, capfd: Capture, complete: bool = True) -> tuple[str, str, str]:
    """(stdout, stderr, the W&B run as wandb's own viewer reads it)."""
    finish("s", spec, StudyFolder(folder), "stand-in", complete)
    printed = capfd.readouterr()
    return printed.out, printed.err, str(records(folder))


def test_table_and_figures_are_made_and_logged(spec: StudySpec, tmp_path: Path, capfd: Capture) -> None:
    folder = write_study(tmp_path / "s", scores=(0.5, 0.55))
    out, err, run = ended(spec, folder, capfd)
    assert err == ""
    assert out.startswith("Protocol-3, study s\n")
    assert (folder / "table.csv").read_text().startswith("configuration,")
    for text in ("protocol_table", "buffer_bank_distances", "stand-in"):
        assert text in run


@pytest.mark.slow
def test_a_study_of_baselines_has_nothing_to_draw(spec: StudySpec, tmp_path: Path, capfd: Capture) -> None:
    folder = write_study(tmp_path / "s", scores=(0.5, 0.55), method="baseline")
    out, err, run = ended(spec, folder, capfd)
    assert err == ""
    assert "Protocol-3, study s" in out
    assert not (folder / "figures").exists()
    assert "protocol_table" in run
    assert "buffer_bank" not in run.replace("buffer_bank_norm", "")


@pytest.mark.slow
def test_what_cannot_be_drawn_is_one_line_and_the_table_is_logged(
    spec: StudySpec, tmp_path: Path, capfd: Capture
) -> None:
    folder = write_study(tmp_path / "s", scores=(0.5, 0.55))
    for bank in folder.glob("*/*/buffer_bank.npz"):
        bank.write_bytes(b"no archive")
    _, err, run = ended(spec, folder, capfd)
    (line,) = err.splitlines()
    assert line.startswith("warning: analysis.buffer_bank failed: ")
    assert "protocol_table" in run
    assert "buffer_bank_distances" not in run


@pytest.mark.slow
def test_what_is_left_out_is_said_once(spec: StudySpec, tmp_path: Path, capfd: Capture) -> None:
    """Though the table and the figures both read it."""
    folder = write_study(tmp_path / "s", scores=(0.5, 0.55, 0.52))
    (folder / "trial-0002" / "trial.json").write_bytes(b"")
    _, err, _ = ended(spec, folder, capfd)
    (line,) = err.splitlines()
    assert "left out: trial-0002 (trial.json damaged)" in line


@pytest.mark.slow
def test_what_cannot_be_tabulated_is_drawn_and_logged(spec: StudySpec, tmp_path: Path, capfd: Capture) -> None:
    folder = write_study(tmp_path / "s", scores=(0.5, 0.55))
    (folder / "table.csv").mkdir()
    _, err, run = ended(spec, folder, capfd)
    (line,) = err.splitlines()
    assert line.startswith("warning: analysis.tables failed: ")
    assert "protocol_table" not in run
    assert "buffer_bank_distances" in run


def test_a_study_of_which_nothing_is_complete_is_logged_too(spec: StudySpec, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "s").mkdir()
    out, err, run = ended(spec, tmp_path / "s", capfd, complete=False)
    assert (out, err) == ("", "")
    assert "bank_momentum" in run


def test_it_imports_neither_analysis_nor_torch() -> None:
    program = (
        "import sys, sweeps.finish; "
        "heavy = {'analysis', 'pandas', 'torch', 'wandb'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
