"""Finished units in the study's database: what comes back is what was put in, or it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sql
from test_runs import a_result, run_folder

from lda.errors import UsageError
from lda.files import write_json
from lda.runs import is_finished
from sweeps.list.archive import Archive, Kept, open_archive
from sweeps.list.storage import engine_of, open_storage, storage_url


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A finished unit with everything that one may have."""
    folder = tmp_path / "a" / "trial-0000" / "market1501-s0"
    run = run_folder(folder)
    run.write_config()
    run.write_environment("cpu")
    for step in (5, 10):
        run.log({"step": step, "lr": 0.1})
    run.keep("buffer_bank", {"mean/layer": np.arange(6.0).reshape(2, 3)})
    (folder / "checkpoint.pt").write_bytes(b"weights")
    run.write_result(a_result(unit="aaa", training="ttt"))
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    found = open_archive(open_storage(storage_url(None, tmp_path), 60, 180), "token")
    assert found is not None
    return found


def test_a_unit_comes_back_to_the_last_byte_and_its_weights_do_not(
    unit: Path, archive: Archive, tmp_path: Path
) -> None:
    archive.keep("trial-0000/market1501-s0", "aaa", unit)
    archive.keep("trial-0000/market1501-s0", "aaa", unit)  # a worker that lost the answer says it again
    assert archive.units() == [Kept("trial-0000/market1501-s0", "aaa")]
    back = tmp_path / "b" / "trial-0000" / "market1501-s0"
    archive.restore("trial-0000/market1501-s0", back)
    assert is_finished(back, "aaa")
    names = ["buffer_bank.npz", "config.json", "env.json", "metrics.jsonl", "result.json"]
    assert sorted(path.name for path in back.iterdir()) == names
    assert all((back / name).read_bytes() == (unit / name).read_bytes() for name in names)


def test_studies_do_not_see_each_other(unit: Path, archive: Archive, tmp_path: Path) -> None:
    archive.keep("trial-0000/market1501-s0", "aaa", unit)
    other = open_archive(open_storage(storage_url(None, tmp_path), 60, 180), "another")
    assert other is not None
    assert other.units() == []
    assert not other.holds("trial-0000/market1501-s0", "aaa")
    with pytest.raises(UsageError, match=r"trial-0000/market1501-s0 is not in the study's database"):
        other.restore("trial-0000/market1501-s0", tmp_path / "b")


@pytest.mark.parametrize("content", [b"", b"no zlib at all"])
def test_what_is_damaged_in_the_database_is_named_and_nothing_is_written(
    unit: Path, archive: Archive, tmp_path: Path, content: bytes
) -> None:
    archive.keep("trial-0000/market1501-s0", "aaa", unit)
    storage = open_storage(storage_url(None, tmp_path), 60, 180)
    engine = engine_of(storage)
    assert engine is not None
    with engine.begin() as connection:
        damage = sql.text("UPDATE lda_unit_files SET content = :content WHERE name = 'metrics.jsonl'")
        connection.execute(damage, {"content": content})
    with pytest.raises(UsageError, match=r"market1501-s0/metrics\.jsonl is damaged in the study's database"):
        archive.restore("trial-0000/market1501-s0", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_journal_has_none(tmp_path: Path) -> None:
    assert open_archive(open_storage(storage_url("journal", tmp_path), 60, 180), "token") is None


def test_another_units_result_is_not_taken_for_it(unit: Path) -> None:
    assert is_finished(unit, "aaa")
    assert not is_finished(unit, "bbb")
    write_json(unit / "result.json", {})
    assert not is_finished(unit, "aaa")
