"""Units on the real tiny stand-in: exact resume, shared trainings, failures, the files they leave."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glossary import unexplained

import lda
from lda import train
from lda.checkpoint import read_checkpoint
from lda.config import Config, preset
from lda.data.sources import build_task
from lda.errors import UsageError
from lda.runs import Result, Weights, is_whole, read_metrics, training_of
from lda.testing import Evaluator
from lda.trainer import TrainingError
from lda.unit import Progress, run_unit


def quick(**changes: Any) -> Config:
    """A run of seconds."""
    settings = {"epochs": 3, "steps_per_epoch": 4, "warmup_epochs": 1, "milestones": (2,)}
    if "method" not in changes:
        settings |= {"bank_warmup_updates": 1}
    settings |= {"evaluate_every": 1, "log_every": 1, "threads": 1, "wandb": "disabled", "protocol": "protocol3"}
    return preset("standin", **{**settings, **changes})


class StopError(RuntimeError):
    """Raised by a test in the middle of a run."""


def stop_at(step: int) -> Any:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise StopError

    return on_progress


@pytest.fixture(scope="module")
def finished(standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished unit."""
    folder = tmp_path_factory.mktemp("finished")
    run_unit(quick(), folder, data_root=standin_tiny)
    return folder


def state_of(folder: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    return {
        **checkpoint.method,
        **{f"optimizer/{k}/{n}": v for k, s in checkpoint.optimizer["state"].items() for n, v in s.items()},
    }


def assert_same(left: Path, right: Path) -> None:
    ours, theirs = state_of(left), state_of(right)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    rows = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(f / "metrics.jsonl")]
        for f in (left, right)
    ]
    assert rows[0] == rows[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (left, right)]
    for result in results:
        del result["seconds"], result["images_per_second"]
    assert results[0] == results[1]


def test_unit_leaves_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    kept = {"buffer_bank.npz", "queries.npz"}
    assert names == {"config.json", "env.json", "metrics.jsonl", "checkpoint.pt", "result.json"} | kept
    result = json.loads((finished / "result.json").read_text())
    with np.load(finished / "queries.npz", allow_pickle=False) as queries:
        assert np.nanmean(queries["average_precisions"]) == pytest.approx(result["mAP"])
        assert queries["cmc"][0, 0] == pytest.approx(result["rank1"])
    assert result["data"] == "stand-in"
    assert result["selection"]["rule"] == "source_validation"
    assert set(result["selection"]["per_source"]) == {"msmt17", "cuhk_sysu", "cuhk03"}
    assert result["selection"]["score"] == pytest.approx(np.mean(list(result["selection"]["per_source"].values())))
    assert 0.0 < result["mAP"] <= 1.0
    assert result["steps"] == 12
    assert 1.0 <= result["effective_rank"] <= 192
    assert (result["title"], result["inference"], result["target_data"]) == ("LDA", "fused", False)
    assert result["cost"] == {"train_passes": 2, "test_forwards": 4, "test": "vector", "pair_cost": None}
    assert set(result["content"]["sources"]) == {"msmt17", "cuhk_sysu", "cuhk03"}
    rows = read_metrics(finished / "metrics.jsonl")
    assert unexplained(name for row in rows for name in row) == []
    losses = [row for row in rows if "loss/total" in row]
    assert [row["step"] for row in losses] == list(range(1, 13))
    assert "loss/alignment" in losses[-1]
    assert [row["step"] for row in rows if "val/mAP" in row] == [4, 8, 12]


def test_a_result_says_what_its_network_began_with(finished: Path, standin_tiny: Path, tmp_path: Path) -> None:
    """The file's bytes and how much of the network they filled; a copy elsewhere is the same unit, other bytes not."""
    from torchvision.models import mobilenet_v2

    files = [tmp_path / "weights.pt", tmp_path / "elsewhere.pt"]
    torch.save(mobilenet_v2().state_dict(), files[0])
    shutil.copyfile(files[0], files[1])
    settings = {"method": "baseline", "epochs": 1, "milestones": (), "backbone": "mobilenet_v2", "evaluate_every": 0}
    configs = [quick(**settings, pretrained=str(file)) for file in files]
    result = run_unit(configs[0], tmp_path / "unit", data_root=standin_tiny)
    assert result == Result.read(tmp_path / "unit")
    assert result.weights == Weights(hashlib.sha256(files[0].read_bytes()).hexdigest(), 312, 312)
    assert run_unit(configs[1], tmp_path / "unit", data_root=standin_tiny, on_progress=stop_at(1)) == result
    torch.save(mobilenet_v2().state_dict(), files[1])
    with pytest.raises(UsageError, match="holds another run"):
        run_unit(configs[1], tmp_path / "unit", data_root=standin_tiny)
    assert Result.read(finished).weights is None


