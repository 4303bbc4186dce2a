"""After the last trial: the table, figures of what the methods kept, and the study's own W&B run.

Table and figures are made by the commands of analysis, as a user would make them; what they wrote is logged. A part
that fails is a line of warning and stops no other: the study itself is safe in its folder.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import subprocess
import sys
from pathlib import Path

from lda.runs import BUFFER_BANK
from lda.tracking import RunLabels, Tracker
from sweeps.plan.spec import StudySpec, to_dict
from sweeps.study_folder import StudyFolder

_DRAWN_BY = {BUFFER_BANK: "analysis.buffer_bank"}
"""What a method keeps in a unit's folder -> the command that draws a study's."""


def finish(study: str, spec: StudySpec, folder: StudyFolder, kind: str, complete: bool) -> None:
    """Print, draw and log a study that is over.

    Args:
        kind: "stand-in" or "real", a tag of the W&B run.
        complete: whether any trial is; there is nothing to tabulate or draw otherwise, but a run to log.
    """
    table: Path | None = None
    figures: list[Path] = []
    run = functools.partial(_made, set[str]())
    if complete:
        run("analysis.tables", str(folder.path))
        if run("analysis.tables", str(folder.path), "--format", "csv", "--output", str(folder.table), quiet=True):
            table = folder.table
        drawn = [run(command, str(folder.path), "--output", str(folder.figures)) for command in _commands(folder)]
        figures = sorted(folder.figures.glob("*.png")) if any(drawn) else []
    _log(study, spec, folder, kind, table, figures)


def _commands(folder: StudyFolder) -> list[str]:
    """The commands for what any unit of the study keeps: a baseline keeps nothing, and nothing is drawn."""
    return [command for name, command in _DRAWN_BY.items() if any(folder.path.glob(f"trial-*/*/{name}.npz"))]


def _made(warned: set[str], module: str, *arguments: str, quiet: bool = False) -> bool:
    """Run a command of analysis and repeat what it warns of, once; False, and one line of warning, where it fails."""
    sys.stdout.flush()  # ours comes first also where stdout is a file
    stdout = subprocess.DEVNULL if quiet else None
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"warning: {module} failed: {reason}", file=sys.stderr)
    elif not quiet:
        for line in done.stderr.splitlines():
            if line not in warned:
                print(line, file=sys.stderr)
            warned.add(line)
    return done.returncode == 0


def _log(study: str, spec: StudySpec, folder: StudyFolder, kind: str, table: Path | None, figures: list[Path]) -> None:
    """The study's own W&B run, beside those of its units: the table and figures that were made."""
    content = to_dict(spec)
    unit = hashlib.sha256(f"{study} {content}".encode()).hexdigest()[:12]
    labels = RunLabels(group=study, job_type="study", name=study, tags=(kind, study, "study"), folder=folder.path)
    mode = spec.config(spec.targets[0], spec.seed, {}).machine.wandb
    tracker = Tracker(folder.path, unit, {**content, "data": kind}, labels, mode)
    if table is not None:
        columns, *rows = csv.reader(table.read_text(encoding="utf-8").splitlines())
        tracker.log_table("protocol_table", columns, rows)
    for figure in figures:
        tracker.log_image(figure.stem, figure)
    tracker.finish()
