"""`python -m lda.data.doctor --data-root DIR`: what is there, its counts beside the published ones, what is wrong.
With `--show FILE.html` also what it looks like: some persons of every data set, as a page of its own.

Exit status: 0 all that was found is sound, 1 something is wrong, 2 bad usage. A data set that is simply not there is
reported, and wrong only if it was asked for by name or nothing at all was found.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lda.arguments import Parser, existing_folder, output_file
from lda.command import exit_code
from lda.data import catalogue, contact_sheet, survey_dataset
from lda.data.cache import cache_dir, check_cache
from lda.data.options import DataOptions
from lda.data.packed import verify as verify_packed
from lda.data.records import ReidDataset
from lda.data.survey import Finding, Severity, Survey, quoted
from lda.data.verify import SMALL, Check, check_images
from lda.errors import UsageError
from lda.files import atomic
from lda.settings import settings_of

_WORDS = {Severity.NOTE: "note", Severity.WARNING: "warning", Severity.STRICT: "error", Severity.ERROR: "error"}


@dataclass(frozen=True)
class Diagnosis:
    """One data set (one kind of its files, where one kind suffices) as the doctor found it."""

    title: str
    dataset: ReidDataset | None
    survey: Survey
    strict: bool
    required: bool

    @property
    def verdict(self) -> str:
        """ok, warnings, wrong or absent."""
        if self.survey.absent and not self.required:
            return "absent"
        if self.survey.refused(self.strict):
            return "wrong"
        return "warnings" if any(f.severity >= Severity.WARNING for f in self.survey.findings) else "ok"


def diagnose(root: Path, names: Sequence[str] = (), *, strict: bool = True, verify: bool = False) -> list[Diagnosis]:
    """Examine the data sets below `root`: those named, or all but withdrawn ones.

    `verify`: decode every image as well. Raises UsageError if `root` is no folder or a name is unknown.
    """
    if not root.is_dir():
        raise UsageError(f"--data-root {root} does not exist or is not a folder")
    for name in names:
        catalogue.find(name)
    diagnoses = []
    for name in names or [name for name in catalogue.names() if not catalogue.facts(name).withdrawn]:
        kinds = []
        for kind, options in _kinds(name):
            dataset, survey = survey_dataset(name, root, _fullest(name, root, options))
            if verify and dataset is not None:
                _verify(dataset, survey)
            title = f"{survey.title} {kind}".rstrip()
            kinds.append(Diagnosis(title, dataset, survey, strict, required=name in names))
        diagnoses += _with_other_kinds_optional(kinds)
    return diagnoses


def report(diagnoses: Sequence[Diagnosis]) -> Iterator[str]:
    """The lines of the report."""
    for diagnosis in diagnoses:
        survey, dataset = diagnosis.survey, diagnosis.dataset
        found = survey.found
        where = f"{found.folder} (layout {found.layout.name})" if found else "not found"
        version = f", version {dataset.version}" if dataset else ""
        standin = f", stand-in {survey.standin.hash_of(survey.name)[:12]}" if survey.standin else ""
        yield f"{diagnosis.title:<18} {diagnosis.verdict:<9} {where}{version}{standin}"
        if survey.counts:
            expected = "STANDIN.json" if survey.standin else "published"
            yield f"    {'part':<10} {'ids':>7} {'images':>8} {'cameras':>8}   {expected}: ids, images, cameras"
        for part, (counted, wanted) in survey.counts.items():
            numbers = f"{_number(counted.ids):>7} {counted.images:>8} {_number(counted.cameras):>8}"
            beside = f"{_number(wanted.ids)}, {wanted.images}, {_number(wanted.cameras)}" if wanted else "-"
            yield f"    {part:<10} {numbers}   {beside}"
        for finding in survey.findings:
            yield f"    {_word(finding, diagnosis)}: {finding.text}"
    totals = Counter(diagnosis.verdict for diagnosis in diagnoses)
    yield ", ".join(f"{totals[word]} {word}" for word in ("ok", "warnings", "wrong", "absent") if totals[word])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_code(lambda: _examine(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.data.doctor",
        description="Examine data sets: where they are, their counts beside the published ones, what is wrong.",
    )
    parser.add_argument(
        "--data-root", type=existing_folder, required=True, metavar="DIR", help="folder that holds the data sets"
    )
    parser.add_argument(
        "--dataset", nargs="+", default=[], metavar="NAME",
        help="only these, and wrong if missing (default: all but withdrawn ones): " + ", ".join(catalogue.names()),
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="decode every image once; results are remembered")
    parser.add_argument(
        "--show", type=output_file, metavar="FILE.html", help="write a page with some persons of every data set"
    )
    parser.add_argument("--lenient", action="store_true", help="warn of differences from the published data sets")
    options = parser.parse_args(arguments)
    if options.verify:
        check_cache()
    return options


def _examine(options: argparse.Namespace) -> int:
    """Print the report; 1 if something is wrong."""
    root = options.data_root.absolute()
    diagnoses = diagnose(root, options.dataset, strict=not options.lenient, verify=options.verify)
    if options.show:
        with atomic(options.show) as file:
            file.write(_sheet(root, diagnoses))
    damaged = _damaged_packs(cache_dir()) if options.verify else []
    for line in (*report(diagnoses), *(f"error: {path}: damaged packed images; delete it" for path in damaged)):
        print(line)
    verdicts = {diagnosis.verdict for diagnosis in diagnoses}
    return int("wrong" in verdicts or verdicts == {"absent"} or bool(damaged))


def _sheet(root: Path, diagnoses: Sequence[Diagnosis]) -> str:
    """The page of `--show`."""
    there = [diagnosis for diagnosis in diagnoses if diagnosis.survey.found or diagnosis.verdict != "absent"]
    absent = [diagnosis.title for diagnosis in diagnoses if diagnosis not in there]
    return contact_sheet.page(f"Data sets below {root}", list(map(_section, there)), absent)


def _section(diagnosis: Diagnosis) -> contact_sheet.Section:
    survey, dataset = diagnosis.survey, diagnosis.dataset
    cameras, drawn = catalogue.facts(survey.name).cameras, dataset is not None and dataset.standin
    terms = catalogue.terms(survey.name, drawn)
    found = [("place", str(survey.found.folder))] if survey.found else []
    version = [("version", dataset.version)] if dataset else []
    return contact_sheet.Section(
        title=diagnosis.title,
        verdict=diagnosis.verdict,
        facts=[*found, *version, ("licence", terms.licence), ("citation", terms.citation)],
        drawn=drawn,
        counts=survey.counts,
        expected="in STANDIN.json" if survey.standin else "published",
        findings=[(_word(finding, diagnosis), finding.text) for finding in survey.findings],
        persons=contact_sheet.persons(dataset, cameras) if dataset else {},
        cameras=cameras,
    )


def _kinds(name: str) -> list[tuple[str, DataOptions]]:
    """(its name, "" where there is one; its options) for every kind of files of a data set."""
    kinds: list[tuple[str, dict[str, Any]]] = [("", {})]
    for key in catalogue.facts(name).chosen_by("files"):
        choices = settings_of(DataOptions)[key].choices
        kinds = [(f"{kind} {choice}".lstrip(), {**chosen, key: choice}) for kind, chosen in kinds for choice in choices]
    return [(kind, DataOptions(**chosen)) for kind, chosen in kinds]


def _fullest(name: str, root: Path, options: DataOptions) -> DataOptions:
    """The options under which most is read and counted, where that can be read."""
    extents = catalogue.facts(name).chosen_by("extent")
    most: dict[str, Any] = {key: settings_of(DataOptions)[key].choices[-1] for key in extents}
    full = replace(options, **most)
    if full == options:
        return options
    dataset, survey = survey_dataset(name, root, full)
    return full if dataset is not None and not survey.refused(strict=False) else options


def _with_other_kinds_optional(kinds: list[Diagnosis]) -> list[Diagnosis]:
    """A data set needs one kind of its files: another kind may be missing."""
    for missing in kinds:
        if missing.survey.found is None and any(other.survey.found for other in kinds):
            missing.survey.findings = [Finding(Severity.NOTE, finding.text) for finding in missing.survey.findings]
            missing.survey.absent = True
    return kinds


def _verify(dataset: ReidDataset, survey: Survey) -> None:
    """Decode all images of a data set; what is wrong becomes a finding."""
    test = {record.path for split in dataset.test_splits for record in (*split.query, *split.gallery)}
    paths = [*(record.path for record in dataset.train), *test]
    checks = check_images(paths, cache_dir(), survey.title)
    for path, check in checks.items():
        if check.problem:
            survey.error(check.problem)  # it can be neither packed nor left out, which would change the data set
        elif min(check.width, check.height) < SMALL:
            survey.warn(f"{path}: only {check.width} x {check.height} pixels")
    turned = [path.name for path, check in checks.items() if check.turned]
    if turned:
        survey.note(f"{len(turned)} image(s) are turned as their EXIF data say: {quoted(turned)}")
    modes = Counter(check.mode for check in checks.values() if check.mode not in ("RGB", ""))
    if modes:
        listed = ", ".join(f"{count} of mode {mode}" for mode, count in sorted(modes.items()))
        survey.note(f"images converted to RGB: {listed}")
    _find_twins(dataset, survey, checks)


def _find_twins(dataset: ReidDataset, survey: Survey, checks: dict[Path, Check]) -> None:
    """Error for a query whose very file lies in the gallery under another camera: it would find itself."""
    for split in dataset.test_splits:
        asked = {checks[record.path].digest: record for record in split.query}
        twins = [
            (asked[digest], record)
            for record in split.gallery
            if (digest := checks[record.path].digest) in asked and asked[digest].camid != record.camid
        ]
        if twins:
            query, gallery = twins[0]
            survey.error(
                f"{len(twins)} query image(s) lie in the gallery under another camera, e.g. {query.path} and "
                f"{gallery.path}: such a query finds itself; remove one of them"
            )
            return


def _damaged_packs(cache: Path) -> list[Path]:
    return [path for path in sorted((cache / "packed").glob("*.u8")) if not verify_packed(path)]


def _word(finding: Finding, diagnosis: Diagnosis) -> str:
    lenient = finding.severity is Severity.STRICT and not diagnosis.strict
    absent = diagnosis.verdict == "absent"
    return "warning" if lenient else "note" if absent else _WORDS[finding.severity]


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