def test_bank_file_is_the_trained_bank(finished: Path) -> None:
    state = read_checkpoint(finished / "checkpoint.pt").method
    with np.load(finished / "buffer_bank.npz") as bank:
        assert bank["domains"].tolist() == ["msmt17", "cuhk_sysu", "cuhk03"]
        layers = bank["layers"].tolist()
        assert layers[0] == "bn1"
        assert layers[-1] == "output"
        np.testing.assert_array_equal(bank["var/layer2.0.bn1"], state["backbone.layer2.0.bn1.bank.var"].numpy())
        assert int(bank["count/bn1"].sum()) == 12


def test_finished_unit_is_returned_at_once(finished: Path, standin_tiny: Path) -> None:
    before = (finished / "result.json").stat().st_mtime_ns
    result = run_unit(quick(), finished, data_root=standin_tiny, on_progress=stop_at(1))
    assert result == Result.read(finished)
    assert (finished / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["buffer_bank", "queries"])
def test_what_was_kept_and_is_gone_is_made_again(
    name: str, finished: Path, standin_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    kept = folder / f"{name}.npz"
    before = kept.read_bytes()
    kept.unlink()
    result = Result.read(folder)
    assert result.kept == ("queries", "buffer_bank")
    assert not is_whole(folder, result.unit)
    assert run_unit(quick(), folder, data_root=standin_tiny, on_progress=stop_at(1)) == result
    assert is_whole(folder, result.unit)
    assert f"{kept}: missing; made again from the checkpoint" in capsys.readouterr().err
    with np.load(kept) as now, np.load(io.BytesIO(before)) as then:
        for key in then.files:
            np.testing.assert_array_equal(now[key], then[key])  # nan equals nan


@pytest.mark.parametrize("step", [4, 6, 12])
def test_interrupted_and_resumed_equals_uninterrupted(
    step: int, finished: Path, standin_tiny: Path, tmp_path: Path
) -> None:
    """Bit for bit: weights, banks, optimiser, metrics, result."""
    with pytest.raises(StopError):
        run_unit(quick(), tmp_path, data_root=standin_tiny, on_progress=stop_at(step))
    assert not (tmp_path / "result.json").exists()
    seen: list[int] = []
    run_unit(quick(), tmp_path, data_root=standin_tiny, on_progress=lambda p: seen.append(p.step))
    first = step // 4 * 4
    assert seen == [first] * (first < 12) + list(range(first + 1, 13))  # the checkpoint's validation is made again
    assert_same(tmp_path, finished)


def test_killed_and_continued_equals_uninterrupted(finished: Path, standin_tiny: Path, tmp_path: Path) -> None:
    """The same with SIGKILL on the real command."""
    settings = [
        f"{k}={v}"
        for k, v in quick().to_dict().items()
        if k
        in (
            "epochs",
            "steps_per_epoch",
            "warmup_epochs",
            "bank_warmup_updates",
            "evaluate_every",
            "log_every",
            "threads",
            "wandb",
        )
    ]
    command = [
        sys.executable,
        "-m",
        "lda.train",
        "--data-root",
        str(standin_tiny),
        "--preset",
        "standin",
        "--output",
        str(tmp_path),
        "--set",
        *settings,
        "milestones=2",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LDA on market1501 (stand-in, fused, step AP): mAP" in done.stdout
    assert_same(tmp_path, finished)


def test_number_of_loader_workers_changes_nothing(finished: Path, standin_tiny: Path, tmp_path: Path) -> None:
    run_unit(quick(loader_workers=2), tmp_path, data_root=standin_tiny)
    assert_same(tmp_path, finished)


def of_protocol1(target: str, **changes: Any) -> Config:
    return quick(protocol="protocol1", target=target, **{"epochs": 1, "inference": "expert", **changes})


@pytest.fixture(scope="module")
def ilids(standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished unit of Protocol-1, whose targets share their sources."""
    folder = tmp_path_factory.mktemp("protocol1") / "ilids"
    run_unit(of_protocol1("ilids"), folder, data_root=standin_tiny)
    return folder


def test_targets_with_the_same_sources_share_one_training(ilids: Path, standin_tiny: Path, tmp_path: Path) -> None:
    """What i-LIDS's unit trained is tested on PRID as if PRID's unit had trained it, bit for bit."""
    config = of_protocol1("prid", wandb="offline")
    alone = run_unit(config, tmp_path / "alone", data_root=standin_tiny)
    steps: list[int] = []
    options: dict[str, Any] = {"data_root": standin_tiny, "on_progress": lambda progress: steps.append(progress.step)}
    shared = run_unit(config, tmp_path / "shared", trained=lambda _: [tmp_path / "nowhere", ilids], **options)
    assert steps == []
    assert (shared.trained_in, alone.trained_in) == ("/".join(ilids.parts[-3:]), "")
    assert shared.images_per_second > 0
    same = {"trained_in": "", "seconds": 0.0, "images_per_second": 0.0}
    assert replace(shared, **same) == replace(alone, **same)
    assert read_checkpoint(tmp_path / "shared" / "checkpoint.pt").config == config
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("shared", "alone")]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    assert len(list((tmp_path / "shared").glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"bank_momentum": 0.5}, {"selection": "oracle"}, {"epochs": 2}, {"protocol": "protocol3"}]
)
def test_another_training_is_never_taken_over(
    change: dict[str, Any], ilids: Path, standin_tiny: Path, tmp_path: Path
) -> None:
    config = of_protocol1("market1501" if "protocol" in change else "prid").replace(**change)
    with pytest.raises(StopError):  # it begins to train
        run_unit(config, tmp_path / "run", data_root=standin_tiny, trained=lambda _: [ilids], on_progress=stop_at(1))


def test_an_unfinished_or_damaged_training_is_not_taken_over(
    ilids: Path, standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    config, run = of_protocol1("prid"), tmp_path / "run"
    unfinished, damaged = tmp_path / "unfinished", tmp_path / "damaged"
    shutil.copytree(ilids, unfinished)
    saved = read_checkpoint(ilids / "checkpoint.pt")
    replace(saved, step=saved.step - 1).save(unfinished / "checkpoint.pt")
    shutil.copytree(ilids, damaged)
    os.truncate(damaged / "checkpoint.pt", 1000)
    options: dict[str, Any] = {"data_root": standin_tiny, "on_progress": stop_at(1)}
    with pytest.raises(StopError):
        run_unit(config, run, trained=lambda _: [unfinished, damaged], **options)
    assert "it may be truncated; its training is not taken over" in capsys.readouterr().err
    assert run_unit(config, run, trained=lambda _: [damaged, ilids], **options).trained_in


def test_killed_after_its_last_step_a_unit_says_nothing_twice(
    finished: Path, standin_tiny: Path, tmp_path: Path
) -> None:
    """Its checkpoint is complete and its last validation logged, but the result is not written."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    run_unit(quick(), folder, data_root=standin_tiny)
    assert_same(folder, finished)


def test_truncated_checkpoint_starts_again(finished: Path, standin_tiny: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(StopError):
        run_unit(quick(), tmp_path, data_root=standin_tiny, on_progress=stop_at(9))
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    run_unit(quick(), tmp_path, data_root=standin_tiny)
    assert "starting the unit again" in capsys.readouterr().err
    assert_same(tmp_path, finished)


def test_non_finite_loss_names_term_and_step(standin_tiny: Path, tmp_path: Path) -> None:
    config = quick(learning_rate=10.0, warmup_epochs=0, optimizer="sgd", steps_per_epoch=40, gamma=1.0)
    message = r"loss/\w+ is (nan|inf) at step \d+ \(epoch 0, domain \w+, learning rate 10\); try a lower"
    with pytest.raises(TrainingError, match=message):
        run_unit(config, tmp_path, data_root=standin_tiny)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "result.json").exists()


def test_weights_that_are_not_finite_are_never_saved(standin_tiny: Path, tmp_path: Path) -> None:
    """The step that breaks the weights has a finite loss; no later loss of the epoch tells."""
    config = quick(learning_rate=10.0, warmup_epochs=0, optimizer="sgd", steps_per_epoch=1, gamma=1.0, weight_decay=1.0)
    with pytest.raises(TrainingError, match=r"is not finite after step|loss/"):
        run_unit(config.replace(epochs=60, evaluate_every=0), tmp_path, data_root=standin_tiny)
    if (tmp_path / "checkpoint.pt").exists():
        assert all(value.isfinite().all() for value in read_checkpoint(tmp_path / "checkpoint.pt").method.values())


def test_other_configuration_in_the_same_folder_is_refused(finished: Path, standin_tiny: Path) -> None:
    with pytest.raises(UsageError, match="differ in: bank_momentum"):
        run_unit(quick(bank_momentum=0.5), finished, data_root=standin_tiny)


def test_source_scores_do_not_see_the_target(finished: Path, standin_tiny: Path, tmp_path: Path) -> None:
    """Selection on the target happens under the name oracle only."""
    rows = read_metrics(finished / "metrics.jsonl")
    assert not any("market1501" in key or "oracle" in key for row in rows for key in row)
    result = run_unit(quick(selection="oracle"), tmp_path, data_root=standin_tiny)
    assert (result.selection.rule, result.selection.score) == ("oracle", result.mAP)
    assert result.selection.scores == {
        "oracle": result.mAP,
        "source_validation": result.selection.scores["source_validation"],
    }
    assert any("val/oracle" in row for row in read_metrics(tmp_path / "metrics.jsonl"))


def test_baseline_unit_has_no_bank(standin_tiny: Path, tmp_path: Path) -> None:
    result = run_unit(quick(method="baseline"), tmp_path, data_root=standin_tiny)
    assert (result.title, result.inference, result.cost.train_passes) == ("plain BN", "", 1)
    assert not (tmp_path / "buffer_bank.npz").exists()


def test_in_domain_trains_on_the_targets_training_part(standin_tiny: Path, tmp_path: Path) -> None:
    result = run_unit(quick(method="baseline", protocol="in_domain"), tmp_path, data_root=standin_tiny)
    assert set(result.selection.per_source) == {"market1501"}


def test_loaded_checkpoint_extracts_features(finished: Path) -> None:
    method = lda.load(finished / "checkpoint.pt")
    images = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        features = method(images)
    assert features.shape == (2, 192)
    assert not method.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "protokol3"], "did you mean 'protocol3'"),
        (["--target", "market"], "did you mean 'market1501'"),
        (["--set", "bank_momentun=1"], "did you mean 'bank_momentum'"),
        (["--set", "bank_momentum=7"], "out of range"),
        (["--preset", "standing"], "did you mean 'standin'"),
        (["--data-root", "/nowhere/at/all", "--preset", "standin"], "/nowhere/at/all"),
        (["--set", "device=cuda:77"], "is not there"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert train.main(["--output", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_memory_that_runs_out_is_one_line(
    standin_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_step(*_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("lda.trainer.Trainer.train_step", train_step)
    options = ["--output", str(tmp_path / "run"), "--data-root", str(standin_tiny)]
    assert train.main([*options, "--set", "steps_per_epoch=2", "epochs=1", "wandb=disabled", "threads=1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("failed: out of memory on cpu: fewer or smaller images in a batch")
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["image_height"] == preset("standin").to_dict()["image_height"]  # the preset is that of its images


# --- selection rules -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_unit_records_what_every_affordable_rule_says(finished: Path, standin_tiny: Path, tmp_path: Path) -> None:
    result = run_unit(quick(proxy_domain="ilids"), tmp_path / "recorded", data_root=standin_tiny)
    selection, plain = result.selection, Result.read(finished)
    assert list(selection.scores) == ["source_validation", "proxy_domain", "oracle"]
    assert selection.score == selection.scores["source_validation"] == plain.selection.score
    assert selection.scores["oracle"] == result.mAP == plain.mAP  # the proxy domain changes nothing that is learnt
    assert result.unit != plain.unit
    assert result.training == plain.training
    config = quick(selection="proxy_domain", proxy_domain="ilids")
    chosen = run_unit(config, tmp_path / "chosen", data_root=standin_tiny)
    assert chosen.selection.score == selection.scores["proxy_domain"]
    rows = read_metrics(tmp_path / "chosen" / "metrics.jsonl")
    assert [row["step"] for row in rows if "val/proxy_domain" in row] == [4, 8]
    assert not any("oracle" in key for row in rows for key in row)
    # The same network, tested by hand on i-LIDS as on any target.
    task = build_task("protocol1", "ilids", standin_tiny)
    method = lda.load(tmp_path / "chosen" / "checkpoint.pt")
    found = Evaluator(task.test_splits, config, torch.device("cpu"))(method)
    assert found.mAP == pytest.approx(chosen.selection.score, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"proxy_domain": "msmt17"}, "proxy_domain: 'msmt17' is a source or the target of Protocol-3"),
        ({"proxy_domain": "market1501"}, "proxy_domain: 'market1501' is a source or the target of Protocol-3"),
        ({"proxy_domain": "vipr"}, "did you mean 'viper'"),
        ({"held_out": "market1501"}, "held_out: unknown source of Protocol-3 for market1501 'market1501'"),
        ({"held_out": "cuhk03", "protocol": "in_domain", "target": "cuhk03"}, "is the only source"),
    ],
)
def test_domains_that_cannot_be_tested_or_left_out(
    changes: dict[str, str], line: str, standin_tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=line):
        run_unit(quick(**changes), tmp_path, data_root=standin_tiny)
    with pytest.raises(UsageError, match="proxy_domain: the rule of this name needs a data set"):
        quick(selection="proxy_domain")


def test_leave_one_source_out_trains_without_each_source_and_shares(standin_tiny: Path, tmp_path: Path) -> None:
    """The mean over sources of the mAP of a network that never saw it; two targets share their trainings."""

    def units(training: str) -> list[Path]:
        folders = [path.parent for path in sorted(tmp_path.glob("*/without-*/config.json"))]
        return [folder for folder in folders if training_of(folder) == training]

    config = quick(selection="leave_one_source_out", evaluate_every=0, epochs=1)
    result = run_unit(config, tmp_path / "market1501", data_root=standin_tiny, trained=units)
    left_out = result.selection.left_out
    assert list(left_out) == ["msmt17", "cuhk_sysu", "cuhk03"]
    assert result.selection.score == pytest.approx(sum(left_out.values()) / 3)
    assert result.selection.scores["leave_one_source_out"] == result.selection.score
    assert {"source_validation", "oracle"} < set(result.selection.scores)
    task = build_task("protocol3", "market1501", standin_tiny, validation_fraction=0.1, held_out="cuhk03")
    assert [source.name for source in task.sources] == ["msmt17", "cuhk_sysu"]
    method = lda.load(tmp_path / "market1501" / "without-cuhk03" / "checkpoint.pt")
    found = Evaluator(task.test_splits, config, torch.device("cpu"))(method)
    assert found.mAP == pytest.approx(left_out["cuhk03"], abs=1e-6)
    assert found.rankings[0].num_valid_queries > 0

    other = run_unit(config.replace(target="cuhk03"), tmp_path / "cuhk03", data_root=standin_tiny, trained=units)
    shared = {path.parent.name: Result.read(path.parent).trained_in for path in tmp_path.glob("cuhk03/*/result.json")}
    assert shared["without-market1501"].endswith("market1501/without-cuhk03")  # both on MSMT17 and CUHK-SYSU
    assert [bool(shared[f"without-{name}"]) for name in ("msmt17", "cuhk_sysu")] == [False, False]
    assert other.trained_in == ""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert run_unit(config, tmp_path / "market1501", data_root=standin_tiny, trained=units) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before


@pytest.mark.slow
def test_interrupted_between_its_trainings_it_goes_on(standin_tiny: Path, tmp_path: Path) -> None:
    config = quick(selection="leave_one_source_out", evaluate_every=0, epochs=1)
    whole = run_unit(config, tmp_path / "whole", data_root=standin_tiny)
    steps = 0

    def stop(progress: Progress) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:  # in the second of the three
            raise StopError

    folder = tmp_path / "stopped"
    with pytest.raises(StopError):
        run_unit(config, folder, data_root=standin_tiny, on_progress=stop)
    first = (folder / "without-msmt17" / "result.json").stat().st_mtime_ns
    result = run_unit(config, folder, data_root=standin_tiny)
    assert (folder / "without-msmt17" / "result.json").stat().st_mtime_ns == first
    assert result.selection == whole.selection
