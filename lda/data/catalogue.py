"""The data sets: every file of `lda/data/sets/` is one, its file name is the data set's name.

Such a file holds two things:
    FACTS                    what is known before anything is read, a `Facts`
    read(survey, options)    the reader: a `ReidDataset`, or None with findings in `survey`
Nothing else has to be told of it; `lda/protocols.py` says who trains and who is tested.

A data set of your own needs no Python: a CSV and a few lines of YAML, see `lda/data/own.py`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, cast

from lda.data import own, table
from lda.errors import UsageError, unknown

if TYPE_CHECKING:
    from lda.data.options import DataOptions
    from lda.data.own import OwnSet
    from lda.data.records import ReidDataset
    from lda.data.survey import Survey

_SETS = "lda.data.sets"

Role = Literal["files", "extent", "division"]
"""What an option of a data set chooses.

files      between files of which one kind suffices, such as hand-drawn or detected boxes
extent     how much is read; the last choice reads the most
division   how the same images are divided for testing
"""


NOT_STATED = "not stated"
"""Of a licence or citation that neither a release nor a paper of ours gives."""


class Terms(NamedTuple):
    """What a data set asks of whoever uses it, one line each."""

    licence: str
    citation: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about a data set before it is read.

    Attributes:
        title: name in print.
        licence, citation: one line each, what its authors say; `NOT_STATED` where nothing is known.
        order: place in lists, and of its colour in figures; those that name none come last, by their name in code.
        cameras: the camera numbers say who shares a camera. False: the same-camera rule would invalidate every query.
        single_shot: every query has one match, which the camera rule keeps: mINP must equal mAP.
        withdrawn: by its authors; read only on request.
        tested: it has a query and a gallery. False: it is always trained on as a whole.
        options: the `DataOptions` that its `read` looks at, and what each of them chooses.
    """

    title: str
    licence: str = NOT_STATED
    citation: str = NOT_STATED
    order: int = 1000
    cameras: bool = True
    single_shot: bool = False
    withdrawn: bool = False
    tested: bool = True
    options: Mapping[str, Role] = field(default_factory=dict)

    def chosen_by(self, role: Role) -> list[str]:
        """The options of one role."""
        return [name for name, own in self.options.items() if own == role]


class SetFile(Protocol):
    """A file of `lda/data/sets/`."""

    FACTS: Facts

    @staticmethod
    def read(survey: Survey, options: DataOptions, /) -> ReidDataset | None:
        """Read it below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""


def names() -> tuple[str, ...]:
    """Every data set's name in code, in the order in which lists show them.

    Raises UsageError for a mistake in the files of your own (`lda.data.own`).
    """
    return tuple(sorted((*_files(), *_own()), key=lambda name: (facts(name).order, name)))


def find(name: str) -> SetFile:
    """A data set's file. Raises UsageError naming the nearest if there is none, or if it lacks `FACTS` or `read`."""
    if (described := _own().get(name)) is not None:
        read = functools.partial(table.read, described)
        return cast(SetFile, SimpleNamespace(FACTS=_facts_of(described), read=read))
    if name not in _files():
        raise UsageError(unknown("data set", name, names()))
    module = importlib.import_module(f"{_SETS}.{name}")
    for part in ("FACTS", "read"):
        if not hasattr(module, part):
            raise UsageError(f"{module.__file__}: a data set's file needs {part}, see lda/data/catalogue.py")
    return cast(SetFile, module)


def facts(name: str) -> Facts:
    """What is known about a data set. Raises UsageError as `find`."""
    return find(name).FACTS


def title(name: str) -> str:
    """A data set's name in print; a name that is not ours stays as it is."""
    return facts(name).title if name in (*_files(), *_own()) else name


def terms(name: str, drawn: bool) -> Terms:
    """Licence and citation of the images that were read. `drawn`: they are the stand-in's, which only imitate it."""
    known = facts(name)
    if drawn and name in _files():
        return Terms("MIT: drawn by this software, no image of the data set", f"imitates: {known.citation}")
    return Terms(known.licence, known.citation)


def _files() -> list[str]:
    return [file.name for file in pkgutil.iter_modules(importlib.import_module(_SETS).__path__)]


def _own() -> Mapping[str, OwnSet]:
    """Your own. Raises UsageError for one that has the name of another's file."""
    found = own.sets()
    for name in sorted(found.keys() & _files()) if found else []:
        raise UsageError(f"{found[name].place}: name: {name!r} is a data set of lda/data/sets; choose another name")
    return found


def _facts_of(described: OwnSet) -> Facts:
    return Facts(
        title=described.title, licence=described.licence, citation=described.citation, cameras=described.cameras
    )
