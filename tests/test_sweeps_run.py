"""The command itself: real studies on the tiny stand-in, interrupted, killed and gone on with; mistakes of the user."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from studies import REPOSITORY, Command, no_leftovers, wait_for

__all__ = ["no_leftovers"]


@pytest.fixture
def command(tmp_path: Path, standin_tiny: Path) -> Command:
    return Command(tmp_path, standin_tiny)


@pytest.mark.slow
def test_a_trial_of_protocol_1_trains_once(tmp_path: Path, standin_tiny: Path) -> None:
    spec = {"protocol": "protocol1", "targets": ["ilids", "prid"]}
    command = Command(tmp_path, standin_tiny, spec=spec, search={"trials": 1}, base={"inference": "expert"})
    assert command.run() == 0, command.output
    prid = json.loads((command.study / "trial-0000/prid-s0/result.json").read_text())
    assert (prid["trained_in"], prid["num_splits"]) == ("mine/trial-0000/ilids-s0", 10)
    assert "over the 10 test splits of a target" in command.output


@pytest.mark.slow
def test_killed_in_its_second_trial_a_study_goes_on_with_the_same_command(tmp_path: Path, standin_tiny: Path) -> None:
    command = Command(tmp_path, standin_tiny, spec={"confirm": {"top": 1, "seeds": 1}})
    coordinator = command.start()
    wait_for(lambda: (command.study / "trial-0001/market1501-s0/config.json").exists(), process=coordinator)
    coordinator.kill()
    coordinator.wait()
    wait_for(lambda: command.workers() == [], 30)  # they do not outlive their coordinator
    before = command.results()
    assert len(before) >= 3
    assert command.run("--status") == 0
    assert "1 of 2 trials (0 pruned, 0 failed" in command.output
    assert "trial-0000 complete: score" in command.output

    assert command.run("--workers", "2") == 0, command.output
    assert before.items() <= command.results().items()  # nothing finished was run again
    assert len(command.results()) == 2 * 2 + 3 * 2
    assert not (command.study / "trial-0002").exists()
    default, other, baseline = (command.trial(f"trial-{name}") for name in ("0000", "0001", "baseline"))
    assert [trial["origin"] for trial in (default, other, baseline)] == ["default", "search", "baseline"]
    assert {trial["state"] for trial in (default, other, baseline)} == {"complete"}
    assert default["params"] == {"bank_momentum": 0.9} != other["params"]
    assert default["units"] == ["cuhk03-s0", "market1501-s0"]
    assert default["confirm_units"] == other["confirm_units"] == baseline["confirm_units"]
    assert default["confirm_units"] == ["cuhk03-s1", "market1501-s1"]
    assert (default["attempts"], other["failures"]) == (1, 0)
    assert default["score"] == pytest.approx(statistics.fmean(_scores(command, default)))
    study = json.loads((command.study / "study.json").read_text())
    assert (study["study"], study["data"], study["selection"]) == ("mine", "stand-in", "source_validation")
    assert study["defaults"] == {"bank_momentum": 0.9}

    assert "2 of 2 trials (0 pruned, 0 failed, 1 retried), confirmed 3 of 3" in command.output
    assert "STAND-IN" in command.output  # the table
    assert (command.study / "figures" / "buffer_bank.png").exists()

    assert command.run("--set", "gem_p=2", "--seed", "5") == 2
    assert "was begun with other settings: base.gem_p (None before, 2.0 now); seed (0 before, 5 now)" in command.output


def _scores(command: Command, trial: dict[str, Any]) -> list[float]:
    folder = command.study / f"trial-{trial['number']:04d}"
    return [json.loads((folder / unit / "result.json").read_text())["selection"]["score"] for unit in trial["units"]]


def test_a_killed_worker_is_replaced_and_ctrl_c_ends_cleanly(command: Command) -> None:
    coordinator = command.start("--set", "steps_per_epoch=4000")
    metrics = command.study / "trial-0000/cuhk03-s0/metrics.jsonl"
    wait_for(metrics.exists, process=coordinator)
    (worker,) = command.workers()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: sum("trial-0000 started" in event for event in command.events()) == 2, process=coordinator)
    assert any("was killed by signal 9; starting it again" in event for event in command.events())
    wait_for(lambda: command.trial("trial-0000")["attempts"] == 2, 10)
    coordinator.send_signal(signal.SIGINT)
    assert coordinator.wait(60) == 130
    assert "Go on with:\n  python sweeps/run.py --study" in command.output
    assert "Traceback" not in command.output
    assert command.workers() == []
    trial = command.trial("trial-0000")
    assert (trial["state"], trial["failures"], trial["reason"]) == ("running", 1, "stopped by the user")
    assert list((command.study / "workers").glob("*.lock")) == []


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_counted_and_not_repeated(command: Command) -> None:
    assert command.run("--set", "learning_rate=10", "optimizer=sgd", "steps_per_epoch=300", "--trials", "1") == 1
    trial = command.trial("trial-0000")
    assert (trial["state"], trial["attempts"]) == ("failed", 1)
    assert "at step" in trial["reason"]
    assert "given up: trial-0000: loss" in command.output


def test_data_that_cannot_be_used_stops_the_study(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = Command(tmp_path, tmp_path / "empty")
    assert command.run() == 2
    assert "Traceback" not in command.output
    for name in ("Market-1501", "MSMT17", "CUHK-SYSU", "CUHK03"):
        assert name in command.output  # everything that is missing, at once
    assert not command.study.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--study", "protcol3"], "unknown study 'protcol3' (did you mean 'protocol3'?)"),
        (["--study", "smoke", "--set", "epoch=3"], "unknown setting 'epoch' (did you mean 'epochs'?)"),
        (["--study", "smoke", "--set", "epochs=0"], "epochs: 0 is out of range, expected 1 to"),
        (["--study", "smoke", "--set", "epochs"], "expected KEY=VALUE"),
        (["--study", "smoke", "--set", "bank_momentum=2"], "bank_momentum: 2.0 is out of range"),
        (["--study", "smoke", "--data-root", "nowhere"], "--data-root: nowhere: there is no such folder"),
        (["--study", "smoke", "--trials", "0"], "search.trials: expected 1 or more, got 0"),
        (["--study", "smoke", "--storage", "mysql://u:pw@h/d"], "--storage mysql://u:***@h/d: unknown kind of storage"),
        (["--study", "smoke", "--join"], "no study 'smoke' in runs/smoke yet; start it first"),
        (["--study", "smoke", "--status"], "no study 'smoke' in runs/smoke yet; start it first"),
        (["--study", "smoke", "--join", "--seed", "1"], "--join takes the study as it runs; leave out --seed"),
        ([], "--study NAME is missing; one of: "),
    ],
)
def test_mistakes_end_with_one_line_and_exit_2(tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "sweeps" / "run.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--list"], {"torch", "optuna", "wandb", "numpy"}),
        # A method's settings lie in its file, beside layers: checking them loads torch, and nothing else that is slow.
        (["--study", "protocol3", "--dry-run"], {"torchvision", "optuna", "wandb", "pandas", "scipy"}),
    ],
)
def test_answers_at_once(tmp_path: Path, arguments: list[str], heavy: set[str]) -> None:
    program = (
        "import sys; from sweeps.run import main; code = main(sys.argv[1:]); "
        f"heavy = {heavy!r} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Protocol-3, leave one domain out" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_coordinator_needs_no_torch() -> None:
    program = "import sys, sweeps.coordinator; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_dry_run_tells_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sweeps.run import main

    options = ["--set", "bank_momentum=0.8", "--trials", "4", "--confirm-seeds", "0", "--output", str(tmp_path / "o")]
    assert main(["--study", "protocol3", "--dry-run", *options]) == 0
    printed = capsys.readouterr().out
    assert "CUHK03 from Market-1501, MSMT17, CUHK-SYSU" in printed
    assert "consistency_weight: 0.01 to 5, log; default 0.1" in printed
    assert "fixed      bank_momentum=0.8" in printed
    assert "units      12" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_password_never_reaches_the_list_of_processes(tmp_path: Path) -> None:
    url = "postgresql://u:s3cret@192.0.2.1/lab"  # an address that never answers
    process = subprocess.Popen(
        [
            sys.executable,
            str(REPOSITORY / "sweeps" / "run.py"),
            "--study",
            "smoke",
            f"--storage={url}",
            "--output",
            "o",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    command = Path(f"/proc/{process.pid}/cmdline")
    wait_for(lambda: b"--output" in (shown := command.read_bytes()) and b"s3cret" not in shown, 10)
    process.kill()
    output, _ = process.communicate()
    assert "s3cret" not in output
