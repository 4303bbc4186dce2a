"""`python -m lda.evaluate`: agrees with the run, takes test settings only, says stand-in from every entrance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lda import evaluate
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
