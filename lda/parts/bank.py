"""The Buffer Bank: statistics of every source domain at one layer.

Shapes: K source domains, C channels; row k of a bank holds domain k.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lda.bank_distance import row_distances


class BufferBank(nn.Module):
    """Statistics of K domains over C channels: no gradient, kept in the state dict.

    Eq. (3) of LDA: mu_k <- m mu_k + (1 - m) mu_b and v_k <- m v_k + (1 - m) v_b with v_b the unbiased batch variance;
    the first update of a row copies, so that no row ever holds a mixture with its initial value.

    Args:
        num_domains: K.
        num_features: C.
        momentum: m in [0, 1); torch's BatchNorm calls 1 - m its momentum.
        copy_first: False: rows begin at zero, mean and variance, and the first update is like any other (ReNorm).
    """

    mean: Tensor  # (K, C)
    var: Tensor  # (K, C)

    def __init__(self, num_domains: int, num_features: int, momentum: float, copy_first: bool = True) -> None:
        super().__init__()
        if num_domains < 1 or not 0.0 <= momentum < 1.0:
            raise ValueError(f"expected num_domains >= 1 and 0 <= momentum < 1, got {num_domains=} {momentum=}")
        self.momentum, self.copy_first = momentum, copy_first
        self.counts = [0] * num_domains  # python integers: read every step without waiting for a GPU
        self.register_buffer("mean", torch.zeros(num_domains, num_features))
        self.register_buffer("var", torch.full((num_domains, num_features), float(copy_first)))

    def count_update(self, domain: int) -> float:
        """Count an update of row `domain` and return the share 1 - m of the new batch in it (1 for a first copy)."""
        self.counts[domain] += 1
        return 1.0 if self.copy_first and self.counts[domain] == 1 else 1.0 - self.momentum

    @torch.no_grad()
    def fill(self, mean: Tensor, var: Tensor) -> None:
        """Let every row begin with these statistics, (C,) each; they count as no update."""
        self.mean.copy_(mean.expand_as(self.mean))
        self.var.copy_(var.expand_as(self.var))

    @torch.no_grad()
    def update(self, domain: int, mean: Tensor, var: Tensor) -> None:
        """Eq. (3) for statistics computed elsewhere: mean and unbiased var, both (C,)."""
        share = self.count_update(domain)
        self.mean[domain].lerp_(mean, share)
        self.var[domain].lerp_(var, share)

    def seen(self) -> list[int]:
        """The domains whose row holds statistics."""
        return [k for k, count in enumerate(self.counts) if count > 0]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.counts)

    def set_extra_state(self, state: Tensor) -> None:
        self.counts = state.tolist()

    def extra_repr(self) -> str:
        return f"num_domains={len(self.counts)}, num_features={self.mean.shape[1]}, momentum={self.momentum}"


def pair_distances(domains: Sequence[str], banks: Mapping[str, BufferBank]) -> dict[str, float]:
    """`bank/<a>-<b>` -> `row_distances` of two domains, mean over layers, for every pair that all layers have seen."""
    if not banks:
        return {}
    seen = sorted(set.intersection(*(set(bank.seen()) for bank in banks.values())))
    rows = [
        row_distances(bank.mean[seen].double().cpu().numpy(), bank.var[seen].double().sqrt().cpu().numpy())
        for bank in banks.values()
    ]
    between = np.mean(rows, axis=0)
    pairs = itertools.combinations(range(len(seen)), 2)
    return {f"bank/{domains[seen[a]]}-{domains[seen[b]]}": float(between[a, b]) for a, b in pairs}


def bank_arrays(domains: Sequence[str], banks: Mapping[str, BufferBank]) -> dict[str, NDArray[Any]]:
    """The content of buffer_bank.npz; its keys are documented in `lda/runs.py`."""
    arrays: dict[str, NDArray[Any]] = {"domains": np.array(domains), "layers": np.array(list(banks))}
    for layer, bank in banks.items():
        arrays[f"mean/{layer}"] = bank.mean.cpu().numpy()
        arrays[f"var/{layer}"] = bank.var.cpu().numpy()
        arrays[f"count/{layer}"] = np.array(bank.counts)
    return arrays
