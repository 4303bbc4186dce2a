"""What a study costs beside training: start, overhead per unit, and what a second worker brings.

    python tests/benchmarks/bench_study.py [--trials 4] [--study protocol3] [--set KEY=VALUE ...]

Runs the study twice in fresh folders, with one worker and with two (one thread each), confirmation left out. Times are
read from the files it writes: study.json (coordinator up), the first line of metrics.jsonl (first training step), and
each result.json, whose "seconds" are training and evaluation; what lies between two results of a worker and is not in
them is overhead. The first unit of a worker pays for its imports and is counted apart. Draw the stand-in before (any
study does): drawing is not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Measured:
    """Seconds of one study; see the module's docstring."""

    up: float
    first_step: float
    overhead: float
    unit: float
    units_per_hour: float


def measure(study: str, workers: int, trials: int, settings: Sequence[str]) -> Measured:
    """Run the study in a fresh folder."""
    with tempfile.TemporaryDirectory(prefix="lda-bench-") as output:
        folder = Path(output) / study
        command = [sys.executable, str(REPOSITORY / "sweeps" / "run.py"), "--study", study, "--output", output]
        command += ["--workers", str(workers), "--trials", str(trials), "--confirm-seeds", "0"]
        start = time.time()
        process = subprocess.Popen([*command, "--set", "log_every=1", *settings], stdout=subprocess.DEVNULL)
        up = first_step = 0.0
        while not first_step:
            assert process.poll() is None, "the study failed"
            if not up and (folder / "study.json").exists():
                up = time.time() - start
            if list(folder.glob("trial-*/*/metrics.jsonl")):
                first_step = time.time() - start
            time.sleep(0.02)
        assert process.wait() == 0, "the study failed"
        results = sorted(folder.glob("trial-*/*/result.json"), key=lambda path: path.stat().st_mtime)
        ends = [path.stat().st_mtime for path in results]
        seconds = [json.loads(path.read_text())["seconds"] for path in results]
    steady = ends[-1] - ends[workers - 1]
    wall = workers * steady / (len(ends) - workers)  # of a unit, once every worker has ended its first
    unit = statistics.fmean(seconds[workers:])
    return Measured(up, first_step, wall - unit, unit, 3600 * (len(ends) - workers) / steady)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="protocol3", help="name (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=4, help="per run (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every unit")
    given = parser.parse_args()
    if given.trials % 2:
        parser.error(f"--trials {given.trials}: expected an even number, or one of two workers idles through the last")
    measured = {workers: measure(given.study, workers, given.trials, given.set) for workers in (1, 2)}
    print("workers  coordinator up  first step  unit  overhead per unit  units per hour")
    for workers, m in measured.items():
        overhead = f"{m.overhead:.2f} s ({m.overhead / m.unit:.1%})"
        times = f"{m.up:>12.1f} s  {m.first_step:>8.1f} s  {m.unit:.1f} s  {overhead:>17}"
        print(f"{workers:>7}  {times}  {m.units_per_hour:.0f}")
    print(f"two workers: {measured[2].units_per_hour / measured[1].units_per_hour:.2f} times one")


if __name__ == "__main__":
    main()
