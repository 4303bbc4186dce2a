"""The glossary of logged numbers in reports/numbers.md, as a test can ask it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parent.parent / "reports" / "numbers.md"


def unexplained(names: Iterable[str]) -> list[str]:
    """The names that no line of the glossary explains; step and epoch need no explanation."""
    rules = list(map(_rule, explained()))
    return sorted(name for name in {*names} - {"step", "epoch"} if not any(rule.fullmatch(name) for rule in rules))


def explained() -> list[str]:
    """The names as they stand in the glossary."""
    table = PAGE.read_text(encoding="utf-8").split("| logged | meaning |")[1]
    heads = [line.split("|")[1] for line in table.splitlines() if line.count("|") > 1]
    return [name for head in heads for name in re.findall(r"`([^`]+)`", head)]


def _rule(name: str) -> re.Pattern[str]:
    """Of a name with <places> for other names; one that ends with a slash stands for all that begin so."""
    parts = re.split(r"<\w+>", name)
    return re.compile(r"\w+".join(map(re.escape, parts)) + (".+" if name.endswith("/") else ""))
