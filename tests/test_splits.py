"""The shipped test splits: unchanged, reproducible, balanced."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lda.data import draw_splits, splits
from lda.data.splits import FOLDER, RULES, Draw, load_draws
from lda.errors import UsageError


@pytest.mark.parametrize("name", list(RULES))
def test_files_are_the_generators(name: str) -> None:
    assert json.loads((FOLDER / f"{name}.json").read_text()) == draw_splits.draw(name)


@pytest.mark.parametrize("name", list(RULES))
def test_orders_are_permutations_by_digest(name: str) -> None:
    draws = load_draws(name)
    rule = RULES[name]
    assert len(draws) == 10
    assert len({draw.order for draw in draws}) == 10
    for number, draw in enumerate(draws):
        assert sorted(draw.order) == list(range(rule.first, rule.last + 1))
        digests = [hashlib.sha256(f"lda-reid/1/{name}/{number}/{p}".encode()).hexdigest() for p in draw.order]
        assert digests == sorted(digests)
        assert bool(draw.query) == bool(draw.gallery) == rule.draws_images
        assert len(draw.query) in (0, len(draw.order))
        assert all(0 <= value < 840 for value in (*draw.query, *draw.gallery))


def test_test_persons_of_the_first_split_never_change() -> None:
    """Published numbers rest on them."""
    first = {name: load_draws(name)[0].order[:5] for name in RULES}
    digest = hashlib.sha256(json.dumps({name: list(order) for name, order in first.items()}).encode()).hexdigest()
    assert digest[:16] == "2800b9be5459e281"


def test_tested_persons_are_those_present() -> None:
    draw = Draw(order=(5, 2, 9, 1, 7))
    assert draw.tested({1, 2, 5, 7, 9}, 3) == [2, 5, 9]
    assert draw.tested({1, 2, 5, 7}, 3) == [1, 2, 5]  # 9 is lost: the next one comes in, nobody else moves
    assert draw.tested({1}, 3) == [1]


def test_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDER, tmp_path / "files")
    monkeypatch.setattr(splits, "FOLDER", tmp_path / "files")
    path = tmp_path / "files/prid.json"
    text = path.read_text()
    path.write_text(re.sub(r'"order": \[(\d+), (\d+),', r'"order": [\2, \1,', text, count=1))
    with pytest.raises(UsageError, match=r"prid\.json: changed since it was shipped"):
        load_draws("prid")
    path.write_text(text[:100])
    with pytest.raises(UsageError, match=r"prid\.json: not a split file"):
        load_draws("prid")
    path.unlink()
    with pytest.raises(UsageError, match=r"prid\.json: not a split file .*No such file"):
        load_draws("prid")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = subprocess.run([sys.executable, "-m", "lda.data.draw_splits"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "4 split files" in result.stdout
    monkeypatch.setattr(draw_splits, "FOLDER", tmp_path / "new")
    assert draw_splits.main([]) == 1
    assert "grid.json" in capsys.readouterr().err
    assert draw_splits.main(["--write"]) == 0
    assert draw_splits.main([]) == 0
    assert (tmp_path / "new/viper.json").read_bytes() == (FOLDER / "viper.json").read_bytes()
