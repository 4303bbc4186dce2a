"""Run a study: python sweeps/run.py --study protocol3

The same command goes on with a study that was interrupted or killed. Exit codes: 0 done (a table or figure that could
not be made is a warning), 1 no trial is complete or the study cannot go on, 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lda.arguments import (
    HIGHEST_STUDY_SEED,
    Parser,
    checked,
    existing_folder,
    names,
    output_folder,
    path,
    text,
    whole,
)
from lda.command import exit_code, interruptible
from lda.config import PRESETS, check_files, parse_overrides
from lda.data.cache import check_cache
from lda.errors import UsageError
from lda.tracking import announcement, share_failure
from sweeps.list.addresses import VARIABLE, asked_for, cleaned, has_password, masked, storage_url
from sweeps.plan.preview import preview
from sweeps.plan.spec import MOST_SEEDS, MOST_TRIALS, StudySpec
from sweeps.plan.study_files import load, resolve, study_file, study_name, study_names

if TYPE_CHECKING:
    from lda.groups import Machine
    from sweeps.coordinator import Coordinator, Plan
    from sweeps.crew.slots import Slot
    from sweeps.gather import Gathered

# optuna (1 s) and the loaders are imported where they are needed, so that --help, --list and mistakes answer at once.


class StudyParser(Parser):
    """Repeats no password where it repeats what it does not understand."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        super().error(cleaned(message))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = StudyParser(
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
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="recipe of every run (default: real for real data, else the study's or standin)",
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
    parser.add_argument(
        "--allow-mixed-code",
        action="store_true",
        help="go on with a study that was begun with other code; its tables say so",
    )
    parser.add_argument("--join", action="store_true", help="add this machine's workers to a study that runs elsewhere")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    typed = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with interruptible() as told:
        return exit_code(lambda: _started(arguments, typed, told))


def _started(arguments: list[str], typed: bool, told: threading.Event) -> int:
    given = parser().parse_args(arguments)
    if given.list:
        _list()
        return 0
    if given.study is None:
        raise UsageError(f"--study NAME is missing; one of: {', '.join(study_names())}")
    if typed:
        _hide_password(arguments)
    return _run(given, arguments, told)


def _list() -> None:
    for name in study_names():
        spec = load(study_file(name))
        print(f"{name:12} {spec.title}\n{'':12} {spec.cost}")


def _hide_password(arguments: Sequence[str]) -> None:
    """A password on the command line is in every list of processes: start again with the URL in the environment."""
    kept, storages = split_storage(arguments)
    if not any(has_password(storage) for storage in storages):
        return
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]  # the script, or -m and the module
    environment = {**os.environ, VARIABLE: storages[-1]}
    os.execve(sys.executable, [sys.executable, *before, *kept], environment)


