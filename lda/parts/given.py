"""Statistics that a layer of LDA normalises an image by, or gives to it: rows of its Buffer Bank, and their controls.

Each kind says how a layer finds them for images X (N, C, h, w): mean and variance, (C,) for the whole batch or (N, C).
None carries a gradient. The controls ask what of the bank matters: its domains, its statistics, or any change at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lda.parts.bank import BufferBank
from lda.parts.donors import draw_donor
from lda.parts.latent import distance, image_statistics, relevance
from lda.parts.losses import Gaussian

_MIXING = 0.1  # MixStyle's alpha


class Given(Protocol):
    """How a layer finds the statistics."""

    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(C,) or (N, C) each, of the layer with this bank, the `site`-th of the network."""


# --- rows of the bank ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One domain's row; `index` is a number, or a tensor of none of its own axes, of which nobody has to wait."""

    index: int | Tensor

    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(C,) each."""
        return Gaussian(bank.mean[self.index], bank.var[self.index])


@dataclass(frozen=True)
class Rows:
    """A row for every image of the batch: N indices."""

    indices: tuple[int, ...]

    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(N, C) each."""
        indices = torch.tensor(self.indices, device=bank.mean.device)
        return Gaussian(bank.mean[indices], bank.var[indices])


@dataclass(frozen=True)
class RowOfLayer:
    """A donor that every layer draws for itself, from (seed, step, site)."""

    domain: int
    seed: int
    step: int

    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(C,) each."""
        donor = draw_donor("uniform", self.domain, len(bank.counts), f"{self.seed} site {site}", self.step)
        return Gaussian(bank.mean[donor], bank.var[donor])


@dataclass(frozen=True)
class MeanRow:
    """The average of all rows: of means, and of variances."""

    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(C,) each."""
        return Gaussian(bank.mean.mean(0), bank.var.mean(0))


@dataclass(frozen=True)
class NearestRow:
    """Of every image the row that its own statistics at this layer are nearest to, by D of Eq. (8)."""

    @torch.no_grad()
    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(N, C) each."""
        own = image_statistics(x)
        gaps = distance(Gaussian(own.mean[:, None], own.var[:, None]), Gaussian(bank.mean, bank.var))
        nearest = gaps.argmin(1)
        return Gaussian(bank.mean[nearest], bank.var[nearest])


@dataclass(frozen=True)
class WeightedRows:
    """Of every image the average of the rows, weighted by `relevance` to its own statistics at this layer."""

    @torch.no_grad()
    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(N, C) each."""
        weights = relevance(image_statistics(x), Gaussian(bank.mean, bank.var))
        return Gaussian(weights @ bank.mean, weights @ bank.var)


@dataclass(frozen=True)
class MeanRowAndOwn:
    """Half the average of all rows and half the image's own statistics, as ReNorm's layers mix theirs."""

    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(N, C) each."""
        own = image_statistics(x)
        return Gaussian((own.mean + bank.mean.mean(0)) / 2, (own.var + bank.var.mean(0)) / 2)


# --- controls --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianStatistics:
    """No domain's: drawn for every channel from the spread that the average row has over channels, from (seed, step,
    site); the mean from a normal distribution, the variance from a lognormal one."""

    seed: int
    step: int

    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(C,) each."""
        row = MeanRow().statistics(bank, site, x)
        drawn = np.random.default_rng([self.seed, self.step, site, 7]).standard_normal((2, len(row.mean)))
        noise = torch.from_numpy(drawn).to(row.mean)
        logs = (row.var + 1e-5).log()
        mean = row.mean.mean() + row.mean.std(correction=0) * noise[0]
        return Gaussian(mean, (logs.mean() + logs.std(correction=0) * noise[1]).exp())


@dataclass(frozen=True)
class OtherImages:
    """Of every image a mixture of its own statistics and those of another image of the batch, as MixStyle mixes styles:
    lambda from a Beta distribution, the partner from a permutation, both from (seed, step, site)."""

    seed: int
    step: int

    @torch.no_grad()
    def statistics(self, bank: BufferBank, site: int, x: Tensor) -> Gaussian:
        """(N, C) each."""
        random = np.random.default_rng([self.seed, self.step, site, 8])
        share = torch.from_numpy(random.beta(_MIXING, _MIXING, (len(x), 1))).to(bank.mean)
        partner = torch.from_numpy(random.permutation(len(x))).to(x.device)
        own = image_statistics(x)
        deviation = own.var.sqrt()
        mixed = share * deviation + (1 - share) * deviation[partner]
        return Gaussian(share * own.mean + (1 - share) * own.mean[partner], mixed.square())
