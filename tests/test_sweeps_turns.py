"""No attempt is started twice, however many processes take from one list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sweeps.list.ledger import Budget, Ledger
from sweeps.list.storage import open_storage
from sweeps.list.study import create_or_load

TAKE = """
import sys
import optuna
from sweeps.list.ledger import Budget, Ledger
from sweeps.list.storage import open_storage
storage = open_storage(sys.argv[1], 60, 180)
ledger = Ledger(storage, optuna.load_study(study_name="s", storage=storage), Budget(None, 2, proposes=False))
print("ready", flush=True)
sys.stdin.readline()
while (trial := ledger.ask({}, sys.argv[2])) is not None:
    print(trial.number, flush=True)
"""


def test_processes_that_start_together_share_the_list(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    storage = open_storage(url, 60, 180)
    study, _ = create_or_load(storage, "s", lambda study: None)
    ledger = Ledger(storage, study, Budget(None, 2, proposes=False))
    for number in range(24):
        ledger.enqueue(f"job {number}", {})
    command = [sys.executable, "-c", TAKE, url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(i)], **pipes) for i in range(3)]  # type: ignore[call-overload]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    taken = [int(line) for worker in workers for line in worker.communicate()[0].split()]
    assert sorted(taken) == list(range(24))
