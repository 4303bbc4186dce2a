"""`optuna-dashboard` shows a study's default storage in a real browser."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import free_port

from sweeps.list.ledger import Budget, Ledger
from sweeps.list.storage import open_storage, storage_url
from sweeps.list.study import create_or_load, enqueue_first_points
from sweeps.plan.space import distributions
from sweeps.plan.study_files import load, resolve, study_file

pytest.importorskip("optuna_dashboard", reason="the browser view needs optuna-dashboard, install lda-reid[dashboard]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium")


@contextlib.contextmanager
def serving(url: str) -> Iterator[str]:
    """The dashboard on a free port, up."""
    port = free_port()
    program = Path(sys.executable).with_name("optuna-dashboard")
    process = subprocess.Popen(
        [str(program), url, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def page(address: str, profile: Path) -> str:
    """The page's text after its scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
def test_a_study_is_shown(tmp_path: Path) -> None:
    spec = resolve(load(study_file("protocol3")), study_file("protocol3"))
    url = storage_url(None, tmp_path)
    storage = open_storage(url, 20, 60)
    study, _ = create_or_load(storage, "protocol3", lambda study: study.set_metric_names(["selection score"]))
    ledger = Ledger(storage, study, Budget(trials=3, retries=0))
    enqueue_first_points(spec, ledger)
    for score in (0.5, 0.625, 0.5625):
        trial = ledger.ask(distributions(spec.search.space, spec.method), "w")
        assert trial is not None
        trial.report(score, 1)
        study.tell(trial, score)

    with serving(url) as address:
        listed = page(f"{address}/dashboard", tmp_path / "profile")
        assert "protocol3" in listed
        shown = page(f"{address}/dashboard/studies/1", tmp_path / "profile")
    for text in ("protocol3", "bank_momentum", "consistency_weight", "0.625"):
        assert text in shown
