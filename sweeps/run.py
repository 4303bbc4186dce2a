"""Run a study: python sweeps/run.py --study protocol3

The same command goes on with a study that was interrupted or killed. Exit codes: 0 done (a table or figure that could
not be made is a warning), 1 no trial is complete or the study cannot go on, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lda.arguments import (
    HIGHEST_STUDY_SEED,
    Parser,
    checked,
    existing_folder,
    expanded,
    names,
    output_folder,
    path,
    text,
    whole,
)
from lda.command import exit_code
from lda.config import check_files, parse_overrides
from lda.data.cache import check_cache
from lda.errors import UsageError
from sweeps.list.storage import VARIABLE, has_password, masked, storage_url
from sweeps.plan.images import is_standin
from sweeps.plan.preview import preview
from sweeps.plan.spec import MOST_SEEDS, MOST_TRIALS, StudySpec, from_flat
from sweeps.plan.study_files import load, resolve, study_file, study_name, study_names

if TYPE_CHECKING:
    from lda.groups import Machine
    from sweeps.coordinator import Plan
    from sweeps.crew.slots import Slot

# optuna (1 s) and the loaders are imported where they are needed, so that --help, --list and mistakes answer at once.


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="sweeps/run.py",
        description="Run a study. The same command goes on with one that was interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--study", type=text, help="a study's name (see --list), or a YAML file", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the studies with their cost")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--status", action="store_true", help="print how the study stands, from any shell or machine")
    parser.add_argument(
        "--data-root",
        type=existing_folder,
        metavar="DIR",
        help="the real data sets (default: the stand-in)",
    )
    parser.add_argument(
        "--output",
        type=path,
        default=Path("runs"),
        metavar="DIR",
        help="parent of the study's folder (default: runs)",
    )
    parser.add_argument(
        "--trials", type=whole(0, MOST_TRIALS), metavar="N", help="configurations to try (default: the study's)"
    )
    parser.add_argument(
        "--methods", type=names, metavar="A,B", help="of a study that compares methods, these (default: all it has)"
    )
    parser.add_argument(
        "--compute",
        choices=("steps", "passes"),
        help="what epochs x steps_per_epoch count: steps, or passes through the plain network (default: the study's)",
    )
    parser.add_argument("--seed", type=whole(0, HIGHEST_STUDY_SEED), metavar="N", help="seed (default: the study's)")
    parser.add_argument(
        "--confirm-seeds",
        type=whole(0, MOST_SEEDS),
        metavar="N",
        help="fresh seeds of the confirmation, 0: none (default: the study's)",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, 10**6),
        metavar="N",
        help="worker processes (default: one per GPU, else per core)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of lda/config.py for every trial; a swept one is fixed instead",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help=f"postgresql://..., journal[:PATH] or sqlite:///... (default: {VARIABLE}, else sqlite in the folder)",
    )
    parser.add_argument("--join", action="store_true", help="add this machine's workers to a study that runs elsewhere")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(lambda: _started(arguments))


def _started(arguments: list[str]) -> int:
    given = parser().parse_args(arguments)
    if given.list:
        _list()
        return 0
    if given.study is None:
        raise UsageError(f"--study NAME is missing; one of: {', '.join(study_names())}")
    _hide_password(given, arguments)
    return _run(given, arguments)


def _list() -> None:
    for name in study_names():
        spec = load(study_file(name))
        print(f"{name:12} {spec.title}\n{'':12} {spec.cost}")


def _hide_password(given: argparse.Namespace, arguments: list[str]) -> None:
    """A password on the command line is in every list of processes: start again with the URL in the environment."""
    if given.storage is None or not has_password(given.storage):
        return
    kept = [argument for argument in arguments if given.storage not in argument or argument == "--storage"]
    if "--storage" in kept:
        kept.remove("--storage")
    environment = {**os.environ, VARIABLE: given.storage}
    os.execve(sys.executable, [sys.executable, sys.argv[0], *kept], environment)


def _run(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    file = study_file(given.study)
    name = study_name(file)
    folder = given.output / name
    if not given.status:
        checked("--output", output_folder, folder)
    url = storage_url(_requested(given), folder)
    if given.status:
        _status(name, url, folder)
        return 0
    check_cache()
    spec = _spec(given, file, url, folder)
    config = spec.config(spec.targets[0], spec.seed, {})
    check_files(config)
    slots = _slots(given.workers, config.machine)
    if given.dry_run:
        _check_dry(given, name, spec, folder)
        data = str(given.data_root) if given.data_root else f"stand-in domains, scale {spec.standin}"
        where = [("folder", str(folder)), ("storage", masked(url))]
        print(preview(name, spec, data, given.set, where))
        return 0
    return _coordinate(given, name, spec, folder, url, slots, arguments)


def _requested(given: argparse.Namespace) -> str | None:
    """The storage that is asked for, its `~` expanded; None where none is."""
    option, variable = given.storage, os.environ.get(VARIABLE)
    what, url = (VARIABLE, variable) if option is None else ("--storage", option)
    return checked(what, expanded, url) if url else url


def _slots(workers: int | None, machine: Machine) -> tuple[Slot, ...]:
    from sweeps.crew.slots import plan_slots

    return tuple(plan_slots(workers, machine.threads, machine.device))


def _check_dry(given: argparse.Namespace, name: str, spec: StudySpec, folder: Path) -> None:
    """What a run finds out when it opens its data and its folder, so that a dry run refuses what a run would."""
    if given.data_root is not None:
        from sweeps.plan.images import prepare_data

        prepare_data(spec, given.data_root)
    from sweeps.study_folder import StudyFolder

    if (before := StudyFolder(folder).read_study()) is not None:
        from sweeps.list.study import check_same

        check_same(name, from_flat(before), spec)


def _spec(given: argparse.Namespace, file: Path, url: str, folder: Path) -> StudySpec:
    if given.join:
        settled = {
            "--set": given.set,
            "--seed": given.seed is not None,
            "--trials": given.trials is not None,
            "--methods": given.methods,
            "--compute": given.compute,
        }
        if changed := [option for option, value in settled.items() if value]:
            raise UsageError(f"--join takes the study as it runs; leave out {' and '.join(changed)}")
        from sweeps.list.study import running_study

        return running_study(file.stem, url, folder).spec
    return resolve(
        load(file),
        file,
        real_data=not is_standin(given.data_root),
        overrides=parse_overrides(given.set),
        seed=given.seed,
        trials=given.trials,
        confirm_seeds=given.confirm_seeds,
        compare=given.methods,
        compute=given.compute,
    )


def _status(name: str, url: str, folder: Path) -> None:
    from sweeps.list.study import running_study
    from sweeps.study_folder import StudyFolder
    from sweeps.views.display import print_status
    from sweeps.views.snapshot import snapshot

    found = running_study(name, url, folder)
    now = snapshot(name, found.spec, StudyFolder(folder), found.budget, found.search, found.confirm)
    print_status(now, found.spec.grace_seconds)


def _coordinate(
    given: argparse.Namespace,
    name: str,
    spec: StudySpec,
    folder: Path,
    url: str,
    slots: tuple[Slot, ...],
    arguments: Sequence[str],
) -> int:
    from sweeps.coordinator import Coordinator, Plan
    from sweeps.finish import finish
    from sweeps.plan.images import prepare_data
    from sweeps.study_folder import StudyFolder
    from sweeps.views.display import status_line

    plan = Plan(
        study=name,
        spec=spec,
        folder=StudyFolder(folder.resolve()),
        data=prepare_data(spec, given.data_root),
        storage=url,
        slots=slots,
        command=_as_typed(given, arguments),
    )
    _announce(plan, given.set)
    coordinator = Coordinator(plan)
    finished = coordinator.run()
    if not finished:
        print(f"interrupted; everything finished is kept. Go on with:\n  {plan.command}", file=sys.stderr)
        return 130
    now = coordinator.look()
    complete = now.complete > 0 or (not now.budget and now.confirmed > len(now.failures))
    finish(name, spec, plan.folder, plan.data.kind, complete=complete)
    for line in now.failures:
        print(f"given up: {line}", file=sys.stderr)
    print(f"{name}: {status_line(now)}; {folder}")
    return 0 if complete else 1


def _as_typed(given: argparse.Namespace, arguments: Sequence[str]) -> str:
    """The command for a person to repeat, no password in it."""
    shown = os.environ.get(VARIABLE) if given.storage is None else None
    return (f"{VARIABLE}={masked(shown)} " if shown else "") + shlex.join(["python", "sweeps/run.py", *arguments])


def _announce(plan: Plan, fixed: Sequence[str]) -> None:
    where = f"{len(plan.slots)} worker{'s' if len(plan.slots) > 1 else ''} on {'GPU' if plan.slots[0].gpu else 'CPU'}"
    print(f"{plan.study}: {plan.spec.title} ({plan.data.kind} data, {where}, {plan.folder.path})", flush=True)
    for pair in fixed:
        print(f"fixed for every trial: {pair}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
