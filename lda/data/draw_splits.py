"""How the shipped test splits were drawn: `python -m lda.data.draw_splits` compares the files, `--write` writes them.

Person p comes before person q in split s of data set d if SHA-256("lda-reid/1/d/s/p") is below
SHA-256("lda-reid/1/d/s/q"); a draw of i-LIDS is the digest of "lda-reid/1/d/s/p/query" or ".../gallery", modulo 840.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from lda.arguments import Parser, checked, output_folder
from lda.command import exit_code
from lda.data.splits import DRAWS, FOLDER, FORMAT, NUM_SPLITS, RULES, digest
from lda.files import atomic


def draw(name: str) -> dict[str, Any]:
    """The content of a data set's split file, drawn by the generator."""
    rule = RULES[name]
    persons = range(rule.first, rule.last + 1)
    splits = []
    for number in range(NUM_SPLITS):
        order = sorted(persons, key=lambda person: _hash(name, number, person))
        split = {"order": order}
        if rule.draws_images:
            for role in ("query", "gallery"):
                split[role] = [int(_hash(name, number, person, role), 16) % DRAWS for person in order]
        splits.append(split)
    content = {"format": FORMAT, "dataset": name, "test_persons": rule.test_persons, "splits": splits}
    return {**content, "sha256": digest(content)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_code(lambda: _compare(parse_arguments(arguments).write))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.data.draw_splits", description="Compare the shipped test splits with their generator."
    )
    parser.add_argument("--write", action="store_true", help="write the files instead")
    options = parser.parse_args(arguments)
    if options.write:
        checked("--write", output_folder, FOLDER)
    return options


def _compare(write: bool) -> int:
    """Compare the files with their generator, or write them; 1 if any differs."""
    differing = []
    for name in RULES:
        path, text = FOLDER / f"{name}.json", _text(draw(name))
        if write:
            with atomic(path) as file:
                file.write(text)
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            differing.append(path.name)
    if differing:
        print(f"error: {', '.join(differing)} in {FOLDER} differ from the generator", file=sys.stderr)
        return 1
    print(f"{len(RULES)} split files in {FOLDER} {'written' if write else 'agree with their generator'}")
    return 0


def _hash(name: str, split: int, person: int, *more: str) -> str:
    key = "/".join(["lda-reid", str(FORMAT), name, str(split), str(person), *more])
    return hashlib.sha256(key.encode()).hexdigest()


def _text(content: dict[str, Any]) -> str:
    """JSON with one line per list, to keep the file readable and its changes visible."""
    plain = {key: value for key, value in content.items() if key != "splits"}
    splits = ",\n".join("  " + json.dumps(split).replace("], ", "],\n   ") for split in content["splits"])
    return json.dumps(plain, indent=1)[:-2] + f',\n "splits": [\n{splits}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
