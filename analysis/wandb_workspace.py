"""A saved view on W&B with the panels that a study asks for.

    python analysis/wandb_workspace.py --entity TEAM --study protocol3

Needs an account (`wandb login`) and the package wandb-workspaces (`pip install "lda-reid[workspace]"`). Without an
account the same numbers are in the report (analysis/report.py), and `wandb leet` shows offline runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lda.arguments import Parser, text
from lda.command import exit_code
from lda.errors import FailedError, UsageError
from lda.tracking.modes import decide

PANELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Unseen target": (("test/mAP", "test/rank1", "test/mINP"), ()),
    "Selection": (("val/score",), ("val/mAP",)),
    "Losses": ((), ("loss/total", "loss/id_e", "loss/id_a", "loss/consistency", "loss/alignment")),
    "How hard the latent losses pull": ((), ("gradient/consistency", "gradient/alignment")),
    "Features": (("feature/effective_rank",), ("feature/norm", "feature/sigma", "feature/effective_rank")),
    "Speed": ((), ("images_per_second", "lr")),
}
"""Section -> (metrics of a run's end, drawn as bars; metrics over training, drawn as lines); see reports/numbers.md."""

BANK = ("Buffer Bank", "^bank/.*")
"""The section of the distances between domains, whose names depend on the sources."""


def workspace(entity: str, project: str, name: str) -> Any:
    """The view, not saved yet. Raises UsageError where wandb-workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as views
    except ImportError as error:
        raise UsageError(f'{error}; install it by: pip install "lda-reid[workspace]"') from None
    sections = [
        views.Section(
            name=section,
            panels=[
                *(panels.BarPlot(title=metric, metrics=[metric]) for metric in ends),
                *(panels.LinePlot(title=metric, x="step", y=[metric]) for metric in curves),
            ],
            is_open=section != "Speed",
        )
        for section, (ends, curves) in PANELS.items()
    ]
    title, names = BANK
    sections.append(views.Section(name=title, panels=[panels.LinePlot(title=title, x="step", metric_regex=names)]))
    return views.Workspace(entity=entity, project=project, name=name, sections=sections)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/wandb_workspace.py`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _save(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python analysis/wandb_workspace.py", description="Save a view of a study's runs on W&B.")
    parser.add_argument("--entity", type=text, required=True, help="user or team on W&B")
    parser.add_argument("--project", type=text, default="lda-reid", help="project of the runs (default: %(default)s)")
    parser.add_argument("--study", type=text, default="LDA", help="name of the view (default: %(default)s)")
    return parser.parse_args(arguments)


def _save(options: argparse.Namespace) -> None:
    decision = decide("auto")
    if decision.mode != "online":
        raise UsageError(
            f"W&B would log {decision.mode} here ({decision.reason}), and a view is saved on its server: `wandb login` "
            "first. Without an account: python analysis/report.py STUDY, or wandb leet STUDY/wandb"
        )
    view = workspace(options.entity, options.project, options.study)
    try:
        view.save()
    except Exception as error:  # whatever the package, wandb or the network raise
        raise FailedError(f"the view was not saved: {type(error).__name__}: {error}") from None
    print(view.url)


if __name__ == "__main__":
    sys.exit(main())
