"""Run a study on a SLURM cluster: an array of tasks, each the ordinary command, all on one storage.

    python -m sweeps.slurm --tasks 8 --slurm partition=gpu gpus_per_node=1 time=720 -- \\
        --study protocol3 --data-root DIR --storage journal --output /shared/runs

What follows `--` is the command line of sweeps/run.py, with a PostgreSQL URL or, where all nodes share a disk, with
`--storage journal`. A task that SLURM warns of its end (time limit, preemption) ends as after Ctrl-C, is queued again
and goes on: what it was training goes on from its checkpoint, there or on another node. Needs submitit (install
lda-reid[slurm]); `--cluster local` runs the tasks on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lda.arguments import checked, output_folder, path, whole
from lda.command import exit_code
from lda.errors import UsageError
from sweeps.list.addresses import VARIABLE, asked_for, has_password, storage_url
from sweeps.plan.study_files import study_file, study_name
from sweeps.run import StudyParser, split_storage
from sweeps.run import parser as run_parser

_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # what submitit asks SLURM to send before a task is ended
_GRACE = 60.0  # seconds; SLURM warns 90 before


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = StudyParser(
        prog="python -m sweeps.slurm",
        description="Run a study as an array of SLURM tasks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", type=whole(1, 10_000), default=4, metavar="N", help="size of the array")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="local: on this machine")
    parser.add_argument(
        "--logs", type=path, default=Path("runs/slurm"), metavar="DIR", help="folder of the tasks' output"
    )
    parser.add_argument(
        "--requeues", type=whole(0, 10_000), default=100, metavar="N", help="how often a task may run out of time"
    )
    parser.add_argument("--wait", action="store_true", help="wait until every task has ended")
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="sbatch options, such as partition=gpu time=720"
    )
    parser.add_argument("run", nargs=argparse.REMAINDER, metavar="-- ...", help="command line of sweeps/run.py")
    return parser


class Task:
    """One task: the ordinary command in a process of its own, so that signals end it as they end a shell's.

    submitit pickles it, calls it on a node, and calls `checkpoint` there when SLURM says that the task must go.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, arguments: list[str]) -> int:
        # The signal that warns submitit may reach all processes of a task, and would end one that does not know it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sweeps.run", *arguments], preexec_fn=lambda: _ignored(_WARNINGS)
        )
        return self._process.wait()

    def checkpoint(self, arguments: list[str]) -> Any:
        """Let the command end, which keeps everything, and hand the same task to the queue."""
        import submitit

        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # then SLURM kills it, and a heartbeat that stops tells
                self._process.wait(_GRACE)
        return submitit.helpers.DelayedSubmission(Task(), arguments)


def _ignored(signals: Sequence[signal.Signals]) -> None:
    for one in signals:
        signal.signal(one, signal.SIG_IGN)


def slurm_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`["partition=gpu", "time=720"]` -> submitit's parameters. Raises UsageError naming the pair."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--slurm {pair!r}: expected KEY=VALUE, for example partition=gpu")
        options[f"slurm_{key}"] = int(value) if value.isdigit() else value
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 submitted (with --wait: every task done), 1 a task failed, 2 bad usage,
    130 interrupted (the tasks go on)."""
    return exit_code(lambda: _submit(parser().parse_args(arguments)))


def _submit(given: argparse.Namespace) -> int:
    jobs = submitted(given)
    print(f"{len(jobs)} tasks submitted: {', '.join(job.job_id for job in jobs)}; output in {given.logs}", flush=True)
    if not given.wait:
        return 0
    codes: list[int] = [job.result() for job in jobs]
    return max(codes)


def submitted(given: argparse.Namespace) -> list[Any]:
    """The jobs of a command line, submitted. Raises UsageError for what no task could run."""
    try:
        import submitit
    except ImportError:
        raise UsageError("submitit is not installed; install lda-reid[slurm]") from None
    run = [argument for argument in given.run if argument != "--"]
    task = run_parser().parse_args(run)  # a mistake is told here, not on every node
    if task.study is None:
        raise UsageError("--study NAME is missing behind --")
    study = study_name(study_file(task.study))
    checked("--output", output_folder, task.output / study)
    storage_url(asked_for(task.storage), task.output / study)
    if given.cluster == "slurm" and (asked_for(task.storage) or "sqlite").startswith("sqlite"):
        raise UsageError(
            f"several nodes need --storage postgresql://... or journal (or {VARIABLE}); sqlite serves one machine"
        )
    if any(has_password(storage) for storage in split_storage(run)[1]):
        raise UsageError(f"--storage: submitit would write the password to a file; put the URL into {VARIABLE} instead")
    options = slurm_options(given.slurm)
    checked("--logs", output_folder, given.logs)
    if given.cluster == "slurm" and shutil.which("srun") is None:
        raise UsageError("there is no SLURM here (no srun on PATH); --cluster local runs the tasks on this machine")
    executor = submitit.AutoExecutor(
        folder=given.logs, cluster=given.cluster, **{f"{given.cluster}_max_num_timeout": given.requeues}
    )
    executor.update_parameters(name=f"lda-{study}", **options)
    jobs: list[Any] = executor.map_array(Task(), [run] * given.tasks)
    return jobs


if __name__ == "__main__":
    raise SystemExit(main())
