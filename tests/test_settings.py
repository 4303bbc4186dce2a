"""The one validator: types, bounds, choices, text from a command line, messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lda.errors import UsageError
from lda.settings import Range, Settings, setting, settings_of


@dataclass(frozen=True, kw_only=True)
class Group(Settings):
    rate: float = setting(0.9, "a share", low=0.0, high=0.9999, search=Range(0.5, 0.99))
    count: int = setting(3, "a number", low=1, high=10, standin=2)
    flip: bool = setting(False, "a switch", test=True)
    places: tuple[int, ...] = setting((1, 2), "a list")
    mode: Literal["fused", "aligned"] = setting("fused", "a choice")
    file: str = setting("none", "a text")


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("rate", "1e-3", 0.001),
        ("rate", 0, 0.0),
        ("count", "4", 4),
        ("flip", "yes", True),
        ("flip", "0", False),
        ("places", "(4 5)", (4, 5)),
        ("places", "4,5", (4, 5)),
        ("places", [], ()),
        ("mode", "aligned", "aligned"),
        ("file", "3", "3"),
    ],
)
def test_values_take_the_settings_type(key: str, given: Any, wanted: Any) -> None:
    value = getattr(Group(**{key: given}), key)
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("rate", 1.5, "rate: 1.5 is out of range, expected 0.0 to 0.9999"),
        ("rate", "nan", "rate: nan is out of range, expected 0.0 to 0.9999"),
        ("rate", float("inf"), "rate: inf is out of range"),
        ("rate", "high", "rate: expected a number, got 'high'"),
        ("rate", True, "rate: expected a number, got True"),
        ("count", "2.5", "count: expected a whole number, got '2.5'"),
        ("count", 2.0, "count: expected a whole number, got 2.0"),
        ("count", True, "count: expected a whole number, got True"),
        ("count", 11, "count: 11 is out of range, expected 1 to 10"),
        ("flip", "maybe", "flip: expected true or false, got 'maybe'"),
        ("flip", 1, "flip: expected true or false, got 1"),
        ("places", "3,x", "places: expected a list of whole numbers, got '3,x'"),
        ("places", 3, "places: expected a list of whole numbers, got 3"),
        ("mode", "fusd", r"mode: unknown value 'fusd' \(did you mean 'fused'\?\); expected one of: fused, aligned"),
        ("mode", 3, "mode: unknown value 3"),
        ("file", 3, "file: expected a text, got 3"),
    ],
)
def test_bad_values_are_one_clear_line(key: str, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        Group(**{key: given})
    assert "\n" not in str(caught.value)


def test_a_group_knows_its_settings() -> None:
    known = settings_of(Group)
    assert list(known) == ["rate", "count", "flip", "places", "mode", "file"]
    assert known["rate"].search == Range(0.5, 0.99)
    assert known["count"].standin == 2
    assert known["flip"].test
    assert known["mode"].choices == ("fused", "aligned")
    assert known["rate"].choices == ()


def test_plain_types_come_out() -> None:
    assert Group().to_dict()["places"] == [1, 2]
    assert Group(**Group().to_dict()) == Group()
