"""Every command under every odd environment, and with every odd argument: it works, or it is refused in one line.

A refused command exits with 2, says one line that begins with "error: ", and has made nothing. Ordinarily each
environment meets one command or two, and each command some of them; `-m slow` runs them all.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import BASE, REPOSITORY
from study_files import write_study

SMALL = " ".join(f"{key}={value}" for key, value in {**BASE, "threads": 1, "milestones": ""}.items())
PLAIN_NET = f"{SMALL} backbone=small pretrained=none".replace("steps_per_epoch=4", "steps_per_epoch=61")
TINY, TRAINED = "--data-root {world}/tiny", "--checkpoint {world}/trained/checkpoint.pt"

# --- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One command with arguments that make it cheap. In them {world} is a folder with all it reads.

    Attributes:
        uses: which parts of the environment matter to it: cache, threads, methods, storage.
        code: how it ends where nothing is odd.
        quick: seconds are below one.
    """

    name: str
    arguments: str
    uses: frozenset[str] = frozenset()
    code: int = 0
    quick: bool = True

    def line(self, world: Path) -> list[str]:
        return [sys.executable, *(word.replace("{world}", str(world)) for word in shlex.split(self.arguments))]


RUN, BANK, TABLES, REPORT = (  # a checkout may have spaces in its path
    shlex.quote(f"{REPOSITORY}/{file}")
    for file in ("sweeps/run.py", "analysis/buffer_bank.py", "analysis/tables.py", "analysis/report.py")
)
TRAINING = frozenset({"cache", "threads", "methods", "data"})
STUDY = frozenset({"cache", "methods", "storage", "data"})
DATA = frozenset({"data"})
COMMANDS = [
    Command("list", f"{RUN} --list"),
    Command("draw_splits", "-m lda.data.draw_splits"),
    Command("status", f"{RUN} --study smoke --status", frozenset({"storage"}), code=2),  # no such study yet
    Command("doctor", "-m lda.data.doctor --data-root {world}/sets --dataset cuhk02 --lenient", DATA),
    Command("tables", f"{TABLES} {{world}}/done", DATA),
    Command("slurm", "-m sweeps.slurm --logs logs -- --study smoke", frozenset({"slurm"}), code=2),  # sqlite
    Command("buffer_bank", f"{BANK} {{world}}/done --output out --layers bn1 --channels 8", DATA, quick=False),
    Command("report", f"{REPORT} {{world}}/done --output out", DATA, quick=False),
    Command("report_help", f"{REPORT} --help", quick=False),
    Command("carry_in", "-m sweeps.carry import {world}/mine.yaml --output out", code=2),  # no such file
    Command("carry_out", "-m sweeps.carry export {world}/sets out", frozenset({"storage"}), code=2),  # no study
    Command("dry_run", f"{RUN} --study {{world}}/mine.yaml --output out --dry-run", STUDY, quick=False),
    Command("standin", "-m lda.data.standin --output out --scale tiny", quick=False),
    Command("person_search", "-m lda.data.person_search --input {world} --output out", code=2),  # no release there
    Command("step_cost", f"-m lda.step_cost --methods ibn --rounds 1 {TINY} --set {PLAIN_NET}", TRAINING, quick=False),
    Command("train", f"-m lda.train --preset standin {TINY} --output out --set {SMALL}", TRAINING, quick=False),
    Command("evaluate", f"-m lda.evaluate {TRAINED} {TINY} --target market1501", TRAINING, quick=False),
    Command("run", f"{RUN} --study {{world}}/mine.yaml {TINY} --output out --workers 1", STUDY, quick=False),
]  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sets: Path) -> Path:
    """What quick commands read: a finished study, small data sets, a study file with an accent in its title."""
    folder = tmp_path_factory.mktemp("world")
    write_study(folder / "done", confirm_seeds=(1, 2), seconds=1.0)
    (folder / "sets").symlink_to(tiny_sets)
    (folder / "tiny").symlink_to(tiny_sets)  # enough for what is refused; whole_world has the stand-in
    (folder / "trained").mkdir()
    (folder / "trained" / "checkpoint.pt").touch()
    study = {"title": "Étude: 1 ± 2 → 3", "cost": "seconds", "protocol": "protocol3", "targets": ["cuhk03"]}
    study |= {"heartbeat_seconds": 1, "grace_seconds": 5, "confirm": {"seeds": 0}, "base": {**BASE, "method": "ibn"}}
    study["search"] = {"trials": 1, "space": {"gem_p": {"low": 1.0, "high": 4.0}}, "pruning": {"rule": "none"}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(study, allow_unicode=True), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def whole_world(world: Path, standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the others read as well: the stand-in, and a trained run."""
    folder = tmp_path_factory.mktemp("whole-world")
    for name in ("done", "sets", "mine.yaml"):
        (folder / name).symlink_to(world / name)
    (folder / "tiny").symlink_to(standin_tiny)
    (train,) = [command for command in COMMANDS if command.name == "train"]
    words = [word if word != "out" else str(folder / "trained") for word in train.line(folder)]
    subprocess.run(words, check=True, capture_output=True, cwd=folder, env={**os.environ, **PLAIN})
    return folder


PLAIN = {"PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "disabled"}


# --- environments ----------------------------------------------------------------------------------------------------


def nobody(command: Command) -> None:
    """No command is refused."""


def everybody(line: str) -> Callable[[Command], str | None]:
    return lambda command: line


def users_of(part: str, line: str = "") -> Callable[[Command], str | None]:
    return lambda command: line if part in command.uses else None


@dataclass(frozen=True)
class Oddity:
    """An environment.

    Attributes:
        variables: of the environment; None takes one away.
        shell: run by sh before the command, whose words are "$@".
        refused: what its line has in it where a command is refused, None where it works.
        code: how a command ends that would end with 0, because its output cannot be written.
        told: what its stderr then has in it.
        prepare: called in the forked process, before the command.
        also: commands that meet it ordinarily, whatever the others meet.
    """

    variables: Mapping[str, str | None] = field(default_factory=dict)
    shell: str = 'exec "$@"'
    refused: Callable[[Command], str | None] = nobody
    code: int = 0
    told: str = ""
    prepare: Callable[[], None] | None = None
    also: tuple[str, ...] = ()


def reader_gone() -> None:
    """Stdout is a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def without_superpowers() -> None:
    """Root may read and write everything; without these two capabilities permissions count for root as well."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None}
NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}

ODDITIES = {
    "ASCII": Oddity(ASCII),
    "ASCII by name": Oddity({"PYTHONIOENCODING": "ascii"}),
    "Latin-1": Oddity({"PYTHONIOENCODING": "latin-1:strict"}),
    "a locale that is not installed": Oddity({"LC_ALL": "xx_YY.UTF-8", "LANG": "xx_YY.UTF-8"}),
    "a terminal of one column": Oddity({"COLUMNS": "1", "LINES": "1", "TERM": "dumb"}),
    "a width that is no number": Oddity({"COLUMNS": "wide", "TERM": "no-such-terminal"}),
    "a time zone that is none": Oddity({"TZ": "Nowhere/At_all"}),
    "no HOME": Oddity({"HOME": None}),
    "a HOME that is not there": Oddity({"HOME": "/nonexistent"}),
    "a TMPDIR that is not there": Oddity({"TMPDIR": "/nonexistent"}),
    "the backend of a notebook": Oddity(NOTEBOOK, also=("report_help", "buffer_bank")),
    "a backend with windows": Oddity({"MPLBACKEND": "TkAgg", "DISPLAY": None}),
    "nested threads": Oddity({"OMP_NUM_THREADS": "4,2"}),
    "no number of threads": Oddity({"OMP_NUM_THREADS": ""}),
    "threads that are no number": Oddity(
        {"OMP_NUM_THREADS": "many"}, refused=users_of("threads", "OMP_NUM_THREADS: expected a whole number")
    ),
    "GPUs that are not there": Oddity({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}),
    "warnings are errors": Oddity({"PYTHONWARNINGS": "error"}),
    "no docstrings": Oddity({"PYTHONOPTIMIZE": "2"}),
    "a hash seed": Oddity({"PYTHONHASHSEED": "7"}),
    "a storage that is empty": Oddity({"LDA_STORAGE": ""}),
    "a storage of no kind": Oddity({"LDA_STORAGE": "nonsense"}, refused=users_of("storage", "unknown kind of storage")),
    "methods nowhere": Oddity({"LDA_METHODS": "nowhere"}, refused=users_of("methods", "LDA_METHODS: ")),
    "methods of nobody": Oddity({"LDA_METHODS": "~nobodyhere/x"}, refused=users_of("methods", "LDA_METHODS: ")),
    "data sets nowhere": Oddity({"LDA_DATASETS": "nowhere"}, refused=users_of("data", "LDA_DATASETS: ")),
    "a cache that is a file": Oddity({"LDA_CACHE_DIR": "/etc/passwd"}, refused=users_of("cache", "cache folder (set ")),
    "a cache of nobody": Oddity({"LDA_CACHE_DIR": "~nobodyhere/x"}, refused=users_of("cache", "LDA_CACHE_DIR: ")),
    "no stdin": Oddity(shell='exec "$@" <&-'),
    "no stdout": Oddity(shell='exec "$@" >&-'),
    "no stderr": Oddity(shell='exec "$@" 2>&-'),
    "no streams": Oddity(shell='exec "$@" <&- >&- 2>&-'),
    "a reader that has gone": Oddity(code=1, prepare=reader_gone),
    "a full disk behind stdout": Oddity(shell='exec "$@" > /dev/full', code=1, told="No space left on device"),
    "a full disk behind stderr": Oddity(shell='exec "$@" 2> /dev/full'),
    "children that nobody waits for": Oddity(shell='trap "" CHLD; exec "$@"'),
    "a deleted folder": Oddity(
        shell='mkdir gone; cd gone; rmdir "$PWD"; exec "$@"', refused=everybody("the current folder does not exist")
    ),
    "a umask that takes all": Oddity(shell='umask 0777; exec "$@"', refused=everybody("umask 0777 takes from you")),
    "a read-only folder": Oddity(
        shell='chmod 555 .; "$@"; code=$?; chmod 755 .; exit $code',
        refused=lambda command: "" if " out" in command.arguments or " logs" in command.arguments else None,
        prepare=without_superpowers,
    ),
}  # fmt: skip


def play(command: Command, oddity: Oddity, world: Path, work: Path) -> None:
    """Run the command under the oddity in an empty folder, and check how it ends."""
    variables = {**os.environ, **PLAIN, **oddity.variables}
    done = subprocess.run(
        ["sh", "-c", oddity.shell, "sh", *command.line(world)],
        cwd=work,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=300,
        preexec_fn=oddity.prepare,
    )
    said = f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in said, said
    assert "Exception ignored" not in said, said
    line = oddity.refused(command)
    if line is None and command.code != 2:
        assert done.returncode == (oddity.code or command.code), said
        assert not oddity.code or oddity.told in done.stderr, said
        return
    assert done.returncode == 2, said
    assert list(work.iterdir()) == []
    if "2>" not in oddity.shell:
        (told,) = [told for told in done.stderr.splitlines() if told.startswith("error: ")]
        assert (line or "") in told


def meetings() -> list[Any]:
    """Every command with every oddity; those that are slow, or one of many alike, are marked so."""
    found = []
    quick = [command for command in COMMANDS if command.quick]
    for row, (name, oddity) in enumerate(ODDITIES.items()):
        for column, command in enumerate(COMMANDS):
            refused = oddity.refused(command) is not None and not command.quick
            turn = command is quick[row % len(quick)] or (refused and (row + column) % 4 == 0)
            marks = [] if turn or command.name in oddity.also else [pytest.mark.slow]
            found.append(pytest.param(command, oddity, id=f"{name}-{command.name}", marks=marks))
    return found


@pytest.mark.parametrize(("command", "oddity"), meetings())
def test_a_command_works_or_is_refused_in_one_line(
    command: Command, oddity: Oddity, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    reads_more = any(part in command.arguments for part in ("/tiny", "/trained")) and oddity.refused(command) is None
    play(command, oddity, request.getfixturevalue("whole_world" if reads_more else "world"), tmp_path)


def test_signs_are_spelt_out_where_a_locale_lacks_them(world: Path, tmp_path: Path) -> None:
    (dry_run,) = [command for command in COMMANDS if command.name == "dry_run"]
    environment = {**os.environ, **PLAIN, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        dry_run.line(world), cwd=tmp_path, env=environment, capture_output=True, encoding="ascii", check=True
    )
    assert "mine: Etude: 1 +- 2 -> 3" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_seen_enough_hears_no_word(tmp_path: Path) -> None:
    script = f"{shlex.quote(sys.executable)} {RUN} --list | head -1"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")
