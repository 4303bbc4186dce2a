"""Move a study between machines that share neither disk nor database: one file with its results and its list.

    python -m sweeps.carry export runs/protocol3 protocol3.tar.gz
    python -m sweeps.carry import protocol3.tar.gz --output runs

The file holds study.json, events, every trial and unit (checkpoints with --checkpoints), the list of trials as an
SQLite database, and a manifest with the SHA-256 of each. Import checks all of it before it writes. Into a folder of the
same study it adds what is missing there; the list is taken over where it goes on from the one that is there. Two lists
that both went on are refused: those are two studies by now.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lda.arguments import checked, existing_file, existing_folder, output_file, output_folder, path
from lda.command import exit_code
from lda.errors import FailedError, UsageError
from lda.files import read_json, sha256_of, write_json
from lda.runs import RESULT, UnitFolder, finished, record_files, unit_folders
from sweeps.list.addresses import DATABASE, VARIABLE, asked_for, has_password, storage_url
from sweeps.run import StudyParser
from sweeps.study_folder import EVENTS, STUDY, StudyFolder

MANIFEST = "MANIFEST.json"
_FORMAT = 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = StudyParser(prog="python -m sweeps.carry", description="Move a study to another machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a study into one file")
    export.add_argument("study", type=existing_folder, help="its folder, runs/<study>")
    export.add_argument("file", type=output_file, help="to write, for example protocol3.tar.gz")
    export.add_argument(
        "--storage", metavar="URL", help=f"of the study (default: {VARIABLE}, else sqlite in the folder)"
    )
    export.add_argument("--checkpoints", action="store_true", help="with the weights, which are most of it")
    into = commands.add_parser("import", help="read such a file")
    into.add_argument("file", type=existing_file, help="that export wrote")
    into.add_argument("--output", type=path, default=Path("runs"), metavar="DIR", help="parent of the study's folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 units are nowhere to be found, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _carry(parser().parse_args(arguments)))


def _carry(given: argparse.Namespace) -> None:
    if given.command == "export":
        if has_password(given.storage or ""):
            raise UsageError(f"--storage: every list of processes would show the password; put the URL into {VARIABLE}")
        url = storage_url(asked_for(given.storage), given.study)
        export_study(given.study, given.file, url, given.checkpoints)
    else:
        import_study(given.file, checked("--output", output_folder, given.output))


# --- export ----------------------------------------------------------------------------------------------------------


def export_study(study: Path, file: Path, url: str, checkpoints: bool) -> None:
    """Write a study's folder and list into one file. Raises FailedError naming units that are nowhere to be found."""
    from sweeps.gather import gather
    from sweeps.list.archive import open_archive
    from sweeps.list.storage import opened
    from sweeps.list.study import TOKEN, running_study, token_of

    folder = StudyFolder(study.resolve())
    content = folder.read_study()
    if content is None:
        raise UsageError(f"{study}: expected a study's folder (it holds {STUDY}), such as runs/protocol3")
    name = content["study"]
    found = running_study(name, url, study)
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    with opened(url) as storage, tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=".carried.") as scratch:
        token = token_of(_study(storage, name))
        gathered = gather(found.spec, folder, open_archive(storage, token), [*found.search, *found.confirm])
        if gathered.left:
            raise FailedError(f"{len(gathered.left)} finished units are not here: {', '.join(map(str, gathered.left))}")
        members = {source.relative_to(folder.path).as_posix(): source for source in _carried(folder, checkpoints)}
        members[DATABASE] = Path(scratch) / DATABASE
        _copy_list(storage, name, members[DATABASE])
        _pack(members, {"study": name, TOKEN: token}, Path(scratch), file)
    units = sum(member.endswith(f"/{RESULT}") for member in members)
    print(f"{name}: {units} finished units in {file} ({file.stat().st_size / 2**20:.1f} MiB)")


def _pack(members: dict[str, Path], names: dict[str, str], scratch: Path, file: Path) -> None:
    """Write name -> file and their manifest into one archive, which appears complete or not at all."""
    manifest, packed = scratch / MANIFEST, scratch / "packed"
    write_json(
        manifest, {"format": _FORMAT, **names, "files": {name: sha256_of(path) for name, path in members.items()}}
    )
    with tarfile.open(packed, "w:gz") as tar:
        for member, source in {MANIFEST: manifest, **members}.items():
            tar.add(source, member, recursive=False)
    os.replace(packed, file)


def _carried(folder: StudyFolder, checkpoints: bool) -> Iterator[Path]:
    for name in (STUDY, EVENTS):
        if (folder.path / name).exists():
            yield folder.path / name
    for trial in sorted(folder.path.glob("trial-*/trial.json")):
        yield trial
        for unit in unit_folders(trial.parent):
            yield from record_files(unit)
            if checkpoints and UnitFolder(unit).checkpoint.exists():
                yield UnitFolder(unit).checkpoint


