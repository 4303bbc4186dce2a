"""Odd arguments: every option of every command refuses what it cannot use, in one line, before anything is made."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import BASE, REPOSITORY
from test_odd_environments import without_superpowers

from analysis import buffer_bank, report, tables
from lda import evaluate, step_cost, train
from lda.arguments import checked, output_folder, path
from lda.data import doctor, person_search
from lda.data.standin import __main__ as standin
from lda.errors import UsageError
from sweeps import carry, run, slurm
from sweeps.list.addresses import storage_url
from sweeps.plan.study_files import load, resolve
from sweeps.study_folder import StudyFolder

NUMBERS = ["", " ", "x", "-1", "1.5", "1e3", "0x10", "1_0", "\u00b2", "nan", "9" * 30, "9" * 5000]
PATHS = ["", "~nobodyhere/x", "n" * 300, "d/" * 3000 + "x"]
ABSENT = ["absent", "broken", "circle", "file/below"]
ODD: Mapping[str, list[str]] = {
    "folder read": [*PATHS, *ABSENT, "file"],
    "file read": [*PATHS, *ABSENT, "folder"],
    "folder written": [*PATHS, "broken", "circle", "file", "file/below"],
    "file written": [*PATHS, "folder", "file/below"],
    "number": NUMBERS,
    "names": ["", ",", " , "],
    "text": ["", "  "],
    "settings": ["", "=", "=1", "epochs", "epochs=", "epochs=x", "epochs=1.5", "Epochs=3", "epochs=99999999999",
                 "learning_rate=nan", "learning_rate=inf", "device=", "seed=99999999999", "backbone=", "x=1"],
}  # fmt: skip

Main = Callable[[list[str]], int]
OPTIONS: list[tuple[Main, str, dict[str, str]]] = [
    (run.main, "--study smoke", {
        "--study": "text", "--data-root": "folder read", "--output": "folder written", "--trials": "number",
        "--methods": "names", "--seed": "number", "--confirm-seeds": "number", "--workers": "number",
        "--set": "settings",
    }),
    (slurm.main, "--cluster local", {"--tasks": "number", "--logs": "folder written"}),
    (carry.main, "import", {"--output": "folder written"}),
    (train.main, "", {
        "--data-root": "folder read", "--seed": "number", "--output": "folder written", "--set": "settings",
    }),
    (evaluate.main, "--checkpoint file --target prid", {
        "--checkpoint": "file read", "--split": "number", "--data-root": "folder read",
    }),
    (step_cost.main, "", {
        "--methods": "names", "--rounds": "number", "--data-root": "folder read", "--set": "settings",
    }),
    (doctor.main, "", {"--data-root": "folder read"}),
    (person_search.main, "--input folder --output out", {"--input": "folder read", "--output": "folder written"}),
    (standin.main, "--output out", {
        "--output": "folder written", "--seed": "number", "--contact-sheet": "file written",
        "--cuhk03-release": "folder written",
    }),
    (tables.main, "folder", {"--output": "file written"}),
    (buffer_bank.main, "folder", {"--output": "folder written", "--channels": "number"}),
    (report.main, "folder", {"--output": "folder written"}),
]  # fmt: skip
LAST = {carry.main: ["file"], slurm.main: ["--", "--study", "smoke", "--storage", "journal"]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the things that the odd values name."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(main: Main, arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which a command is refused; nothing was made."""
    before = sorted(here.rglob("*"))
    code = main(arguments)
    said = capsys.readouterr()
    assert (code, said.out, len(said.err.splitlines())) == (2, "", 1), said.err
    assert said.err.startswith("error: ")
    assert len(said.err) < 500 or "not found in" in said.err, "a line is not a page"  # all that is missing, at once
    assert sorted(here.rglob("*")) == before
    return said.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("main", "base", "option", "kind"),
    [
        pytest.param(main, base.split(), option, kind, id=f"{main.__module__}-{option}")
        for main, base, options in OPTIONS
        for option, kind in options.items()
    ],
)
def test_every_option_refuses_what_it_cannot_use(
    main: Main, base: list[str], option: str, kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if option in base:
        base = [word for i, word in enumerate(base) if option not in (word, base[max(0, i - 1)])]
    for value in ODD[kind]:
        told = refusal(main, [*base, f"{option}={value}", *LAST.get(main, [])], here, capsys)
        named = option == "--set" or told.startswith(f"{option}: ")
        assert named, f"{option}={value[:40]!r}: {told}"


@pytest.mark.parametrize(
    ("main", "before", "after", "kind"),
    [
        (tables.main, [], [], "folder read"),
        (report.main, [], [], "folder read"),
        (buffer_bank.main, [], [], "folder read"),
        (carry.main, ["export"], ["out"], "folder read"),
        (carry.main, ["export", "folder"], [], "file written"),
        (carry.main, ["import"], [], "file read"),
    ],
)
def test_files_and_folders_without_an_option_are_looked_at_first(
    main: Main, before: list[str], after: list[str], kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ODD[kind]:
        refusal(main, [*before, value, *after], here, capsys)


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        (run.main, "--study smoke --sed 3", "unknown option '--sed' (did you mean '--seed'?)"),
        (run.main, "--study smoke smoke", "unrecognized arguments: smoke; see --help"),
        (run.main, "--study ../protocol3", "unknown study '../protocol3' (did you mean 'protocol3'?)"),
        (run.main, "--study PROTOCOL3", "unknown study 'PROTOCOL3' (did you mean 'protocol3'?)"),
        (run.main, "--study absent.yaml", "--study: absent.yaml: there is no such file"),
        (run.main, "--study folder/..yaml", "--study: folder/..yaml: there is no such file"),
        (run.main, "--study smoke --trials 1000000000000", "--trials: expected a whole number from 0 to 100000, got"),
        (run.main, "--study smoke --seed 1073741824", "--seed: expected a whole number from 0 to 1073741823, got"),
        (run.main, "--study smoke --set seed=1", "--set seed: is set for the whole study, use --seed"),
        (run.main, "--study smoke --set epochs=1 epochs=2", "--set 'epochs=2': epochs is given twice; keep one"),
        (run.main, "--study smoke --workers 5000", "--workers: expected"),
        (run.main, "--study smoke --set device=cuda:99", "device: 'cuda:99' is not there"),
        (run.main, "--study smoke --set pretrained=~/absent.pth backbone=resnet18", "/absent.pth: there is no such f"),
        (run.main, "--study smoke --data-root folder", "Market-1501"),
        (run.main, "--study smoke --output file", "--output: file/smoke: cannot be made, file is a file"),
        (run.main, "--study smoke --storage postgresql", "--storage postgresql: the address is missing; expected"),
        (run.main, "--study smoke --storage sqlite://", "need a database in a file; expected sqlite:///PATH"),
        (run.main, "--study smoke --storage mysql://u@h/d", "unknown kind of storage 'mysql'"),
        (run.main, "--study smoke --storage=", "--storage is empty; expected"),
        (run.main, "--study smoke --status", "(there is no "),
        (slurm.main, "-- --study smoke --storage mysql://u@h/d", "unknown kind of storage 'mysql'"),
        (train.main, "--seed 2147483648", "--seed: expected a whole number from 0 to 2147483647, got '2147483648'"),
        (train.main, "--seed 3 --set seed=4", "--seed 3 and --set seed=4: keep one of the two"),
        (train.main, "--target Market1501", "unknown target of Protocol-3 'Market1501' (did you mean 'market1501'?)"),
        (train.main, "--set pretrained=~/absent.pth backbone=resnet18", "/absent.pth: there is no such file"),
        (train.main, "--set device=cuda:99", "device: 'cuda:99' is not there"),
        (evaluate.main, "--checkpoint file --target PRID", "unknown data set 'PRID' (did you mean 'prid'?)"),
        (evaluate.main, "--checkpoint folder --target prid", "is a folder, expected a file; a run writes it as"),
        (step_cost.main, "--methods LDA", "unknown method 'LDA' (did you mean 'lda'?)"),
        (step_cost.main, "--rounds 101", "--rounds: 101 need 161 steps with what comes before and after, and the se"),
        (slurm.main, "-- --study smoke --storage journal", "there is no SLURM here"),
        (slurm.main, "-- --storage journal", "--study NAME is missing behind --"),
        (slurm.main, "--slurm partition -- --study smoke --storage journal", "expected KEY=VALUE"),
        (slurm.main, "--cluster local -- --study smok", "unknown study 'smok' (did you mean 'smoke'?)"),
        (standin.main, "--output out --cuhk03-release folder", "--cuhk03-release: folder exists; name a new folder"),
        (standin.main, "--output out --scale huge", "unknown scale 'huge'"),
        (tables.main, "folder --format html", "--format: invalid choice: 'html'"),
        (tables.main, "folder --output folder", "--output: folder: is a folder, expected a file"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_what_was_expected(
    main: Main,
    arguments: str,
    told: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("HOME", str(here))
    if main is train.main:
        monkeypatch.setenv("LDA_CACHE_DIR", str(here))
    if main is slurm.main:
        pytest.importorskip("submitit")
    assert told in refusal(main, arguments.split(), here, capsys)


# --- the dry run and the run -----------------------------------------------------------------------------------------


def study(here: Path, **changes: Any) -> Path:
    content = {"title": "t", "cost": "c", "protocol": "protocol3", "base": {**BASE, "method": "ibn"}}
    content |= {"search": {"trials": 2, "space": {"gem_p": {"low": 1.0, "high": 4.0}}}, **changes}
    (here / "mine.yaml").write_text(yaml.safe_dump(content))
    return here / "mine.yaml"


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, "--output file"),
        ({}, "--output broken"),
        ({}, "--data-root folder"),
        ({}, "--seed 9999999999"),
        ({}, "--workers 9999"),
        ({}, "--trials 0"),
        ({}, "--set device=cuda:7"),
        ({}, "--set pretrained=absent.pth backbone=resnet18"),
        ({"seed": 2**30}, ""),
        ({"confirm": {"seeds": 10**9}}, ""),
        ({"search": {"hours": float("inf")}}, ""),
        ({"search": {"trials": 10**12}}, ""),
        ({"targets": ["CUHK03"]}, ""),
        ({"targets": ["cuhk03", "cuhk03"]}, ""),
        ({"search": {"sampler": "grid", "space": {"gem_p": {"low": 1, "high": 9, "step": 1e-9}}}}, ""),
    ],
)
def test_the_dry_run_refuses_what_the_run_refuses(
    changes: dict[str, Any], options: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--study", str(study(here, **changes)), *options.split()]
    if "--output" not in arguments:
        arguments += ["--output", "out"]
    told = refusal(run.main, [*arguments, "--dry-run"], here, capsys)
    assert refusal(run.main, arguments, here, capsys) == told


def test_a_dry_run_knows_the_study_in_its_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sweeps.plan.spec import flat

    file = study(here)
    StudyFolder(here / "out" / "mine").write_study({"study": "mine", **flat(resolve(load(file), file))})
    told = refusal(run.main, ["--study", str(file), "--output", "out", "--seed", "5", "--dry-run"], here, capsys)
    assert "study 'mine' was begun with other settings: seed (0 before, 5 now)" in told


@pytest.mark.parametrize("name", ["a-confirm", ".hidden", ".", "n" * 240, "two\nlines", "bell\a"])
def test_a_study_has_a_name_that_folders_and_storages_take(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(here).rename(here / f"{name}.yaml")
    assert "a study has the name of its file" in refusal(run.main, ["--study", f"./{name}.yaml"], here, capsys)


# --- rules for whoever adds a command --------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, ast.Call]]:
    """(file:line, call) of every call in the packages."""
    for package in ("lda", "sweeps", "analysis"):
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield f"{file.relative_to(REPOSITORY)}:{node.lineno}", node


def test_every_command_has_the_parser_that_checks() -> None:
    plain = [
        where for where, call in calls() if ast.unparse(call.func) in ("ArgumentParser", "argparse.ArgumentParser")
    ]
    assert plain == []


def test_text_is_utf_8_whatever_the_locale() -> None:
    """Without an encoding a file is read and written in that of whoever runs the command."""
    forgetful = []
    for where, call in calls():
        name, named = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
        texts = [str(given.value) for given in call.args if isinstance(given, ast.Constant)]
        mode = next((given for given in texts if re.fullmatch("[rwax][bt+]*", given)), "r")
        opens = name in ("open", "os.fdopen") or (name.endswith(".open") and name.split(".")[0] not in NO_TEXT)
        if name.endswith((".read_text", ".write_text")) or (opens and "b" not in mode):
            forgetful += [where] * ("encoding" not in named)
        if any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords):
            forgetful.append(where)
    assert forgetful == []


NO_TEXT = ("Image", "os", "tarfile", "lzma", "zipfile", "webbrowser")


# --- paths -----------------------------------------------------------------------------------------------------------


def test_the_home_folder_has_its_sign_in_every_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside quotes no shell expands it."""
    monkeypatch.setenv("HOME", str(here))
    (here / "file.pt").touch()
    home = run.parser().parse_args(["--data-root", "~/folder", "--output", "~/out"])
    assert (home.data_root, home.output) == (here / "folder", here / "out")
    assert train.parse_arguments(["--output", "~/out", "--data-root", "~/folder"]).output == here / "out"
    assert evaluate.parse_arguments(["--checkpoint", "~/file.pt", "--target", "prid"]).checkpoint == [here / "file.pt"]
    assert slurm.parser().parse_args(["--logs", "~/logs"]).logs == here / "logs"
    assert tables.parse_arguments(["~/folder", "--output", "~/t.md"]).output == here / "t.md"
    assert report.parse_arguments(["~/folder"]).study == here / "folder"
    assert buffer_bank.parse_arguments(["~/folder"]).output == here / "folder"
    assert doctor.parse_arguments(["--data-root", "~/folder"]).data_root == here / "folder"
    assert standin.parse_arguments(["--output", "~/s", "--contact-sheet", "~/s.png"]).contact_sheet == here / "s.png"
    assert person_search.parse_arguments(["--input", "~/folder", "--output", "~/o"]).output == here / "o"
    assert storage_url("journal:~/a.log", here) == f"journal:{here}/a.log"
    assert storage_url("sqlite:///~/a.db", here) == f"sqlite:///{here}/a.db"


def test_a_folder_that_can_be_made_is_not_made(here: Path) -> None:
    for name in ("out", "a/b/c", "a?b", "a#b", "a%20b", "a b", "folder", "\u00e9tude", "/" + "tmp/never/made"):
        assert output_folder(name) == Path(name)
    assert sorted(found.name for found in here.iterdir()) == ["broken", "circle", "file", "folder"]
    assert path("./x/../y") == Path("x/../y")
    with pytest.raises(UsageError, match="is no text in this locale"):
        output_folder("caf\udce9")


@pytest.mark.skipif(not Path("/proc").is_dir() or os.getuid() != 0, reason="needs a folder that only seems writable")
def test_a_folder_that_seems_writable_is_tried() -> None:
    with pytest.raises(UsageError, match="/proc/lda: cannot be made in /proc: no such file or directory"):
        checked("--output", output_folder, Path("/proc/lda"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-m", "lda.data.doctor", "--data-root", "closed"], "--data-root: closed: no permission to read this folder"),
        (["-m", "lda.train", "--data-root", "closed/x"], "--data-root: closed/x: permission denied"),
        (["-m", "lda.evaluate", "--checkpoint", "secret", "--target", "prid"], "secret: no permission to read this"),
        (["-m", "sweeps.run", "--study", "secret.yaml"], "--study: secret.yaml: no permission to read this file"),
        (["-m", "sweeps.run", "--study", "smoke", "--output", "fixed/x"], "fixed/x/smoke: no permission to write in"),
        (["-m", "lda.data.standin", "--output", "fixed/x"], "--output: fixed/x: no permission to write in fixed"),
        (["-m", "analysis.tables", "folder", "--output", "fixed/t.md"], "--output: fixed: no permission to write in"),
    ],
)
def test_permissions_are_looked_at_first(arguments: list[str], told: str, here: Path) -> None:
    (here / "secret").touch(0o000)
    (here / "secret.yaml").touch(0o000)
    (here / "closed").mkdir(0o000)
    (here / "fixed").mkdir(0o555)
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        preexec_fn=without_superpowers,
        check=False,
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert told in done.stderr
    assert list((here / "fixed").iterdir()) == []
