"""One setting a line: default, bounds, what a search should try, where the value comes from; and the one validator.

A group of settings is a frozen dataclass that derives from `Settings`; its annotations say the types, and `Literal`
the choices. Marks of provenance: `poster` = printed on the LDA poster; a method's name = its paper or release; `field`
= what most re-identification code uses; `assumed` = our reading, nothing published.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lda.errors import UsageError, unknown


class Range(NamedTuple):
    """Where a search should look: `low` to `high`, on a log scale or in whole steps."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


@dataclass(frozen=True)
class Setting:
    """What is known about one setting beside its type.

    Attributes:
        name: key on the command line and in files, the same in every group: keys are flat.
        kind: annotated type; a `Literal` lists the choices.
        default: value of the recipe for real data.
        help, source: one line each; where the default comes from.
        low, high: inclusive bounds.
        standin: value of the recipe for the stand-in; None: the same.
        search: range and scale that a search should use; None for choices, which are all tried.
        test: changes how a trained network is used, not what is learnt.
        later: it joined when there were finished runs: at its default it is left out of their hashes, which so stay.
    """

    name: str
    kind: Any
    default: Any
    help: str
    source: str
    low: float | None
    high: float | None
    standin: Any
    search: Range | None
    test: bool
    later: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a setting that has a list of them."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


def setting(
    default: Any,
    help: str,
    source: str = "assumed",
    *,
    low: float | None = None,
    high: float | None = None,
    standin: Any = None,
    search: Range | None = None,
    test: bool = False,
    later: bool = False,
) -> Any:
    """A dataclass field that is a setting; see `Setting` for the arguments."""
    known = {"help": help, "source": source, "low": low, "high": high, "standin": standin, "search": search}
    return field(default=default, metadata={**known, "test": test, "later": later})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings. Raises UsageError naming the key when a value has a wrong type or is out of range."""

    def __post_init__(self) -> None:
        group: Any = type(self)  # mypy takes a class with a hash of its own for unhashable
        for name, known in settings_of(group).items():
            object.__setattr__(self, name, checked(known, getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, one entry per setting."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


def settings_of(group: type[Settings]) -> Mapping[str, Setting]:
    """Name -> setting of a group, in the order in which they are written."""
    if group not in _KNOWN:
        kinds = get_type_hints(group)
        _KNOWN[group] = {
            f.name: Setting(name=f.name, kind=kinds[f.name], default=f.default, **f.metadata)
            for f in dataclasses.fields(group)
        }
    return _KNOWN[group]


_KNOWN: dict[type[Settings], Mapping[str, Setting]] = {}  # functools.cache, as mypy sees it, takes no class


@functools.cache
def _adapter(known: Setting) -> TypeAdapter[Any]:
    bounds: dict[str, Any] = {"ge": known.low, "le": known.high, "allow_inf_nan": False}
    kind: Any = Annotated[known.kind, Field(**bounds)] if known.kind in (int, float) else known.kind
    return TypeAdapter(kind)


def checked(known: Setting, value: Any) -> Any:
    """`value` in the setting's type and within its bounds; text (of a command line) is converted.

    Raises UsageError in one line that begins with the setting's name.
    """
    is_tuple = get_origin(known.kind) is tuple
    if known.kind is str and value == "":
        raise UsageError(f"{known.name}: expected a text, got an empty one")
    try:
        if is_tuple and isinstance(value, str):
            return _adapter(known).validate_python(tuple(value.strip("()[] ").replace(",", " ").split()))
        if isinstance(value, str) and known.kind is not str and not known.choices:
            return _adapter(known).validate_strings(value)
        return _adapter(known).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] in ("greater_than_equal", "less_than_equal", "finite_number"):
            low, high = known.low, known.high
            number = known.kind(value) if isinstance(value, str) else value
            raise UsageError(f"{known.name}: {number!r} is out of range, expected {low} to {high}") from None
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(known.kind)
        if is_tuple:
            wanted = "a list of whole numbers"
        text = f"expected {wanted}, got {value!r}" if wanted else explained(first)
        raise UsageError(f"{known.name}: {text}") from None


def explained(mistake: ErrorDetails) -> str:
    """What pydantic found wrong with one value, in the words of `lda.errors`."""
    if mistake["type"] == "literal_error":
        choices = [choice.strip("' ") for choice in mistake["ctx"]["expected"].replace(" or ", ",").split(",")]
        return unknown("value", mistake["input"], choices)
    message = mistake["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"expected {message}, got {mistake['input']!r}"
