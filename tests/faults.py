"""What a study survives: real studies on the tiny stand-in with faults injected, and what each cost.

    python tests/faults.py [--fault NAME ...] [--kills N] [--output reports/faults.md]

Every fault runs a study of real training to its end. A watcher notes when each unit's result.json appears and whether
it ever changes or vanishes afterwards; metrics.jsonl must hold every step exactly once; the study's storage is read at
the end; every result is compared, to the last digit, with that of the same unit run undisturbed, and every machine's
table with the others'. tests/test_faults.py asserts the same. The faults are in the fault_*.py files beside this one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import fault_data
import fault_disk
import fault_processes
import fault_storage
import fault_wandb
import optuna
from fault_arena import FAULTS, RETRIES, Arena, Play, Skip
from optuna.trial import TrialState
from studies import Command, kill_all

from analysis import report as report_page
from analysis import tables
from lda.config import from_mapping
from lda.files import read_json
from lda.runs import Result, environment, read_unit
from lda.unit import run_unit
from sweeps.list.addresses import storage_url
from sweeps.list.attempts import Configuration, configurations, fault
from sweeps.list.storage import opened

__all__ = ["FAULTS", "Skip", "fault_data", "fault_disk", "fault_processes", "fault_storage", "fault_wandb"]

_COMPARED = 10  # units of a study whose results are compared with undisturbed ones


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        injected: how often the fault struck.
        lost: finished units whose result vanished.
        twice: finished units whose result was written again, or whose metrics hold a step twice.
        running: trials left RUNNING in the storage.
        different: units whose result is not that of an undisturbed run (of ten drawn at random where there are more),
            and machines whose table is not that of the first or whose report page cannot be made.
        finished: whether every configuration ended and the last command exited as it should.
        failed: configurations given up, each with a reason.
        retried: attempts beyond the first of a configuration.
    """

    fault: str
    injected: int
    lost: int
    twice: int
    running: int
    different: int
    finished: bool
    failed: int
    retried: int
    seconds: float

    @property
    def wrong(self) -> bool:
        """Whether something was lost, done twice, left over, or came out differently."""
        return bool(self.lost or self.twice or self.running or self.different) or not self.finished


class Watch:
    """Notes every change of every finished unit 20 times a second."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, bytes] = {}
        self.twice: set[Path] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._done.wait(0.05):
            self._look()

    def _look(self) -> None:
        for path in self._folder.glob("*/runs/mine/trial-*/*/result.json"):
            with suppress(
                OSError, ValueError
            ):  # damaged by the fault itself, or removed; a copy that comes back is equal
                now = path.read_bytes()
                json.loads(now)
                if self._seen.setdefault(path, now) != now:
                    self.twice.add(path)

    @property
    def lost(self) -> set[Path]:
        """Results that were there once."""
        return {path for path in self._seen if not path.exists()}


# --- what came of it -------------------------------------------------------------------------------------------------


def strike(name: str, folder: Path, data_root: Path, play: Callable[[Arena], Play] | None = None) -> Outcome:
    """Run one fault in an empty folder. Raises Skip where this machine cannot."""
    began = time.monotonic()
    with ExitStack() as stack:
        stack.callback(kill_all)  # what a row that broke off has left
        arena = Arena(folder, data_root, stack)
        with Watch(folder) as watch:
            injected, commands, code = (play or FAULTS[name])(arena)
        known = _configurations(arena, commands[0])
        ended = all(configuration.ended(RETRIES) for configuration in known)
        given_up = [configuration for configuration in known if configuration.given_up(RETRIES)]
        assert all(fault(configuration.last)[1] for configuration in given_up)
        return Outcome(
            fault=name,
            injected=injected,
            lost=len(watch.lost),
            twice=len(watch.twice | {path for command in commands for path in _repeated(command.study)}),
            different=_different(commands, data_root, folder),
            running=sum(a.state == TrialState.RUNNING for configuration in known for a in configuration.attempts),
            finished=ended and code == 0,
            failed=len(given_up),
            retried=sum(len(configuration.attempts) - 1 for configuration in known),
            seconds=time.monotonic() - began,
        )


def _configurations(arena: Arena, command: Command) -> list[Configuration]:
    with opened(storage_url(arena.url, command.study)) as storage:
        return [
            configuration
            for name in optuna.study.get_all_study_names(storage)
            for configuration in configurations(optuna.load_study(study_name=name, storage=storage).get_trials())
        ]


def _repeated(study: Path) -> set[Path]:
    """Finished units whose metrics do not hold every step exactly once."""
    wrong = set()
    for result in study.glob("trial-*/*/result.json"):
        rows = [json.loads(line) for line in (result.parent / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "lr" in row]
        if steps != list(range(1, read_json(result)["steps"] + 1)):
            wrong.add(result)
    return wrong


# --- beside an undisturbed study -------------------------------------------------------------------------------------

_UNDISTURBED: dict[str, Result] = {}
"""Unit hash -> its result, run once in a folder of its own."""


def _different(commands: Sequence[Command], data_root: Path, scratch: Path) -> int:
    """See `Outcome.different`."""
    studies = [command.study for command in commands if (command.study / "study.json").exists()]
    results = sorted(result.parent for study in studies for result in study.glob("trial-*/*/result.json"))
    drawn = random.Random(0).sample(results, min(len(results), _COMPARED))
    wrong = sum(_measured(Result.read(unit)) != _measured(_undisturbed(unit, data_root, scratch)) for unit in drawn)
    found = [_table(study) for study in studies]
    wrong += sum(table != found[0] for table in found[1:])
    return wrong + sum(not _report_made(study) for study in studies)


def _undisturbed(unit: Path, data_root: Path, scratch: Path) -> Result:
    known = read_unit(unit)
    if known.unit not in _UNDISTURBED:
        config = from_mapping({**known.settings, "wandb": "disabled"})
        _UNDISTURBED[known.unit] = run_unit(config, scratch / "undisturbed" / known.unit, data_root=data_root)
    return _UNDISTURBED[known.unit]


def _measured(result: Result) -> dict[str, Any]:
    """What a result says of the method, not of the machine."""
    return {**vars(result), "seconds": 0, "images_per_second": 0, "trained_in": ""}


def _table(study: Path) -> str:
    """The study's table; empty where nothing is complete."""
    output = study.parent / f"{study.name}-table.csv"
    output.unlink(missing_ok=True)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        tables.main([str(study), "--format", "csv", "--output", str(output)])
    return output.read_text() if output.exists() else ""


