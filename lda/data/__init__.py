"""Reading the person re-identification data sets: lists of images, sources and targets, batches.

`load_dataset` gives one data set as its release divides it; `lda.data.sources.build_task` joins several into what one
run of a protocol trains and is tested on. The data sets themselves are files of `lda/data/sets/`.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

from lda.data import catalogue
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset
from lda.data.survey import Severity, StandIn, Survey
from lda.errors import AbsentError, UsageError

__all__ = ["DataOptions", "ImageRecord", "ReidDataset", "load_dataset", "survey_dataset"]

DEFAULTS = DataOptions()

_log = logging.getLogger(__name__)


def load_dataset(
    name: str,
    root: Path | str,
    options: DataOptions = DEFAULTS,
    *,
    strict: bool = True,
    legacy: bool = False,
    **changes: Any,
) -> ReidDataset:
    """Read one data set.

    Args:
        name: a file of `lda/data/sets/`.
        root: the folder that holds the data set's folder, or that folder itself; see each file for its layouts.
        options: which of several releases or divisions; a data set looks at its own options only.
        strict: counts must equal the published ones (or STANDIN.json's), names must fit; False only warns.
        legacy: read a data set that its authors have withdrawn.
        changes: fields of `options` by name, for example cuhk03_boxes="detected".

    Raises:
        UsageError: with everything that is wrong, in one line; AbsentError where nothing of it is there.
    """
    facts = catalogue.facts(name)
    if facts.withdrawn and not legacy:
        raise UsageError(f"{facts.title} was withdrawn by its authors; legacy=True reads it all the same")
    dataset, survey = survey_dataset(name, root, dataclasses.replace(options, **changes))
    refused = survey.refused(strict)
    if refused or dataset is None:
        text = "; ".join(finding.text for finding in refused)
        raise AbsentError(text) if survey.absent else UsageError(text)
    told = [finding.text for finding in survey.findings if finding.severity >= Severity.WARNING]
    if told:
        warnings.warn("; ".join(told), stacklevel=2)
    for finding in survey.findings:
        _log.info("%s: %s", survey.title, finding.text)
    return dataset


def survey_dataset(name: str, root: Path | str, options: DataOptions = DEFAULTS) -> tuple[ReidDataset | None, Survey]:
    """Read one data set as far as possible, with everything that was found; the doctor's view of `load_dataset`.

    Raises UsageError for an unknown name.
    """
    data_set = catalogue.find(name)
    survey = Survey(name, data_set.FACTS.title, Path(root).expanduser().absolute())
    dataset = None
    try:
        dataset = data_set.read(survey, options)
        if survey.standin:
            _check_drawn(survey, survey.standin)
    except UsageError as error:
        survey.error(str(error))
    except OSError as error:  # unreadable folder, a loop of links
        survey.error(f"{survey.title}: cannot read {error.filename}: {error.strerror}")
    return dataset, survey


def _check_drawn(survey: Survey, standin: StandIn) -> None:
    """An error finding where files of the stand-in are not what was drawn."""
    from lda.data.standin.damage import damage  # real data need nothing that draws

    if standin.root is None or not (broken := damage(standin.root, standin.content, [survey.name])):
        return
    survey.error(
        f"{standin.root}: {len(broken):,} files of the stand-in's {survey.title} are damaged or missing, {broken[0]} "
        "first; remove that folder and generate it again"
    )
