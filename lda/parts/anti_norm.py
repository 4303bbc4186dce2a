"""The normalisation layer of LDA with its Buffer Bank and its two paths: equations (1) to (4) of its file.

Shapes: a layer's input X is (N, C, H, W); K source domains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.parts.backbones import Backbone, convert_norm
from lda.parts.bank import BufferBank
from lda.parts.given import Given, MeanRow
from lda.parts.losses import Gaussian
from lda.parts.routes import RecordingLayer, Switch

Affine = Literal["none", "shared", "renormalised"]
Start = Literal["first_batch", "pretrained", "zeros"]
Sites = Literal["all", "no_stem", "stages_1_2", "stages_1_2_3", "stages_3_4"]


# --- the ways through a layer ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    """Network-E on a batch of one domain. Training: the batch's own statistics, which enter bank row `domain`;
    evaluation: bank row `domain` itself."""

    domain: int


@dataclass(frozen=True)
class AntiNormalised:
    """Network-A: per-image statistics are replaced by those that `given` finds, in training a donor's row."""

    given: Given


@dataclass(frozen=True)
class InstanceNormalised:
    """The second path without a bank: gamma (X_i - mu_i) / sigma_i + beta."""


@dataclass(frozen=True)
class UnseenExpert:
    """Network-E on an unseen domain: every layer normalises by what `given` finds."""

    given: Given = field(default_factory=MeanRow)


Route = Expert | AntiNormalised | InstanceNormalised | UnseenExpert


# --- the layer -------------------------------------------------------------------------------------------------------


class BufferBankNorm2d(RecordingLayer):
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
        affine: what comes after AN, see `after_an`.
        site: number of the layer in its network.
    """

    def __init__(
        self, bank: BufferBank, switch: Switch[Route], affine: Affine = "none", eps: float = 1e-5, site: int = 0
    ) -> None:
        super().__init__()
        num_features = bank.mean.shape[1]
        self.bank, self.switch, self.affine, self.eps, self.site = bank, switch, affine, eps, site
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.camera: nn.BatchNorm2d | None = None

    def watch_camera(self) -> None:
        """Let `UnseenExpert` normalise by statistics that a camera's images give (`take_camera_statistics`)."""
        self.camera = nn.BatchNorm2d(len(self.weight), eps=self.eps, affine=False).to(self.weight.device).eval()
        assert self.camera.running_mean is not None, "it tracks them"
        assert self.camera.running_var is not None, "it tracks them"
        self.camera.running_mean.copy_(self.bank.mean.mean(0))
        self.camera.running_var.copy_(self.bank.var.mean(0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). Raises RuntimeError outside `with switch.on(route)`."""
        match self.switch.route:
            case Expert(domain):
                return self._expert(x, domain)
            case AntiNormalised(given):
                return self._anti_normalised(x, given.statistics(self.bank, self.site, x))
            case InstanceNormalised():
                return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
            case UnseenExpert() if self.camera is not None:
                normalised: Tensor = self.camera(x)
                return self.weight[:, None, None] * normalised + self.bias[:, None, None]
            case UnseenExpert(given):
                return self._normalised_by(x, given.statistics(self.bank, self.site, x))

    def _expert(self, x: Tensor, domain: int) -> Tensor:
        mean, var = self.bank.mean[domain], self.bank.var[domain]  # views: the kernel writes Eq. (3) into them
        if not self.training:
            return self._normalised_by(x, Gaussian(mean, var))
        # A share of 0 leaves the row as it is, and saves the same tensors for the backward pass as recording does.
        share = self.bank.count_update(domain) if self.recording else 0.0
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=share, eps=self.eps)

    def _normalised_by(self, x: Tensor, by: Gaussian) -> Tensor:
        """gamma (X - mean) / sqrt(var + eps) + beta, by statistics (C,), or of every image (N, C)."""
        if by.mean.ndim == 1:
            return F.batch_norm(x, by.mean, by.var, self.weight, self.bias, training=False, eps=self.eps)
        scale = self.weight / (by.var + self.eps).sqrt()
        return _affine(x, scale, self.bias - scale * by.mean)

    def _anti_normalised(self, x: Tensor, given: Gaussian) -> Tensor:
        scale, shift = self.after_an(given)
        if scale.ndim == 1:
            return F.instance_norm(x, weight=scale, bias=shift, eps=self.eps)
        return _affine(F.instance_norm(x, eps=self.eps), scale, shift)

    def after_an(self, given: Gaussian) -> tuple[Tensor, Tensor]:
        """(scale, shift) of the instance-normalised image: Eq. (4), and what comes after it.

        none: sigma_j and mu_j take the place of gamma and beta. shared: gamma AN + beta. renormalised: Network-E's
        way with an unseen domain, gamma (AN - mean_k mu_k) / sqrt(mean_k v_k + eps) + beta.
        """
        mean, deviation = given.mean, (given.var + self.eps).sqrt()
        if self.affine == "renormalised":
            center, spread = self.bank.mean.mean(0), (self.bank.var.mean(0) + self.eps).sqrt()
            mean, deviation = (mean - center) / spread, deviation / spread
        if self.affine == "none":
            return deviation, mean
        return self.weight * deviation, self.weight * mean + self.bias


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (N, C, H, W) times and plus (N, C), in x's own type."""
    return (x * scale[..., None, None] + shift[..., None, None]).to(x.dtype)


# --- a network of such layers ----------------------------------------------------------------------------------------


def add_buffer_banks(
    backbone: Backbone,
    num_domains: int,
    momentum: float,
    affine: Affine = "none",
    sites: Sites = "all",
    start: Start = "first_batch",
) -> Switch[Route]:
    """Turn a plain backbone into the two-path network: a Buffer Bank of K domains at the normalisation layers of
    `sites`; the others stay as they are.

    start: what the rows begin with: zeros, the plain layer's running statistics, or nothing, and the first batch is
    copied.

    Returns the switch that chooses the path.
    """
    switch: Switch[Route] = Switch()
    chosen = {id(backbone.get_submodule(name)) for name in bank_sites(backbone, sites)}
    count = 0

    def make(old: nn.BatchNorm2d) -> nn.Module:
        nonlocal count
        if id(old) not in chosen:
            return old
        bank = BufferBank(num_domains, old.num_features, momentum, copy_first=start == "first_batch")
        if start == "pretrained":
            assert old.running_mean is not None, "it tracks them"
            assert old.running_var is not None, "it tracks them"
            bank.fill(old.running_mean, old.running_var)
        count += 1
        return BufferBankNorm2d(bank, switch, affine, old.eps, site=count - 1)

    convert_norm(backbone, make)
    backbone.replay = switch.remembered
    return switch


def bank_sites(backbone: Backbone, sites: Sites) -> list[str]:
    """Names of the normalisation layers of a plain backbone that get a Buffer Bank, in network order."""
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if sites == "all":
        return names
    if sites == "no_stem":
        return names[1:]
    stages = tuple(f"layer{number}." for number in sites.removeprefix("stages_").split("_"))
    return [name for name in names if name.startswith(stages)]


def named_banks(network: nn.Module) -> Iterator[tuple[str, BufferBank]]:
    """(layer name, bank) of every Buffer Bank layer, in network order."""
    for name, module in network.named_modules():
        if isinstance(module, BufferBankNorm2d):
            yield name, module.bank
