"""The study's own W&B run: its table and figures, beside the runs of its units."""

from __future__ import annotations

import hashlib

from analysis.comparison import protocol_table
from analysis.study import load_study
from lda.tracking import RunLabels, Tracker
from sweeps.plan.spec import StudySpec, to_dict
from sweeps.study_folder import StudyFolder


def log_study(study: str, spec: StudySpec, folder: StudyFolder, kind: str) -> None:
    """Log what `report` has just printed and drawn. W&B never fails a study.

    Args:
        kind: "stand-in" or "real", a tag of the run.
    """
    content = to_dict(spec)
    unit = hashlib.sha256(f"{study} {content}".encode()).hexdigest()[:12]
    labels = RunLabels(group=study, job_type="study", name=study, tags=(kind, study, "study"), folder=folder.path)
    mode = spec.config(spec.targets[0], spec.seed, {}).wandb
    tracker = Tracker(folder.path, unit, {**content, "data": kind}, labels, mode)
    table = protocol_table(load_study(folder.path))
    tracker.log_table("protocol_table", [str(name) for name in table.columns], table.astype(str).values.tolist())
    for figure in sorted((folder.path / "figures").glob("*.png")):
        tracker.log_image(figure.stem, figure)
    tracker.finish()