def _report_made(study: Path) -> bool:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return report_page.main([str(study), "--output", str(study.parent / f"{study.name}-report")]) == 0


# --- the table -------------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome], other: dict[str, str]) -> str:
    """Markdown; `other` says why a row has no numbers."""
    lines = [
        "| fault | injected | finished units lost | run twice | trials left RUNNING | different from undisturbed "
        "| study finished | configurations given up | retries | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        cells = [
            o.injected,
            o.lost,
            o.twice,
            o.running,
            o.different,
            "yes" if o.finished else "NO",
            o.failed,
            o.retried,
            f"{o.seconds:.0f}",
        ]
        lines.append(f"| {o.fault} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines + [f"| {name} | {reason} |" for name, reason in other.items()]) + "\n"


_REPORT = """# What a study survives

Every row is a study of real training (tiny stand-in, the small network) into which a fault was injected, run to its end
by the commands a user would type. Regenerate, as root on Linux with PostgreSQL installed:

```bash
{command}
```

Injected: how often the fault struck. Lost: finished units whose result vanished. Run twice: finished units whose result
was written again, or whose metrics hold a step twice. Left RUNNING: trials in the storage after the end. Different:
results that are not those of the same unit run undisturbed (of ten units where there are more; all digits, and as many
threads), machines whose table is not the first one's, report pages that could not be made. Given up:
configurations that failed for good, each with its reason: a unit that raises and a loss that is NaN are configurations
that cannot succeed, and random kills may strike the workers of one configuration three times. Retries: attempts beyond
the first.

{table}
Run on {date}, commit {commit}, {cores} CPU cores, optuna {optuna}, torch {torch}; the random kills draw their times and
victims (a worker, the coordinator, everything) from the seed.
"""


def report(text: str) -> str:
    """The kept page around the table."""
    machine = environment("cpu")
    versions = machine["versions"]
    command = shlex.join(["python", *sys.argv])
    facts = {"commit": machine["commit"][:7], "optuna": versions["optuna"], "torch": versions["torch"]}
    return _REPORT.format(command=command, table=text, date=f"{date.today()}", cores=os.cpu_count(), **facts)


def main() -> int:
    """Run faults and write the table. Returns the exit code: 1 where a row is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fault", nargs="+", default=list(FAULTS), choices=list(FAULTS), metavar="NAME")
    parser.add_argument("--kills", type=int, default=0, help="also so many random kills of one study")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    parser.add_argument("--output", type=Path, help="file of the table (default: print it)")
    given = parser.parse_args()
    plays = {name: FAULTS[name] for name in given.fault}
    if given.kills:
        plays[f"{given.kills} random kills, seed {given.seed}"] = lambda arena: fault_processes.random_kills(
            arena, given.kills, given.seed
        )
    outcomes: list[Outcome] = []
    other: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="lda-faults-") as scratch:
        os.environ["LDA_CACHE_DIR"] = str(Path(scratch) / "cache")
        from lda.data.standin.tree import generate

        generate(Path(scratch) / "standin", "tiny", processes=1)
        for index, (name, play) in enumerate(plays.items()):
            folder = Path(scratch) / str(index)
            folder.mkdir()
            try:
                outcomes.append(strike(name, folder, Path(scratch) / "standin", play))
                print(table(outcomes[-1:], {}).splitlines()[-1], flush=True)
            except Skip as reason:
                other[name] = f"not run: {reason}"
            except Exception as error:  # a row of its own: the other faults are worth their hour
                traceback.print_exc()
                other[name] = f"BROKEN OFF: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            text = table(outcomes, other)
            if given.output:
                given.output.write_text(report(text))
    print(text)
    broken = [name for name, why in other.items() if why.startswith("BROKEN")]
    return int(bool(broken) or any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
