"""Does a worker that runs for days grow? Many units in one worker process, logged to W&B offline, measured as it goes.

    python tests/soak.py [--units 200] [--output reports/soak.md]

A real study on the tiny stand-in by the ordinary command. After every tenth of the units, and before the last: open
files, threads and resident memory of the coordinator, the worker, and what the worker has started (the process that
imports wandb, and wandb's own service), from /proc. Exits with 1 where the worker was replaced, or the study did not
end well.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path

from studies import Command, children_of, wait_for

from lda.files import atomic
from lda.runs import environment

TARGETS = ("cuhk03", "market1501")
_ROWS = 10
_PATIENCE = 1800.0
_WHAT = ("open files", "threads", "MiB")


def measured(pid: int) -> tuple[int, int, int]:
    """Open files, threads, and resident MiB of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return files, int(status["Threads"]), round(int(status["VmRSS"].split()[0]) / 1024)


def processes(coordinator: int, worker: int) -> dict[str, int]:
    """Name in the table -> process."""
    found = {"coordinator": coordinator, "worker": worker}
    for pid, command in children_of(worker):
        if "lda.tracking.child" in command:
            found["W&B's process"] = pid
        elif "wandb-core" in command:
            found["W&B's service"] = pid
    return found


def soak(folder: Path, units: int) -> list[tuple[int, dict[str, tuple[int, int, int]]]]:
    """Run the study. Returns (units finished, what each process held) at every look."""
    from lda.data.standin.tree import generate

    generate(folder / "standin", "tiny", processes=1)
    trials = {"sampler": "random", "trials": units // len(TARGETS)}
    command = Command(folder, folder / "standin", search=trials, base={"wandb": "offline"})
    process = command.start()
    looks = []
    wait_for(lambda: len(command.workers()) == 1, process=process)
    (worker,) = command.workers()
    for due in [1, *(units * row // _ROWS for row in range(1, _ROWS)), units - 1]:
        wait_for(lambda due=due: len(command.results()) >= due, _PATIENCE, process)  # type: ignore[misc]
        assert command.workers() == [worker], f"the worker was replaced before unit {due}: {command.events()[-3:]}"
        found = {name: measured(pid) for name, pid in processes(process.pid, worker).items()}
        looks.append((len(command.results()), found))
        print(looks[-1], flush=True)
    assert process.wait(_PATIENCE) == 0, command.output
    assert len(command.results()) == units, len(command.results())
    assert not [event for event in command.events() if "again" in event]
    return looks


def table(looks: list[tuple[int, dict[str, tuple[int, int, int]]]]) -> str:
    """Markdown."""
    names = list(looks[-1][1])
    heads = [f"{name}: {what}" for name in names for what in _WHAT]
    lines = [f"| units finished | {' | '.join(heads)} |", "|" + "---:|" * (len(heads) + 1)]
    for units, found in looks:
        cells = [str(value) for name in names for value in found.get(name, ("", "", ""))]
        lines.append(f"| {units} | {' | '.join(cells)} |")
    return "\n".join(lines)


_REPORT = """# Does a worker grow?

{units} units of real training (tiny stand-in, small network, four steps each) in one worker process, each a W&B run
logged offline. Regenerate:

```bash
{command}
```

MiB are resident. The first units warm up: libraries are read, pools are filled. The coordinator reads the whole list
of trials at every upkeep.

{table}

Run on {date}, commit {commit}, {cores} CPU cores, torch {torch}, wandb {wandb}.
"""


def main() -> int:
    """Run the study and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--units", type=int, default=200, help="even, 20 at least")
    parser.add_argument("--output", type=Path, help="file of the table (default: print it)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lda-soak-") as scratch:
        os.environ["LDA_CACHE_DIR"] = str(Path(scratch) / "cache")
        looks = soak(Path(scratch), given.units)
    text = table(looks)
    print(text)
    if given.output:
        machine = environment("cpu")
        versions = machine["versions"]
        facts = {"commit": machine["commit"][:7], "torch": versions["torch"], "wandb": versions["wandb"]}
        command = shlex.join(["python", *sys.argv])
        with atomic(given.output) as file:
            cores = os.cpu_count()
            file.write(
                _REPORT.format(units=given.units, command=command, table=text, date=date.today(), cores=cores, **facts)
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
