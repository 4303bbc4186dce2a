"""The method's core: the Buffer Bank and the normalisation layer with its two paths, Network-E and Network-A.

Shapes: X (N, C, H, W) convolution output of N images; K source domains; row k of a bank holds domain k.
Symbols: k the batch's own domain, j != k the donor, m the bank momentum, gamma and beta the layer's affine.
Equation numbers are those of the README's table "The method".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Expert:
    """Network-E on a batch of one domain. Training: the batch's own statistics, which enter bank row `domain`
    (unless `record` is False); evaluation: bank row `domain` itself."""

    domain: int
    record: bool = True


@dataclass(frozen=True)
class AntiNormalised:
    """Network-A: per-image statistics are replaced by bank row `donor`; None keeps plain instance normalisation."""

    donor: int | None


@dataclass(frozen=True)
class MeanExpert:
    """Network-E on an unseen domain: every layer normalises with the average of its bank's rows."""


Route = Expert | AntiNormalised | MeanExpert


class Switch:
    """Says which path the pass under way takes; one object shared by all layers of a network."""

    def __init__(self) -> None:
        self.route: Route | None = None

    @contextmanager
    def on(self, route: Route | None) -> Iterator[None]:
        """Take `route` inside the `with` block."""
        before, self.route = self.route, route
        try:
            yield
        finally:
            self.route = before


class BufferBank(nn.Module):
    """Statistics of K domains over C channels: no gradient, kept in the state dict.

    Eq. (3): mu_k <- m mu_k + (1 - m) mu_b and v_k <- m v_k + (1 - m) v_b with v_b the unbiased batch variance; the
    first update of a row copies, so that no row ever holds a mixture with its initial value.

    Args:
        num_domains: K.
        num_features: C.
        momentum: m in [0, 1); torch's BatchNorm calls 1 - m its momentum.
    """

    mean: Tensor  # (K, C)
    var: Tensor  # (K, C)

    def __init__(self, num_domains: int, num_features: int, momentum: float) -> None:
        super().__init__()
        if num_domains < 1 or not 0.0 <= momentum < 1.0:
            raise ValueError(f"expected num_domains >= 1 and 0 <= momentum < 1, got {num_domains=} {momentum=}")
        self.momentum = momentum
        self.counts = [0] * num_domains  # python integers: read every step without waiting for a GPU
        self.register_buffer("mean", torch.zeros(num_domains, num_features))
        self.register_buffer("var", torch.ones(num_domains, num_features))

    def count_update(self, domain: int) -> float:
        """Count an update of row `domain` and return the share 1 - m of the new batch in it (1 the first time)."""
        self.counts[domain] += 1
        return 1.0 if self.counts[domain] == 1 else 1.0 - self.momentum

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


class BufferBankNorm2d(nn.Module):
    """A normalisation layer whose statistics are kept per source domain, with two paths chosen by `switch`.

    Network-E, Eqs. (1)-(3):  E_k(X) = gamma (X - mu_b) / sqrt(v_b + eps) + beta
    with mu_b and v_b the batch's mean and variance over (n, h, w), which enter row k of the bank.

    Network-A, Eq. (4):  AN(X_i) = sqrt(v_j + eps) (X_i - mu_i) / sqrt(v_i + eps) + mu_j
    with mu_i and v_i the mean and variance of image i over (h, w), and mu_j, v_j row j of the bank, read only.

    gamma and beta are shared by all domains, so the layer has exactly the parameters of `nn.BatchNorm2d`, and with one
    domain it is that layer.

    AN *replaces* the normalisation of a layer: followed by normalisation with the same row j it would cancel to plain
    instance normalisation.

    Args:
        bank: the K x C Buffer Bank of this layer.
        switch: shared by the network.
        an_affine: False: sigma_j and mu_j take the place of gamma and beta; True: gamma AN + beta.
    """

    def __init__(self, bank: BufferBank, switch: Switch, an_affine: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        num_features = bank.mean.shape[1]
        self.bank, self.switch, self.an_affine, self.eps = bank, switch, an_affine, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). Raises RuntimeError outside `with switch.on(route)`."""
        match self.switch.route:
            case Expert(domain, record):
                return self._expert(x, domain, record)
            case AntiNormalised(donor):
                return self._anti_normalised(x, donor)
            case MeanExpert():
                mean, var = self.bank.mean.mean(0), self.bank.var.mean(0)
                return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)
            case None:
                raise RuntimeError("a Buffer Bank network needs a route: call it inside `with switch.on(...)`")

    def _expert(self, x: Tensor, domain: int, record: bool) -> Tensor:
        mean, var = self.bank.mean[domain], self.bank.var[domain]  # views: the kernel writes Eq. (3) into them
        if not self.training:
            return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)
        # A share of 0 leaves the row as it is, and saves the same tensors for the backward pass as recording does.
        share = self.bank.count_update(domain) if record else 0.0
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=share, eps=self.eps)

    def _anti_normalised(self, x: Tensor, donor: int | None) -> Tensor:
        if donor is None:
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        mean, deviation = self.bank.mean[donor], (self.bank.var[donor] + self.eps).sqrt()  # Eq. (4): mu_j, sigma_j
        if self.an_affine:
            mean, deviation = self.weight * mean + self.bias, self.weight * deviation
        return F.instance_norm(x, weight=deviation, bias=mean, eps=self.eps)


def named_banks(network: nn.Module) -> Iterator[tuple[str, BufferBank]]:
    """(layer name, bank) of every Buffer Bank layer, in network order."""
    for name, module in network.named_modules():
        if isinstance(module, BufferBankNorm2d):
            yield name, module.bank
