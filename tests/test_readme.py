"""What the README says is so: its links lead somewhere, its methods are those that are there, its commands parse."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lda import methods
from lda.config import preset

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "reports/README.md", "reports/numbers.md", "reports/reproduce.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_row_with_its_file_and_its_cost(name: str) -> None:
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert f"(lda/methods/{name}.py)" in cells[2]
    for num_domains in (3, 4):
        config = preset("standin", method=name)
        cost = methods.build(config.method, config.setup([8] * num_domains)).cost
        train, test = (eval(cell, {"K": num_domains}) for cell in cells[4].split(" / "))  # such as 2+(K-1)/3
        assert train == pytest.approx(cost.train_passes, rel=0.02)
        assert test == pytest.approx(cost.test_forwards, rel=0.02)
        assert (cost.test == "pairs") == ("pairs" in cells[1])


def commands() -> list[str]:
    """Every command of the table "Everyday use"."""
    table = TEXT.split("## Everyday use")[1].split("\n\n")[2]
    return [command for command in re.findall(r"`([^`]+)`", table) if command.startswith("python ")]


@functools.cache
def help_of(program: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", commands())
def test_commands_are_there_and_know_their_options(command: str) -> None:
    words = shlex.split(command)[1:]
    done = help_of(tuple(words[:2] if words[0] == "-m" else words[:1]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    assert [word for word in words if word.startswith("--") and word not in done.stdout] == []
