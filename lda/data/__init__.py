"""Reading the person re-identification data sets: lists of images, sources and targets, batches.

`load_dataset` gives one data set as its release divides it; `lda.data.sources.build_task` joins several into what one
run of a protocol trains and is tested on.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from lda.data.records import ImageRecord, ReidDataset
from lda.data.sets import cuhk02, cuhk03, cuhk_sysu, dukemtmcreid, grid, ilids, market1501, msmt17, prid, viper
from lda.data.survey import Severity, Survey
from lda.errors import UsageError, unknown
from lda.protocols import DATASETS

__all__ = ["ImageRecord", "ReidDataset", "load_dataset", "survey_dataset"]

CUHK03_BOXES = ("labeled", "detected")
CUHK03_PROTOCOLS = ("new", "classic")
MSMT17_TRAIN = ("train", "train+val")

LEGACY = frozenset({"dukemtmcreid"})
"""Withdrawn by their authors: read only on request."""

_MODULES = {
    "market1501": market1501,
    "msmt17": msmt17,
    "cuhk_sysu": cuhk_sysu,
    "cuhk02": cuhk02,
    "cuhk03": cuhk03,
    "prid": prid,
    "grid": grid,
    "viper": viper,
    "ilids": ilids,
    "dukemtmcreid": dukemtmcreid,
}

_log = logging.getLogger(__name__)


def load_dataset(
    name: str,
    root: Path | str,
    *,
    cuhk03_boxes: str = "labeled",
    cuhk03_protocol: str = "new",
    msmt17_train: str = "train",
    strict: bool = True,
    legacy: bool = False,
) -> ReidDataset:
    """Read one data set.

    Args:
        name: a key of `lda.protocols.DATASETS`.
        root: the folder that holds the data set's folder, or that folder itself; see each module for its layouts.
        cuhk03_boxes: "labeled" or "detected" crops of CUHK03.
        cuhk03_protocol: "new" (767 / 700 persons), or "classic": 20 splits of 1,367 / 100 in `splits`.
        msmt17_train: "train" (list_train) or "train+val" (both lists) of MSMT17.
        strict: counts must equal the published ones (or STANDIN.json's), names must fit; False only warns.
        legacy: read a data set that its authors have withdrawn.

    Raises:
        UsageError: with everything that is wrong, in one line.
    """
    if name in LEGACY and not legacy:
        raise UsageError(f"{DATASETS[name]} was withdrawn by its authors; legacy=True reads it all the same")
    dataset, survey = survey_dataset(
        name, root, cuhk03_boxes=cuhk03_boxes, cuhk03_protocol=cuhk03_protocol, msmt17_train=msmt17_train
    )
    refused = survey.refused(strict)
    if refused or dataset is None:
        raise UsageError("; ".join(finding.text for finding in refused))
    told = [finding.text for finding in survey.findings if finding.severity >= Severity.WARNING]
    if told:
        warnings.warn("; ".join(told), stacklevel=2)
    for finding in survey.findings:
        _log.info("%s: %s", survey.title, finding.text)
    return dataset


def survey_dataset(
    name: str,
    root: Path | str,
    *,
    cuhk03_boxes: str = "labeled",
    cuhk03_protocol: str = "new",
    msmt17_train: str = "train",
) -> tuple[ReidDataset | None, Survey]:
    """Read one data set as far as possible, with everything that was found; the doctor's view of `load_dataset`."""
    if name not in _MODULES:
        raise UsageError(unknown("data set", name, _MODULES))
    if cuhk03_boxes not in CUHK03_BOXES:
        raise UsageError(f"cuhk03_boxes: {unknown('value', cuhk03_boxes, CUHK03_BOXES)}")
    if cuhk03_protocol not in CUHK03_PROTOCOLS:
        raise UsageError(f"cuhk03_protocol: {unknown('value', cuhk03_protocol, CUHK03_PROTOCOLS)}")
    if msmt17_train not in MSMT17_TRAIN:
        raise UsageError(f"msmt17_train: {unknown('value', msmt17_train, MSMT17_TRAIN)}")
    survey = Survey(name, Path(root).expanduser().absolute())
    try:
        if name == "cuhk03":
            read = cuhk03.read if cuhk03_protocol == "new" else cuhk03.read_classic
            dataset = read(survey, cuhk03_boxes)
        elif name == "msmt17":
            dataset = msmt17.read(survey, msmt17_train)
        else:
            dataset = _MODULES[name].read(survey)
    except UsageError as error:
        survey.error(str(error))
        dataset = None
    except OSError as error:  # unreadable folder, a loop of links
        survey.error(f"{survey.title}: cannot read {error.filename}: {error.strerror}")
        dataset = None
    return dataset, survey
