"""The Buffer Bank: Eq. (3), its file, its picture and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.bank_numbers import domain_distances, read_bank
from lda.parts.bank import BufferBank, pair_distances
from lda.parts.bank_pictures import draw_banks, kept_banks, tabulate_banks
from lda.runs import BUFFER_BANK

C = 5


def test_bank_update_equals_formula() -> None:
    bank = BufferBank(2, C, momentum=0.8)
    first, second = torch.randn(C), torch.randn(C)
    bank.update(0, first, first.exp())
    bank.update(0, second, second.exp())
    torch.testing.assert_close(bank.mean[0], 0.8 * first + 0.2 * second)
    torch.testing.assert_close(bank.var[0], 0.8 * first.exp() + 0.2 * second.exp())


def test_bank_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"momentum=1\.0"):
        BufferBank(2, C, momentum=1.0)


@pytest.fixture
def banks() -> dict[str, BufferBank]:
    made = {"bn1": BufferBank(3, 4, 0.9), "output": BufferBank(3, 400, 0.9)}
    for bank in made.values():
        for domain in range(3):
            bank.update(domain, torch.randn(bank.mean.shape[1]), torch.rand(bank.mean.shape[1]))
    return made


def test_bank_file_holds_the_bank(tmp_path: Path, banks: dict[str, BufferBank]) -> None:
    kept = kept_banks(["a", "b", "c"], banks)[BUFFER_BANK]
    assert kept.caption == "rows per layer: a, b, c"
    np.savez(tmp_path / "bank.npz", **kept.arrays)
    with np.load(tmp_path / "bank.npz", allow_pickle=False) as arrays:
        assert arrays["domains"].tolist() == ["a", "b", "c"]
        assert arrays["layers"].tolist() == ["bn1", "output"]
        for layer, bank in banks.items():
            np.testing.assert_array_equal(arrays[f"mean/{layer}"], bank.mean.numpy())
            np.testing.assert_array_equal(arrays[f"var/{layer}"], bank.var.numpy())
            assert arrays[f"count/{layer}"].tolist() == [1, 1, 1]


def test_distances_of_pairs_are_those_of_the_file(tmp_path: Path, banks: dict[str, BufferBank]) -> None:
    np.savez(tmp_path / "bank.npz", **kept_banks(["a", "b", "c"], banks)[BUFFER_BANK].arrays)
    expected = domain_distances(read_bank(tmp_path / "bank.npz"))
    found = pair_distances(["a", "b", "c"], banks)
    assert found.keys() == {"bank/a-b", "bank/a-c", "bank/b-c"}
    for name, distance in found.items():
        first, second = name.removeprefix("bank/").split("-")
        assert distance == pytest.approx(expected.loc[first, second], rel=1e-6)
    banks["output"].counts[1] = 0  # a domain that some layer never saw has no distance
    assert pair_distances(["a", "b", "c"], banks).keys() == {"bank/a-c"}
    assert pair_distances(["a", "b", "c"], {}) == {}


def test_bank_picture_and_table(banks: dict[str, BufferBank]) -> None:
    picture = draw_banks(banks)
    assert picture.dtype == np.uint8
    assert picture.shape == (2 * 2 * (3 * 6 + 3), 1024, 3)
    columns, rows = tabulate_banks(["a", "b", "c"], banks)
    assert len(rows) == 6
    assert all(len(row) == len(columns) for row in rows)
    assert rows[1][:3] == ["bn1", "b", 1]
    assert rows[1][3] == pytest.approx(banks["bn1"].mean[1].mean().item())