def _copy_list(storage: Any, name: str, target: Path) -> None:
    """The trials of search and confirmation, in a database of their own; what runs is ended as interrupted there."""
    import optuna
    from optuna.trial import TrialState

    from sweeps.list.ledger import Budget, Ledger
    from sweeps.list.storage import opened
    from sweeps.list.study import confirm_study

    with opened(storage_url(f"sqlite:///{target}", target.parent)) as copied:
        for study in (name, confirm_study(name)):
            if study not in optuna.study.get_all_study_names(storage):
                continue
            optuna.copy_study(from_study_name=study, from_storage=storage, to_storage=copied)
            ledger = Ledger(copied, _study(copied, study), Budget(None, 0, proposes=False))
            for trial in ledger.trials():
                if trial.state == TrialState.RUNNING:
                    ledger.release(trial.number, "interrupted", "the study was carried to another machine")


def _study(storage: Any, name: str) -> Any:
    import optuna

    return optuna.load_study(study_name=name, storage=storage)


# --- import ----------------------------------------------------------------------------------------------------------


def import_study(file: Path, output: Path) -> None:
    """Make the study's folder below `output`, or add to it; all is checked before. Raises UsageError."""
    with _made(output), tempfile.TemporaryDirectory(dir=output, prefix=".carried.") as scratch:
        carried = Path(scratch) / "study"
        manifest = _unpack(file, carried)
        (carried / MANIFEST).unlink()
        target = output / manifest["study"]
        if not target.exists():
            os.replace(carried, target)
            print(f"{manifest['study']}: {_finished(target)} finished units in {target}")
            return
        before = _finished(target)
        _merge(carried, target, manifest)
        print(f"{manifest['study']}: {_finished(target) - before} finished units added to {target}, which had {before}")


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that is there inside `with`; what was made of it is gone again when that ends in a refusal."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except UsageError:
        for place in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                place.rmdir()
        raise


def _finished(study: Path) -> int:
    return sum(finished(unit) for trial in study.glob("trial-*") for unit in unit_folders(trial))


def _unpack(file: Path, into: Path) -> dict[str, Any]:
    """Extract and check everything; the manifest."""
    try:
        with tarfile.open(file, "r:gz") as tar:
            tar.extractall(into, filter="data")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UsageError(f"{file}: expected a file that sweeps.carry export wrote: {error}") from None
    manifest = read_json(into / MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise UsageError(f"{file}: expected format {_FORMAT}, got {manifest.get('format')!r}; update this project")
    present = {path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file()} - {MANIFEST}
    for name in sorted(present ^ set(manifest["files"])):
        raise UsageError(f"{file}: {name} is {'not in its manifest' if name in present else 'missing'}")
    for name, digest in manifest["files"].items():
        if sha256_of(into / name) != digest:
            raise UsageError(f"{file}: {name} is damaged; copy the file again")
    return manifest


def _merge(carried: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Add the units that are missing, and take over the list where it goes on from the one that is here."""
    from sweeps.list.study import TOKEN

    there = StudyFolder(target).read_study()
    if there is None or there.get(TOKEN) != manifest[TOKEN]:
        raise UsageError(f"{target} is the folder of another study; give another --output")
    newer = not (target / DATABASE).exists() or _goes_on(target / DATABASE, carried / DATABASE)
    if not newer and not _goes_on(carried / DATABASE, target / DATABASE):
        raise UsageError(
            f"{target} went on after the study was carried, and so did the other: these are two studies by now; give "
            "another --output"
        )
    for unit in sorted(unit for trial in carried.glob("trial-*") for unit in unit_folders(trial)):
        place = target / unit.relative_to(carried)
        if finished(unit) and not finished(place):
            place.mkdir(parents=True, exist_ok=True)
            for source in sorted(unit.iterdir(), key=lambda path: path.name == RESULT):
                os.replace(source, place / source.name)
    if newer:
        for source in [carried / DATABASE, *sorted(carried.glob("trial-*/trial.json"))]:
            place = target / source.relative_to(carried)
            place.parent.mkdir(exist_ok=True)
            shutil.move(source, place)


def _goes_on(earlier: Path, later: Path) -> bool:
    """Whether everything that had ended in one list has ended the same way in the other."""
    import optuna

    from sweeps.list.storage import opened

    ended = []
    for file in (earlier, later):
        with opened(storage_url(f"sqlite:///{file.resolve()}", file.parent)) as storage:
            ended.append(
                {
                    (study, trial.number): (trial.state, trial.values, trial.params)
                    for study in optuna.study.get_all_study_names(storage)
                    for trial in _study(storage, study).get_trials(deepcopy=False)
                    if trial.state.is_finished()
                }
            )
    return all(ended[1].get(key) == value for key, value in ended[0].items())


if __name__ == "__main__":
    sys.exit(main())
