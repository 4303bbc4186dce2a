"""W&B as a view: real runs read back by wandb's own viewer; never a prompt, a failed run, or a wait without end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from studies import children_of, wait_for
from wandb_server import Fault, Server

from lda.errors import UsageError
from lda.tracking import RunLabels, Tracker, account_configured, announcement, resolve_mode, share_failure
from lda.tracking.modes import WORDS, log_folder, requested

KEY = "k" * 40
DEAD = "http://127.0.0.1:9"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without an account. Returns the home directory."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


# --- which mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("offline", {"WANDB_MODE": "disabled"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "run"}, "online"),
        ("auto", {"WANDB_MODE": "shared"}, "online"),
        ("auto", {"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "disabled"),
        ("auto", {"WANDB_DISABLED": "false", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": ""}, "auto"),
    ],
)
def test_words(setting: str, environment: Mapping[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert requested(setting).mode == expected


def test_unknown_words_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Capture) -> None:
    """A mistake where it can be mended; a line where a run has begun, whose log is kept."""
    monkeypatch.setenv("WANDB_MODE", "Offline")
    with pytest.raises(UsageError, match=r"WANDB_MODE: unknown mode of W&B 'Offline' \(did you mean 'offline'\?\)"):
        announcement("auto")
    Tracker(tmp_path, "abc", {}, RunLabels()).finish()
    assert capfd.readouterr().err.startswith("W&B: WANDB_MODE: unknown mode of W&B 'Offline'")
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_our_words_are_wandbs() -> None:
    code = "import wandb; print(*wandb.Settings.model_fields['mode'].annotation.__args__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == set(WORDS)


def netrc(host: str) -> str:
    return f"machine {host}\n  login user\n  password {KEY}\n"


@pytest.mark.parametrize(
    ("files", "environment", "mode", "reason"),
    [
        ({}, {}, "offline", "no account for https://api.forge.coreweave.com"),
        ({}, {"WANDB_API_KEY": KEY}, "online", "https://api.forge.coreweave.com"),
        ({}, {"WANDB_API_KEY": "short"}, "offline", "WANDB_API_KEY invalid: API key must have 40+ characters, has 5"),
        ({}, {"WANDB_IDENTITY_TOKEN_FILE": "token"}, "online", "https://api.forge.coreweave.com"),
        ({".netrc": netrc("api.forge.coreweave.com")}, {}, "online", "https://api.forge.coreweave.com"),
        ({"_netrc": netrc("api.wandb.ai")}, {}, "online", "https://api.forge.coreweave.com"),
        ({"mine": netrc("our.example")}, {"NETRC": "~/mine"}, "offline", "no account for https://api.forge.coreweave.com"),
        (
            {"mine": netrc("our.example"), "c/settings": "[default]\nbase_url = https://our.example\n"},
            {"NETRC": "~/mine", "WANDB_CONFIG_DIR": "~/c"},
            "online",
            "https://our.example",
        ),
        (
            {".netrc": netrc("api.wandb.ai"), ".config/wandb/settings": "[default]\nmode = offline\n"},
            {},
            "offline",
            "mode = offline in W&B's settings file",
        ),
    ],
)  # fmt: skip
def test_logged_in_as_wandb_sees_it(
    files: Mapping[str, str],
    environment: Mapping[str, str],
    mode: str,
    reason: str,
    nobody: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, content in files.items():
        (nobody / name).parent.mkdir(parents=True, exist_ok=True)
        (nobody / name).write_text(content)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = announcement("auto", Path("runs/x"))
    assert line.startswith(f"W&B: {mode} ({reason})")
    assert line.endswith("; wandb sync runs/x/wandb uploads" if mode == "offline" else "; logs in runs/x/wandb")


def test_account_configured_is_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert account_configured()
    assert resolve_mode("auto") == "online"


def test_what_cannot_be_is_told_before_a_study_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert announcement("disabled") == "W&B: disabled (wandb=disabled)"
    monkeypatch.setenv("LDA_WANDB_SECONDS", "soon")
    with pytest.raises(UsageError, match="LDA_WANDB_SECONDS: expected seconds above 0, got 'soon'"):
        announcement("offline")
    monkeypatch.setenv("LDA_WANDB_SECONDS", "9")
    monkeypatch.setenv("WANDB_DIR", "/proc/nowhere")
    with pytest.raises(UsageError, match="WANDB_DIR: cannot make /proc/nowhere"):
        announcement("offline")


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lda.tracking import RunLabels, Tracker, _SERVICE\n"
        "Tracker(Path(sys.argv[1]), 'abc', {}, RunLabels(), mode='disabled').finish()\n"
        "sys.exit(bool({'wandb', 'numpy'} & set(sys.modules)) or _SERVICE._link is not None)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
    assert not (tmp_path / "wandb").exists()


# --- runs ------------------------------------------------------------------------------------------------------------

RUN = """
import sys, time
from pathlib import Path
import numpy as np
from lda.tracking import RunLabels, Tracker
for run in ("abc123", "def456")[:int(sys.argv[2])]:
    labels = RunLabels(group="protocol3/trial-0007", job_type="search", name="t0007-market1501-s0", tags=("stand-in",))
    tracker = Tracker(Path(sys.argv[1]), run, {"bank_momentum": 0.9}, labels)
    for step in (5, 10):
        tracker.log({"step": step, "epoch": 1, "loss/total": 1.0 / step})
    print("logged", flush=True)
    sys.stdin.readline()
    tracker.log({"step": 15, "epoch": 2, "loss/total": 0.01})
    tracker.log_image("buffer_bank", np.zeros((8, 8, 3), dtype=np.uint8), "rows")
    tracker.log_image("missing", Path("nowhere.png"))
    tracker.log_table("table", ["layer", "mean"], [["bn1", 0.5]])
    tracker.summarise({"test/mAP": 0.25})
    tracker.finish()
