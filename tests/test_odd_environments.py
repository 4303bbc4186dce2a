"""Every command under odd environments and arguments: it works or refuses in one line, and creates nothing then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# Each is cheap and ends without training: what is asked is what stands before the work.
COMMANDS: dict[str, list[str]] = {
    "list": ["sweeps/run.py", "--list"],
    "dry run": ["sweeps/run.py", "--study", "smoke", "--dry-run"],
    "status": ["sweeps/run.py", "--study", "smoke", "--status"],
    "carry": ["-m", "sweeps.carry", "export", ".", "x.tar.gz"],
    "slurm": ["-m", "sweeps.slurm", "--cluster", "local", "--", "--list"],
    "train": ["-m", "lda.train", "--set", "method=metabim"],
    "evaluate": ["-m", "lda.evaluate", "--checkpoint", "none.pt", "--target", "prid"],
    "step cost": ["-m", "lda.step_cost", "--methods", "metabim"],
    "standin": ["-m", "lda.data.standin", "--scale", "tinny", "--output", "s"],
    "doctor": ["-m", "lda.data.doctor", "--data-root", "nowhere"],
    "person search": ["-m", "lda.data.person_search", "--input", "nowhere", "--output", "there"],
    "tables": ["analysis/tables.py", "nowhere"],
    "buffer bank": ["analysis/buffer_bank.py", "nowhere"],
    "report": ["analysis/report.py", "nowhere"],
}
WORKING = {"list": 0, "dry run": 0}
"""Those that have something to do; the others are asked for what is not there: exit 2."""

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a locale that is not installed": {"LC_ALL": "xx_YY.UTF-8", "LANG": "xx_YY.UTF-8"},
    "nested threads": {"OMP_NUM_THREADS": "4,2"},
    "a notebook's backend": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "GPUs that are not there": {"CUDA_VISIBLE_DEVICES": "0,1,2,3"},
    "no storage": {"LDA_STORAGE": ""},
    "a dumb terminal": {"TERM": "dumb", "COLUMNS": "1"},
    "a time zone that is none": {"TZ": "Nowhere/Land"},
    "no temporary folder": {"TMPDIR": "/nowhere/at/all"},
    "strict": {"PYTHONWARNINGS": "error::UserWarning", "PYTHONHASHSEED": "0"},
    "a home that is not there": {"HOME": "/nowhere/at/all"},
}


def run(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None, shell: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project in a folder; `shell` runs before it, as umask or cd."""
    program = [str(REPOSITORY / part) if part.endswith(".py") else part for part in command]
    arguments = [sys.executable, *program]
    if shell:
        arguments = ["sh", "-c", f'{shell}; exec "$@"', "sh", *arguments]
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        arguments,
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": paths, **(environment or {})},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=240,
    )


