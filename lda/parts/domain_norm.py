"""Batch normalisation with a set of statistics, and of gamma and beta, for every source domain.

The set is chosen per pass, or per row of a mixed batch: the row-wise route that methods with domain experts share.

Shapes: X (N, C, H, W) of N images; K domains; set k holds mean_k, var_k, gamma_k, beta_k, each (C,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.parts.backbones import Backbone, convert_norm
from lda.parts.routes import RecordingLayer, Switch


@dataclass(frozen=True)
class OneSet:
    """All images take set `domain`."""

    domain: int


@dataclass(frozen=True, eq=False)
class RowWise:
    """Image n takes set `domains[n]`: (N,) on the CPU, so that no step waits for a GPU. In training every domain's
    images are normalised by their own batch statistics, as if each domain passed alone."""

    domains: Tensor


@dataclass(frozen=True)
class MeanSet:
    """All images take the average over domains of means, variances, gammas and betas (evaluation only)."""


DomainRoute = OneSet | RowWise | MeanSet


class DomainBatchNorm2d(RecordingLayer):
    """K sets of batch normalisation in the place of one; `switch` chooses.

    Training: batch statistics, which enter the chosen set's running statistics by torch's momentum; evaluation: the
    set's running statistics. A set that is not chosen is neither read nor written, and gets no gradient.

    Args:
        like: layer whose gamma, beta and running statistics every set begins with.
        shared_affine: one gamma and beta for all sets.
    """

    def __init__(
        self, like: nn.BatchNorm2d, num_domains: int, switch: Switch[DomainRoute], shared_affine: bool = False
    ) -> None:
        super().__init__()
        self.switch, self.num_domains, self.eps = switch, num_domains, like.eps
        self.momentum = 0.1 if like.momentum is None else like.momentum
        self.sets = nn.ModuleList()
        for domain in range(num_domains):
            norm = nn.BatchNorm2d(like.num_features, eps=like.eps, momentum=like.momentum)
            norm.load_state_dict(like.state_dict())
            if shared_affine and domain > 0:
                norm.weight, norm.bias = self._set(0).weight, self._set(0).bias
            self.sets.append(norm)

    def _set(self, domain: int) -> nn.BatchNorm2d:
        norm = self.sets[domain]
        assert isinstance(norm, nn.BatchNorm2d), "every set is made in the constructor"
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). Raises RuntimeError outside `with switch.on(route)`."""
        match self.switch.route:
            case OneSet(domain):
                normalised: Tensor = self.sets[domain](x)
                return normalised
            case RowWise(domains):
                return self._by_row(x, domains)
            case MeanSet():
                return self._mean(x)

    def _by_row(self, x: Tensor, domains: Tensor) -> Tensor:
        rows = [(domain, (domains == domain).nonzero()[:, 0].to(x.device)) for domain in sorted(set(domains.tolist()))]
        if len(rows) == 1:
            return self._set(rows[0][0])(x)  # type: ignore[no-any-return]
        parts = [self._set(domain)(x[where]) for domain, where in rows]
        order = torch.cat([where for _, where in rows])
        return torch.cat(parts)[order.argsort()]

    def _mean(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("the average of all sets has no batch statistics: evaluation only")
        norms = [self._set(domain) for domain in range(self.num_domains)]
        mean = torch.stack([_known(norm.running_mean) for norm in norms]).mean(0)
        var = torch.stack([_known(norm.running_var) for norm in norms]).mean(0)
        weight = torch.stack([norm.weight for norm in norms]).mean(0)
        bias = torch.stack([norm.bias for norm in norms]).mean(0)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=self.eps)


def _known(statistics: Tensor | None) -> Tensor:
    assert statistics is not None, "the sets track running statistics"
    return statistics


def use_domain_norm(backbone: Backbone, num_domains: int, shared_affine: bool = False) -> Switch[DomainRoute]:
    """Turn a plain backbone into one with K sets at every normalisation layer. Returns the switch that chooses."""
    switch: Switch[DomainRoute] = Switch()
    convert_norm(backbone, lambda old: DomainBatchNorm2d(old, num_domains, switch, shared_affine))
    backbone.replay = switch.remembered
    return switch
