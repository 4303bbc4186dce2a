"""What a user is told when their input is wrong: one line with the value, what was expected and the nearest choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 15  # more choices than a line holds are not listed


class UsageError(ValueError):
    """A mistake of the user (argument, study file, data folder). Commands print its message and exit with 2."""


class FailedError(RuntimeError):
    """What was asked for cannot be done, through no mistake of the user. Commands print its message and exit with 1."""


def unknown(what: str, value: object, choices: Iterable[str]) -> str:
    """The line for a name that is not among `choices`, with the nearest valid one if any is near."""
    valid = list(choices)
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.4)
    near = near or [choice for choice in valid if choice.lower() == str(value).lower()]  # names are in small letters
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if len(valid) <= _LISTED:
        return f"unknown {what} {value!r}{hint}; expected one of: {', '.join(valid)}"
    nearest = difflib.get_close_matches(str(value), valid, n=5, cutoff=0.0)
    return f"unknown {what} {value!r}{hint}; {len(valid)} are valid, the nearest: {', '.join(nearest)}"