def refused(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """The line of a command that refuses; it must have created nothing."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert list(folder.iterdir()) == [], sorted(folder.iterdir())
    return lines[0]


def check(command: str, environment: Mapping[str, str], folder: Path) -> None:
    done = run(COMMANDS[command], folder, environment)
    if command in WORKING:
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout
        assert list(folder.iterdir()) == []
    else:
        refused(done, folder)


@pytest.mark.parametrize("environment", list(ENVIRONMENTS))
def test_a_dry_run_stands_any_environment(environment: str, tmp_path: Path) -> None:
    check("dry run", ENVIRONMENTS[environment], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("environment", ["", *ENVIRONMENTS])
def test_every_command_stands_any_environment(command: str, environment: str, tmp_path: Path) -> None:
    check(command, ENVIRONMENTS.get(environment, {}), tmp_path)


SHELLS = {
    "a umask that takes everything": ("umask 0777", "umask"),
    "a folder that is gone": ("mkdir gone && cd gone && rmdir ../gone", "does not exist any more"),
}


@pytest.mark.parametrize("shell", list(SHELLS))
@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[] if name == "list" else pytest.mark.slow) for name in COMMANDS]
)
def test_places_in_which_nothing_works_are_told(command: str, shell: str, tmp_path: Path) -> None:
    before, told = SHELLS[shell]
    assert told in refused(run(COMMANDS[command], tmp_path, shell=before), tmp_path)


STUDY = ["sweeps/run.py", "--study", "smoke", "--dry-run"]

MISTAKES: dict[str, tuple[list[str], dict[str, str], str]] = {
    "a seed beyond all": ([*STUDY, "--seed", str(2**30)], {}, "--seed: expected a whole number from 0 to 1073741823"),
    "as a setting": ([*STUDY, "--set", f"seed={2**40}"], {}, "seed"),
    "of a run": (["-m", "lda.train", "--seed", str(2**31)], {}, "--seed: expected a whole number"),
    "negative": (["-m", "lda.data.standin", "--output", "s", "--seed", "-1"], {}, "--seed"),
    "trials": ([*STUDY, "--trials", "1000000000000"], {}, "--trials: expected a whole number"),
    "workers": ([*STUDY, "--workers", "0"], {}, "--workers: expected a whole number from 1"),
    "an output that is a file": ([*STUDY, "--output", sys.executable], {}, "is a file, expected a folder"),
    "one below a file": ([*STUDY, "--output", f"{sys.executable}/x"], {}, "is a file, expected a folder"),
    "an empty path": ([*STUDY, "--output", ""], {}, "--output: expected a path, got an empty one"),
    "a path beyond all": ([*STUDY, "--output", "x" * 300], {}, "too long"),
    "a user who is not there": ([*STUDY, "--output", "~nobody-here/x"], {}, "no home folder is known by that name"),
    "a name that is a path": ([*STUDY[:2], "../../etc/passwd", "--dry-run"], {}, "--study"),
    "a study that is none": ([*STUDY[:2], "smoek", "--dry-run"], {}, "did you mean 'smoke'?"),
    "an option that is none": ([*STUDY, "--ouput", "x"], {}, "did you mean '--output'?"),
    "an empty setting": ([*STUDY, "--set", ""], {}, "KEY=VALUE"),
    "postgresql without address": ([*STUDY, "--storage", "postgresql"], {}, "--storage"),
    "sqlite in memory": ([*STUDY, "--storage", "sqlite://"], {}, "--storage"),
    "another database": ([*STUDY, "--storage", "mysql://u@h/d"], {}, "--storage"),
    "a variable that is none": (STUDY, {"LDA_STORAGE": "postgresql"}, "postgresql"),
    "threads that are none": (["-m", "lda.train"], {"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS: expected"),
    "methods that are nowhere": (STUDY, {"LDA_METHODS": "/nowhere"}, "LDA_METHODS: '/nowhere' is not a folder"),
    "a cache that is a file": (["-m", "lda.train"], {"LDA_CACHE_DIR": sys.executable}, "LDA_CACHE_DIR"),
    "a data root that is not there": ([*STUDY, "--data-root", "~/nowhere"], {}, "there is no such folder"),
    "a file for a folder": (["analysis/tables.py", sys.executable], {}, "is a file, expected a folder"),
    "a folder for a file": (["-m", "lda.evaluate", "--checkpoint", "/", "--target", "prid"], {}, "is a folder"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_every_mistake_gets_one_line(mistake: str, tmp_path: Path) -> None:
    command, environment, told = MISTAKES[mistake]
    assert told in refused(run(command, tmp_path, environment), tmp_path)


def test_a_key_twice_in_a_study_file_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("title: a\ncost: b\nprotocol: protocol3\nsearch:\n  trials: 3\n  trials: 4\n")
    done = run(["sweeps/run.py", "--study", str(file), "--dry-run"], tmp_path)
    assert done.returncode == 2
    assert "mine.yaml" in done.stderr
    assert "'trials'" in done.stderr
    assert "line 6" in done.stderr


@pytest.mark.parametrize("name", ["a?b", "a#b", "50% of it", "ein schöner Ort"])
def test_folders_of_any_name_keep_their_study(name: str, tmp_path: Path) -> None:
    done = run([*STUDY, "--output", name], tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_accented_title_is_printed_in_ascii(tmp_path: Path) -> None:
    smoke = (REPOSITORY / "sweeps" / "studies" / "smoke.yaml").read_text(encoding="utf-8")
    lines = ["title: Zürich — ± 5" if line.startswith("title:") else line for line in smoke.splitlines()]
    (tmp_path / "mine.yaml").write_text("\n".join(lines), encoding="utf-8")
    done = run(["sweeps/run.py", "--study", "mine.yaml", "--dry-run"], tmp_path, ENVIRONMENTS["ascii"])
    assert done.returncode == 0, done.stderr
    assert "Zurich - +- 5" in done.stdout


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    script = f"{sys.executable} {REPOSITORY / 'sweeps' / 'run.py'} --list | head -1"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_gpus_that_are_not_there_are_not_promised(tmp_path: Path) -> None:
    done = run(STUDY, tmp_path, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert "GPU" not in json.dumps(done.stdout)
    if not Path("/dev/nvidia0").exists():
        assert "CUDA_VISIBLE_DEVICES" in done.stderr
