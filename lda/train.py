"""`python -m lda.train`: one run of one configuration, without a study."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lda import config as configs
from lda import methods, protocols
from lda.arguments import HIGHEST_SEED, Parser, checked, existing_folder, output_folder, whole
from lda.command import exit_code, interruptible, openmp_threads
from lda.data.cache import check_cache
from lda.errors import UsageError
from lda.protocols import get_protocol
from lda.runs import UnitFolder, print_method


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.train",
        description="Train on a protocol's source domains, select on held-out source identities, test on the target.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--protocol", default="protocol3", help=", ".join(protocols.names()))
    parser.add_argument("--target", default="market1501", help="the unseen target domain")
    parser.add_argument("--data-root", type=existing_folder, help="folder with the data sets; without it, the stand-in")
    parser.add_argument("--preset", help="standin or real (default: as the images are)")
    parser.add_argument(
        "--seed", type=whole(0, HIGHEST_SEED), default=0, help="seed of weights, batches and augmentation"
    )
    parser.add_argument(
        "--output", type=output_folder, help="run folder (default: runs/train/<protocol>-<target>-<method>-s<seed>)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f"settings, see lda/config.py; method: {', '.join(methods.names())}",
    )
    options = parser.parse_args(arguments)
    openmp_threads()
    check_cache()
    return options


def resolve(options: argparse.Namespace) -> configs.Config:
    """The configuration of a command line. Raises UsageError."""
    changes = configs.parse_overrides(options.set)
    for key in ("protocol", "target", "seed"):
        given = getattr(options, key)
        if changes.setdefault(key, given) != given != configs.COMMON[key].default:
            raise UsageError(f"--{key} {given} and --set {key}={changes[key]}: keep one of the two")
    get_protocol(changes["protocol"]).sources(changes["target"])
    return configs.preset(options.preset or _preset(options.data_root), **changes)


def _preset(data_root: Path | None) -> str:
    from lda.data.survey import is_standin  # numpy and Pillow: --help answers without them

    return "standin" if is_standin(data_root) else "real"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.train`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    with interruptible() as told:
        return exit_code(lambda: _run(parse_arguments(arguments), told))


def _run(options: argparse.Namespace, told: threading.Event) -> int:
    config = resolve(options)
    name = f"{config.run.protocol}-{config.run.target}-{config.method.name}-s{config.run.seed}"
    configs.check_files(config)
    folder = checked("--output", output_folder, options.output or Path("runs", "train", name))
    from lda.unit import Progress as UnitProgress  # torchvision takes seconds: bad usage is told before
    from lda.unit import run_unit

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"{config.method.name} -> {config.run.target}", total=config.schedule.total_steps)

        def show(progress: UnitProgress) -> None:
            bar.update(task, completed=progress.step)
            if progress.score is not None:
                bar.console.print(f"epoch {progress.epoch}: selection score {100 * progress.score:.1f}")

        def check() -> None:
            if told.is_set():  # and what it raised was swallowed
                raise KeyboardInterrupt

        try:
            result = run_unit(config, folder, data_root=options.data_root, on_progress=show, check=check)
        except KeyboardInterrupt:
            print(f"interrupted; {_how_it_goes_on(folder)}", file=sys.stderr)
            return 130
    name = print_method(result.title, result.reconstructed, result.target_data)
    pairs = f"{result.cost.pair_cost:,} multiply-adds a pair" if result.cost.pair_cost else ""
    reranked = result.reranking if result.reranking != "none" else ""
    marks = (result.data, result.inference, pairs, reranked, f"{result.average_precision} AP")
    conditions = ", ".join(filter(None, marks))
    print(
        f"{name} on {result.target} ({conditions}): mAP {100 * result.mAP:.1f}, "
        f"Rank-1 {100 * result.rank1:.1f}; {result.selection.rule} {100 * result.selection.score:.1f}; {folder}"
    )
    return 0


def _how_it_goes_on(folder: Path) -> str:
    from lda.checkpoint import read_checkpoint

    path = UnitFolder(folder).checkpoint
    try:
        saved = read_checkpoint(path)
    except (UsageError, OSError):
        return "nothing is kept yet: the same command starts anew"
    return f"the same command goes on from step {saved.step} of {saved.config.schedule.total_steps} ({path})"


if __name__ == "__main__":
    sys.exit(main())