def split_storage(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(a command line without its --storage options, their values)."""
    kept: list[str] = []
    storages: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--storage":
            storages.append(next(rest, ""))
        elif argument.startswith("--storage="):
            storages.append(argument.removeprefix("--storage="))
        else:
            kept.append(argument)
    return kept, storages


def _run(given: argparse.Namespace, arguments: Sequence[str], told: threading.Event) -> int:
    file = study_file(given.study)
    name = study_name(file)
    folder = given.output / name
    if not given.status:
        checked("--output", output_folder, folder)
    url = storage_url(asked_for(given.storage), folder)
    if given.status:
        _status(name, url, folder)
        return 0
    check_cache()
    spec = _spec(given, file, url, folder)
    config = spec.config(spec.targets[0], spec.seed, {})
    check_files(config)
    slots = _slots(given.workers, config.machine)
    if given.dry_run:
        _check_dry(given, name, spec, folder, url)
        data = str(given.data_root) if given.data_root else f"stand-in domains, scale {spec.standin}"
        where = [("folder", str(folder)), ("storage", masked(url))]
        print(preview(name, spec, data, given.set, where))
        return 0
    plan = _plan(given, name, spec, folder, url, slots, arguments)
    return _coordinate(plan, given.set, told)


def _slots(workers: int | None, machine: Machine) -> tuple[Slot, ...]:
    from sweeps.crew.slots import plan_slots

    return tuple(plan_slots(workers, machine.threads, machine.device))


def _check_dry(given: argparse.Namespace, name: str, spec: StudySpec, folder: Path, url: str) -> None:
    """What a run finds out when it opens its data and its folder, so that a dry run refuses what a run would."""
    if given.data_root is not None:
        from sweeps.plan.images import prepare_data

        prepare_data(spec, given.data_root)
    if folder.exists():
        from sweeps.ownership import check_folder
        from sweeps.study_folder import StudyFolder

        check_folder(name, spec, StudyFolder(folder), url)


def _spec(given: argparse.Namespace, file: Path, url: str, folder: Path) -> StudySpec:
    if given.join:
        settled = {
            "--set": given.set,
            "--seed": given.seed is not None,
            "--trials": given.trials is not None,
            "--methods": given.methods,
            "--compute": given.compute,
            "--preset": given.preset,
        }
        if changed := [option for option, value in settled.items() if value]:
            raise UsageError(f"--join takes the study as it runs; leave out {' and '.join(changed)}")
        from sweeps.list.study import running_study

        return running_study(file.stem, url, folder).spec
    from lda.data.survey import is_standin

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
        preset=given.preset,
    )


def _status(name: str, url: str, folder: Path) -> None:
    from sweeps.gather import missing
    from sweeps.list.study import running_study
    from sweeps.study_folder import StudyFolder
    from sweeps.views.display import print_status
    from sweeps.views.snapshot import snapshot

    found = running_study(name, url, folder)
    now = snapshot(name, found.spec, StudyFolder(folder), found.budget, found.search, found.confirm)
    print_status(now, found.spec.grace_seconds)
    if absent := missing(found.spec, StudyFolder(folder.resolve()), [*found.search, *found.confirm]):
        print(f"{len(absent)} finished units are not in {folder}; the study's command copies them: {absent[0]}, ...")


def _plan(
    given: argparse.Namespace,
    name: str,
    spec: StudySpec,
    folder: Path,
    url: str,
    slots: tuple[Slot, ...],
    arguments: Sequence[str],
) -> Plan:
    from sweeps.coordinator import Plan
    from sweeps.plan.images import prepare_data
    from sweeps.study_folder import StudyFolder

    return Plan(
        study=name,
        spec=spec,
        folder=StudyFolder(folder.resolve()),
        data=prepare_data(spec, given.data_root),
        storage=url,
        slots=slots,
        command=_as_typed(arguments),
        mixed_code=given.allow_mixed_code,
    )


def _coordinate(plan: Plan, fixed: Sequence[str], told: threading.Event) -> int:
    """Run a study to its end. Returns the exit code."""
    from sweeps.coordinator import Coordinator

    _announce(plan, fixed)
    with contextlib.closing(Coordinator(plan)) as coordinator:
        if told.is_set():  # and what it raised was swallowed
            coordinator.stop.set()
        return _run_to_its_end(coordinator)


def _run_to_its_end(coordinator: Coordinator) -> int:
    """Run a study, and draw what it found. Returns the exit code."""
    from sweeps.finish import finish
    from sweeps.views.display import status_line

    plan, folder = coordinator.plan, coordinator.plan.folder
    finished = coordinator.run()
    if not finished:
        print(f"interrupted; everything finished is kept. Go on with:\n  {plan.command}", file=sys.stderr)
        return 130
    gathered = coordinator.gather()
    coordinator.explain()
    now = coordinator.look()
    complete = now.complete > 0 or (not now.budget and now.confirmed > len(now.failures))
    finish(plan.study, plan.spec, folder, plan.data.kind, complete=complete)
    for line in now.failures:
        print(f"given up: {line}", file=sys.stderr)
    _tell_gathered(gathered)
    print(f"{plan.study}: {status_line(now)}; {folder.path}")
    mostly_failed = 2 * len(now.failures) > now.complete + now.pruned + now.failed + now.confirmed
    if mostly_failed:
        print(f"most of it was given up ({len(now.failures)}); the table is of the rest", file=sys.stderr)
    return 0 if complete and not mostly_failed and not gathered.left else 1


def _tell_gathered(gathered: Gathered) -> None:
    """What is not here: results, which make the study unfinished on this machine, and checkpoints, which do not."""
    if gathered.left:
        units = ", ".join(map(str, gathered.left))
        print(f"{len(gathered.left)} finished units are not here and not in the storage: {units}", file=sys.stderr)
    for place, count in gathered.weights.items():
        print(f"checkpoints of {count} units lie on {place} only")


def _as_typed(arguments: Sequence[str]) -> str:
    """The command for a person to repeat, no password in it."""
    kept, storages = split_storage(arguments)
    if any(has_password(storage) for storage in storages):
        arguments = [*kept, f"--storage={masked(storages[-1])}"]
    inherited = None if storages else asked_for(None)
    before = f"{VARIABLE}={shlex.quote(masked(inherited))} " if inherited else ""
    return before + shlex.join(["python", "sweeps/run.py", *arguments])


def _announce(plan: Plan, fixed: Sequence[str]) -> None:
    where = f"{len(plan.slots)} worker{'s' if len(plan.slots) > 1 else ''} on {'GPU' if plan.slots[0].gpu else 'CPU'}"
    print(f"{plan.study}: {plan.spec.title} ({plan.data.kind} data, {where}, {plan.folder.path})", flush=True)
    for pair in fixed:
        print(f"fixed for every trial: {pair}", flush=True)
    config = plan.spec.config(plan.spec.targets[0], plan.spec.seed, {})
    print(announcement(config.machine.wandb, plan.folder.path), flush=True)
    share_failure()


if __name__ == "__main__":
    raise SystemExit(main())
