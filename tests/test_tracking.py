"""W&B as a view: real offline runs read back by wandb's own viewer; never a prompt, never a failed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lda import tracking
from lda.tracking import RunLabels, Tracker, account_configured, resolve_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))


def test_mode_follows_the_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine other.example login user password secret\n")
    assert not account_configured()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert resolve_mode("auto") == "online"
    assert resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert account_configured()


RUN = """
import sys
from pathlib import Path
import numpy as np
from lda.tracking import RunLabels, Tracker
labels = RunLabels(group="protocol3/trial-0007", job_type="search", name="t0007-market1501-s0", tags=("stand-in",))
tracker = Tracker(Path(sys.argv[1]), "abc123", {"bank_momentum": 0.9}, labels)
for step in (5, 10):
    tracker.log({"step": step, "epoch": 1, "loss/total": 1.0 / step})
tracker.log_image("buffer_bank", np.zeros((8, 8, 3), dtype=np.uint8), "rows")
tracker.log_table("table", ["layer", "mean"], [["bn1", 0.5]])
tracker.summarise({"test/mAP": 0.25})
tracker.finish()
"""


def inspected(folder: Path) -> str:
    """The run's records and summary as wandb's own viewer reads them."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", str(file), "--json"]
    return "".join(
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["--summary"])
    )


def test_offline_run_reads_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = inspected(tmp_path)
    for expected in ("protocol3/trial-0007", "t0007-market1501-s0", "stand-in", "bank_momentum", "test/mAP"):
        assert expected in text, expected
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 1


class Broken:
    """A W&B run whose every call fails."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("service gone\nmore lines")


def test_failures_are_told_once_and_never_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, "abc", {}, RunLabels(), mode="disabled")
    tracker._run = Broken()
    tracker.log({"step": 1})
    tracker.log({"step": 2})
    tracker.log_image("picture", np.zeros((2, 2, 3), dtype=np.uint8))
    tracker.finish()
    assert capsys.readouterr().err == "W&B: log failed (ConnectionError: service gone); this run goes on without it\n"


def test_disabled_imports_no_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lda.tracking import RunLabels, Tracker\n"
        "Tracker(Path(sys.argv[1]), 'abc', {}, RunLabels(), mode='disabled').finish(); sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_account_without_network_falls_back_to_offline(tmp_path: Path) -> None:
    """A key is configured, the server does not answer: no prompt, a bounded wait, an offline run."""
    env = {**os.environ, "WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    hurried = "from lda import tracking; tracking._ONLINE_TIMEOUT = 3.0\n"
    done = subprocess.run(
        [sys.executable, "-c", hurried + RUN, str(tmp_path)], capture_output=True, text=True, check=False, env=env,
        stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "logging offline" in done.stderr
    assert "k" * 40 not in done.stderr + done.stdout
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    leaked = [path for path in tmp_path.rglob("*") if path.is_file() and b"k" * 40 in path.read_bytes()]
    assert leaked == []


def test_only_scalars_of_the_run_are_labelled(tmp_path: Path) -> None:
    """Two studies with the same unit stay two runs on a server."""
    ids = []
    for study in ("a", "b"):
        folder = tmp_path / study
        tracker = Tracker(folder, "abc123", {}, RunLabels(group=f"{study}/trial-0000"), mode="offline")
        ids.append(tracker._run.id)
        tracker.finish()
    assert ids[0] != ids[1]
    assert all(run.startswith("abc123-") for run in ids)
    assert tracking._PROJECT == "lda-reid"