"""


def start(folder: Path, runs: int = 1, **environment: str) -> subprocess.Popen[str]:
    """A process that logs runs; each goes on once told by `go`."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), str(runs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def go(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Let it run to its end. Returns exit code and the lines of stderr."""
    _, errors = process.communicate("\n\n", timeout=120)
    return process.returncode, errors.splitlines()


def records(folder: Path, run: str = "") -> list[dict[str, Any]]:
    """What the run's one offline log holds, as wandb's own viewer reads it."""
    (file,) = folder.glob(f"wandb/offline-run-*/run-{run}*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def steps(log: list[dict[str, Any]]) -> list[int]:
    """Of the rows of metrics."""
    items = [record["history"]["item"] for record in log if record["type"] == "history"]
    return [item["step"] for item in items if "step" in item]


def check_whole(folder: Path, run: str = "abc123") -> None:
    """One offline log of the run holds all that was logged, once."""
    log = records(folder, run)
    (begun,) = [record["run"] for record in log if record["type"] == "run"]
    assert begun["run_group"] == "protocol3/trial-0007"
    assert (begun["display_name"], begun["job_type"]) == ("t0007-market1501-s0", "search")
    assert (begun["project"], begun["tags"]) == ("lda-reid", ["stand-in"])
    assert begun["config"]["update"]["bank_momentum"] == 0.9
    assert steps(log) == [5, 10, 15]
    summary = [record["summary"]["update"] for record in log if record["type"] == "summary"]
    assert any(update.get("test/mAP") == 0.25 for update in summary)
    assert [record["exit"].get("exit_code", 0) for record in log if record["type"] == "exit"] == [0]
    (media,) = folder.glob(f"wandb/offline-run-*-{run}-*/files/media")
    assert len(list(media.glob("images/*.png"))) == len(list(media.glob("table/*.json"))) == 1


NOT_MADE = "W&B: missing is not logged: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.png'"


def test_an_offline_run_reads_back(tmp_path: Path) -> None:
    assert go(start(tmp_path)) == (0, [NOT_MADE])
    check_whole(tmp_path)
    assert children_of_ended(tmp_path) == []


def children_of_ended(folder: Path) -> list[str]:
    """Processes that still write below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        found += [process.name for file in files if file.startswith(str(folder))]
    return found


@pytest.mark.parametrize("victim", ["wandb-core", pytest.param("lda.tracking.child", marks=pytest.mark.slow)])
def test_a_killed_process_costs_a_line(victim: str, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(lambda: bool(list(tmp_path.glob("wandb/offline-run-*/files/requirements.txt"))), process=process)
    (pid,) = [pid for pid, command in children_of(process.pid) if victim in command]
    os.kill(pid, signal.SIGKILL)
    code, lines = go(process)
    assert code == 0
    assert lines[1:] == [NOT_MADE]
    assert lines[0].endswith(f"logging offline in {tmp_path}/wandb, `wandb sync` uploads later")
    check_whole(tmp_path)


def test_a_killed_run_keeps_its_log_and_leaves_no_process(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(lambda: bool(list(tmp_path.glob("wandb/offline-run-*/files/requirements.txt"))), process=process)
    process.kill()
    process.communicate()
    wait_for(lambda: children_of_ended(tmp_path) == [], 20)
    log = records(tmp_path)
    assert steps(log) == [5, 10]
    assert [record["exit"].get("exit_code", 0) for record in log if record["type"] == "exit"] == [1]


def test_the_same_unit_of_two_studies_is_two_runs(tmp_path: Path) -> None:
    """On a server, that is: each keeps its own id."""
    for study in ("a", "b"):
        Tracker(tmp_path, "abc123", {}, RunLabels(group=f"{study}/trial-0000"), mode="offline").finish()
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/run-abc123-*.wandb")}) == 2


def test_wandbs_own_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_PROJECT", "my-project")
    monkeypatch.setenv("WANDB_ENTITY", "my-team")
    Tracker(tmp_path / "unit", "abc123", {}, RunLabels(), mode="offline").finish()
    assert log_folder(tmp_path / "unit") == tmp_path / "elsewhere" / "wandb"
    (begun,) = [record["run"] for record in records(tmp_path / "elsewhere") if record["type"] == "run"]
    assert (begun["entity"], begun["project"]) == ("my-team", "my-project")
    monkeypatch.setenv("WANDB_DIR", "/proc/nowhere")
    Tracker(tmp_path / "unit", "abc123", {}, RunLabels(), mode="offline").finish()
    assert capfd.readouterr().err.startswith("W&B: WANDB_DIR: cannot make /proc/nowhere")
    assert len(list(tmp_path.glob("unit/wandb/offline-run-*"))) == 1


# --- servers that fail -----------------------------------------------------------------------------------------------


def rows(server: Server) -> dict[str, list[int]]:
    """Run -> steps of the rows of metrics that arrived."""
    return {
        run.partition("-")[0]: [row["step"] for row in uploaded if "step" in row]
        for run, uploaded in server.rows.items()
    }


def check_uploads(folder: Path) -> None:
    """What `wandb sync` of the folder brings to a server that works."""
    with Server() as server:
        environment = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        command = [str(Path(sys.executable).parent / "wandb"), "sync", str(folder / "wandb")]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
        assert rows(server) == {"abc123": [5, 10, 15], "def456": [5, 10, 15]}


def check_failed(folder: Path, url: str, seconds: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Two runs logged to a server that fails: it ends, says so once, and every row is in a log that uploads."""
    process = start(folder, runs=2, WANDB_API_KEY=KEY, WANDB_BASE_URL=url, LDA_WANDB_SECONDS=seconds)
    meanwhile()
    code, lines = go(process)
    assert code == 0
    (said,) = [line for line in lines if line != NOT_MADE]
    assert said.endswith(f"logging offline in {folder}/wandb, `wandb sync` uploads later")
    for run in ("abc123", "def456"):
        check_whole(folder, run)
    leaked = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert (leaked, [line for line in lines if KEY in line]) == ([], [])


def test_a_server_that_works(tmp_path: Path) -> None:
    with Server() as server:
        process = start(tmp_path, runs=2, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
        assert go(process) == (0, [NOT_MADE, NOT_MADE])
        assert rows(server) == {"abc123": [5, 10, 15], "def456": [5, 10, 15]}
    assert list(tmp_path.glob("wandb/offline-run-*")) == []


@pytest.mark.slow
def test_an_account_and_no_network(tmp_path: Path) -> None:
    check_failed(tmp_path, DEAD, "2")
    check_uploads(tmp_path)


def test_a_command_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is many processes."""
    monkeypatch.setenv("LDA_WANDB_FAILED", "")  # and put back afterwards
    share_failure()
    shared = Path(os.environ["LDA_WANDB_FAILED"])
    environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": DEAD, "LDA_WANDB_SECONDS": "2"}
    _, first = go(start(tmp_path / "a", **environment))
    reason = shared.read_text()
    assert first[0] == f"W&B: {reason}; logging offline in {tmp_path}/a/wandb, `wandb sync` uploads later"
    _, second = go(start(tmp_path / "b", **environment))
    assert second[0] == f"W&B: {reason}; logging offline in {tmp_path}/b/wandb, `wandb sync` uploads later"
    assert list(tmp_path.glob("b/wandb/run-*")) == []
    check_whole(tmp_path / "b")


START = 3  # requests until a run has begun


@pytest.mark.parametrize(
    ("answers", "then"),
    [
        pytest.param(START, "stall", marks=pytest.mark.slow),
        pytest.param(0, "stall", marks=pytest.mark.slow),
        pytest.param(1, "stall", marks=pytest.mark.slow),
        pytest.param(0, "refuse", marks=pytest.mark.slow),
        pytest.param(START, "refuse", marks=pytest.mark.slow),
        (START + 2, "refuse"),  # the run's uploads, of which wandb itself says nothing
        pytest.param(START, "die", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_fails(answers: int, then: Fault, tmp_path: Path) -> None:
    with Server(answers, then) as server:

        def begun() -> None:
            if answers >= START:
                wait_for(lambda: server.requests >= START)

        check_failed(tmp_path, server.url, "3", begun)
        assert server.requests > answers
