"""Batch normalisation with a set of statistics, and of gamma and beta, for every source domain.

The set is chosen per pass, or per row of a mixed batch: the row-wise route that methods with domain experts share.

Shapes: X (N, C, H, W) of N images; K domains; set k holds mean_k, var_k, gamma_k, beta_k, each (C,).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.parts.backbones import Backbone, convert_norm
from lda.parts.instance_sites import need_a_map
from lda.parts.routes import Switch


@dataclass(frozen=True)
class OneSet:
    """All images take set `domain`; K is the set beside those of the domains, where there is one.

    running: normalise by the set's running statistics in training too, and write nothing.
    """

    domain: int
    running: bool = False


class Rows(NamedTuple):
    """The images of every domain in a mixed batch.

    Attributes:
        of: (domain, positions of its images) by rising domain, for the domains that are there.
        order: (N,) positions that put the parts, joined in that order, back as the batch was.
    """

    of: list[tuple[int, Tensor]]
    order: Tensor


class RowWise:
    """Image n takes set `domains[n]`: (N,) on the CPU, so that no step waits for a GPU. In training every domain's
    images are normalised by their own batch statistics, as if each domain passed alone."""

    def __init__(self, domains: Tensor) -> None:
        self.domains = domains
        present = [(domain, (domains == domain).nonzero()[:, 0]) for domain in sorted(set(domains.tolist()))]
        order = torch.cat([where for _, where in present]).argsort()
        self._rows = {domains.device: Rows(present, order)}

    def rows(self, device: torch.device) -> Rows:
        """Whose images lie where. Copied to a device once, not at each of a network's fifty layers."""
        if device not in self._rows:
            of, order = self._rows[self.domains.device]
            self._rows[device] = Rows([(domain, where.to(device)) for domain, where in of], order.to(device))
        return self._rows[device]


@dataclass(frozen=True)
class MeanSet:
    """All images take the average over domains of means, variances, gammas and betas (evaluation only)."""


DomainRoute = OneSet | RowWise | MeanSet


class DomainBatchNorm2d(nn.Module):
    """K sets of batch normalisation in the place of one; `switch` chooses.

    Training: batch statistics, which enter the chosen set's running statistics by torch's momentum; evaluation: the
    set's running statistics. A set that is not chosen is neither read nor written, and gets no gradient.

    Args:
        like: layer whose gamma, beta and running statistics every set begins with.
        shared_affine: one gamma and beta for all sets.
        one_beside: a set K that is no domain's, for a branch that shares the convolutions before the layer.
    """

    def __init__(
        self,
        like: nn.BatchNorm2d,
        num_domains: int,
        switch: Switch[DomainRoute],
        shared_affine: bool = False,
        one_beside: bool = False,
    ) -> None:
        super().__init__()
        self.switch, self.num_domains, self.eps = switch, num_domains, like.eps
        self.sets = nn.ModuleList()
        for domain in range(num_domains + one_beside):
            norm = nn.BatchNorm2d(like.num_features, eps=like.eps, momentum=like.momentum)
            norm.load_state_dict(like.state_dict())
            if shared_affine and domain > 0:
                norm.weight, norm.bias = self.norm(0).weight, self.norm(0).bias
            self.sets.append(norm)

    def norm(self, domain: int) -> nn.BatchNorm2d:
        """Set `domain`, as the layer of batch normalisation that it is."""
        norm = self.sets[domain]
        assert isinstance(norm, nn.BatchNorm2d), "every set is made in the constructor"
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). Raises RuntimeError outside `with switch.on(route)`."""
        match self.switch.route:
            case OneSet(domain, running):
                norm = self.norm(domain)
                if running:
                    return F.batch_norm(
                        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=self.eps
                    )
                normalised: Tensor = norm(x)
                return normalised
            case RowWise() as route:
                return self._by_row(x, route.rows(x.device))
            case MeanSet():
                return self._mean(x)

    def _by_row(self, x: Tensor, rows: Rows) -> Tensor:
        if len(rows.of) == 1:
            return self.norm(rows.of[0][0])(x)  # type: ignore[no-any-return]
        return torch.cat([self.norm(domain)(x[where]) for domain, where in rows.of])[rows.order]

    def _mean(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("the average of all sets has no batch statistics: evaluation only")
        norms = [self.norm(domain) for domain in range(self.num_domains)]
        mean = torch.stack([_known(norm.running_mean) for norm in norms]).mean(0)
        var = torch.stack([_known(norm.running_var) for norm in norms]).mean(0)
        weight = torch.stack([norm.weight for norm in norms]).mean(0)
        bias = torch.stack([norm.bias for norm in norms]).mean(0)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=self.eps)


def _known(statistics: Tensor | None) -> Tensor:
    assert statistics is not None, "the sets track running statistics"
    return statistics


def use_domain_norm(
    backbone: Backbone, num_domains: int, shared_affine: bool = False, one_beside: Iterable[nn.Module] = ()
) -> Switch[DomainRoute]:
    """Turn a plain backbone into one with K sets at every normalisation layer. Returns the switch that chooses.

    one_beside: parts of the backbone whose layers have a set K too.
    """
    switch: Switch[DomainRoute] = Switch()
    beside = {module for part in one_beside for module in part.modules()}
    convert_norm(
        backbone, lambda old: DomainBatchNorm2d(old, num_domains, switch, shared_affine, one_beside=old in beside)
    )
    backbone.replay = switch.remembered
    return switch


@contextmanager
def site_distances(network: nn.Module, raw: bool = False) -> Iterator[list[Tensor]]:
    """Passes in here by `OneSet(j)` leave how far every image is from set j at every layer, in the order of the layers.

    META's relevance, over the root of the number of channels so that wide layers do not decide alone:

        W_l,i = sqrt( (|mean_j - mu_i|^2 + |sqrt(var_j) - sqrt(v_i)|^2) / C )        `raw`: without C, as in the release

    mu_i and v_i: mean and unbiased variance over (h, w) of image i in what enters layer l. (N,) per layer, no gradient.
    Raises UsageError on maps of 1 x 1, which have no variance.
    """
    found: list[Tensor] = []

    @torch.no_grad()
    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, DomainBatchNorm2d), "only such layers are watched"
        route = layer.switch.route
        if not isinstance(route, OneSet):
            raise RuntimeError(f"distances to one set need the route OneSet, got {type(route).__name__}")
        need_a_map(inputs[0])
        norm = layer.norm(route.domain)
        var, mean = torch.var_mean(inputs[0].float(), dim=(2, 3), correction=1)
        mean_gap = mean - _known(norm.running_mean)
        deviation_gap = var.sqrt() - _known(norm.running_var).sqrt()
        squares = mean_gap.square() + deviation_gap.square()
        found.append((squares.sum(1) if raw else squares.mean(1)).sqrt())

    hooks = [m.register_forward_pre_hook(measure) for m in network.modules() if isinstance(m, DomainBatchNorm2d)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
