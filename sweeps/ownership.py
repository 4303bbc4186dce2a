"""Whose folder and whose storage is it? Asked before anything is written, so that no study overwrites another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.study import Study

from lda.errors import UsageError, warn
from sweeps.list.addresses import cleaned, elsewhere, file_of, masked
from sweeps.list.study import TOKEN, check_same, is_known, token_of
from sweeps.plan.spec import StudySpec, from_flat
from sweeps.study_folder import STUDY, StudyFolder


def check_folder(name: str, spec: StudySpec, folder: StudyFolder, url: str) -> dict[str, Any] | None:
    """The study.json of this very study, None where there is none. Reads only.

    Raises UsageError for a folder that is another study's, whose study has other settings, or that nobody can tell.
    """
    before = folder.read_study()
    if before is None:
        if folder.has_trials() and not is_known(name, url):
            raise UsageError(
                f"{folder.path} holds trials and no readable {STUDY}, and {masked(url)} knows no study {name!r}: whose "
                "they are cannot be told; move them away, or give another --output"
            )
        return None
    if before.get("study") != name:
        raise UsageError(
            f"{folder.path} is the folder of study {before.get('study')!r}, not of {name!r}: give the study file its "
            "old name, or another --output"
        )
    if any(cleaned(said) != said for said in (str(before.get("command")), str(before.get("storage")))):
        warn(f"{folder.path / STUDY} held a password in clear text; it is masked there now: change the password")
    check_same(name, from_flat(before), spec, elsewhere(file_of(url), name))
    return before


def check_storage(study: Study, created: bool, before: Mapping[str, Any] | None, folder: Path, url: str) -> None:
    """Raises UsageError for a storage whose study of this name is not the one in the folder, or lies in another.

    Args:
        created: whether this command began the study.
        before: the study.json in the folder.
    """
    name = study.study_name
    if before is not None and before.get(TOKEN, token_of(study)) != token_of(study):
        raise UsageError(
            f"{folder} holds another study {name!r} than {masked(url)}; give the storage that it was begun with, or "
            "another --output"
        )
    host, place = study.user_attrs.get("place", ("", str(folder)))
    if url.startswith("journal:") and before is None and not created and place != str(folder):
        raise UsageError(
            f"study {name!r} has its list in a journal, whose machines share one folder: {place} (on {host}); give "
            f"--output {Path(place).parent}, or a PostgreSQL database in the place of the journal"
        )
