"""Batch-instance normalisation (BIN) of a network, and MetaBIN's step that learns nothing but its gates.

x (B, C, h, w) enters a layer; rho (C,) its gates, in [0, 1]; f (B, D) features before the BNNeck; mu_b, v_b moments of
the batch, mu_i, v_i those of image i. The images of a step are split: meta-train domains, and meta-test, the others.

    (B1) y = rho BN(x) + (1 - rho) IN(x),  BN(x) = g_B (x - mu_b) / sqrt(v_b + eps) + b_B,
                                           IN(x) = g_I (x - mu_i) / sqrt(v_i + eps) + b_I
    (B3) scatter  L_sc = mean_k mean_{i in k} cos(n_i, c_k) = mean_k |c_k|,  n_i = f_i / |f_i|,  c_k = mean_{i in k} n_i
    (B4) shuffle  L_sh = mean_i softplus(d+_i - d-_i),  d+_i: distance to the farthest image of ANOTHER domain,
                  d-_i: to the nearest image of another identity of the SAME domain
    (B5) L_tr = L_sh + Tri + L_sc                                       on meta-train
    (B6) rho' = clamp(rho - eta c(t) dL_tr/drho, 0, 1)                  the gradient is a constant: first order
    (B7) rho <- clamp(rho - eta dTri(rho')/drho', 0, 1)                 on meta-test
    (B8) c(t) = low + (high - low) (1 - |2 frac(t / T) - 1|),  T = max(2, steps of the run // cycles)

BN begins with all of the old layer, its running statistics too, IN as g_I = 1, b_I = 0, the gates at 1: the plain
network. eta is absolute and constant, t counts the gate steps from 1. The clamp of (B6) is not differentiated: rho' is
a leaf, which equals the release's straight-through clamp; at rho = 1 many steps end on the clamp, and a clamp that is
differentiated would leave such gates where they are for ever. Both passes normalise by the images of their own part and
write no statistics. They run in fp32. A single meta-train domain has no (B4); an anchor without the other image it asks
for adds 0. IN's gain and shift have no gradient while rho = 1, and a decay would empty them under Adam: they have none.

Read in the release (bismex/MetaBIN aa81471: modeling/ops.py BIN_gate2, losses/, engine/train_loop.py): confidence 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lda.batch import Batch
from lda.errors import UsageError
from lda.groups import Setup
from lda.parts.backbones import Backbone, convert_norm
from lda.parts.episodes import draw_held_out, inner_gradient, refuse_recomputation, split_by_domain
from lda.parts.heads import gem, label_offsets
from lda.parts.instance_sites import InstanceSite
from lda.parts.losses import IdentitySettings, batch_hard_triplet_loss, distances_among
from lda.parts.routes import statistics_held
from lda.settings import Range, setting

InnerLosses = Literal[
    "shuffle+triplet+scatter",
    "triplet+scatter",
    "shuffle+triplet",
    "shuffle+scatter",
    "triplet",
    "scatter",
    "shuffle",
]


@dataclass(frozen=True, kw_only=True)
class GateSettings(IdentitySettings):
    """How gates are learnt, with the identity losses of the base step."""

    metabin_meta: Literal["on", "off"] = setting(
        "on", "gates learnt by Eq. (B7); off: by the base step's loss and the main optimiser, clamped", "MetaBIN"
    )
    metabin_gate_rate: float = setting(
        0.1, "eta of Eqs. (B6) and (B7), whatever the schedule", "MetaBIN; 0.2, 0.5 for one source", low=0.0, high=10.0,
        search=Range(0.01, 1.0, log=True),
    )  # fmt: skip
    metabin_inner_low: float = setting(
        0.001, "smallest c of Eq. (B8)", "MetaBIN", low=0.0, high=10.0, search=Range(1e-4, 0.01, log=True)
    )
    metabin_inner_high: float = setting(
        0.1, "largest c of Eq. (B8); equal to the smallest: constant", "MetaBIN", low=0.0, high=10.0,
        search=Range(0.01, 1.0, log=True),
    )  # fmt: skip
    metabin_cycles: int = setting(
        20, "rises and falls of c in a run", "MetaBIN", low=1, high=1000, search=Range(1, 100, log=True)
    )
    metabin_train_domains: int = setting(
        0, "meta-train domains of a step; 0: half of all, rounded up", "MetaBIN", low=0, high=1000, search=Range(0, 4)
    )
    metabin_warmup: int = setting(
        10, "base steps before the first gate step", "MetaBIN", low=0, high=10**6, search=Range(0, 1000)
    )
    metabin_losses: InnerLosses = setting("shuffle+triplet+scatter", "terms of Eq. (B5)", "MetaBIN")
    metabin_batch: Literal["second", "same"] = setting(
        "second", "images of the gate step: a second batch, or those of the base step", "MetaBIN"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metabin_inner_low > self.metabin_inner_high:
            raise UsageError(
                f"metabin_inner_low: {self.metabin_inner_low} is above metabin_inner_high = {self.metabin_inner_high}; "
                "set metabin_inner_low lower"
            )

    def train_domains(self, num_domains: int) -> int:
        """How many of K domains are meta-train."""
        return self.metabin_train_domains or (num_domains + 1) // 2


def check_split(settings: GateSettings, setup: Setup) -> None:
    """Raises UsageError where no source is left for meta-test."""
    train, num_domains = settings.train_domains(len(setup.num_ids)), len(setup.num_ids)
    if train >= num_domains > 1:
        raise UsageError(
            f"metabin_train_domains: {train} of {num_domains} sources leave none for meta-test; "
            f"set metabin_train_domains={num_domains - 1} or lower"
        )


def check_gates(settings: GateSettings, setup: Setup, title: str) -> None:
    """Raises UsageError where gate steps are to be made and cannot be."""
    if settings.metabin_meta == "off":
        return
    refuse_recomputation(setup, title)
    check_split(settings, setup)
    num_domains = len(setup.num_ids)
    train = settings.train_domains(num_domains)
    if train == 1 and settings.metabin_losses == "shuffle":
        raise UsageError(
            "metabin_losses: shuffle compares domains, and one is meta-train; "
            "set metabin_losses=triplet+scatter, or metabin_train_domains=2 where there are three sources"
        )
    each, rest = divmod(setup.ids_per_batch, num_domains)
    test = num_domains - train
    if test * each + max(0, test - (num_domains - rest)) < 2:
        raise UsageError(
            f"ids_per_batch: of {setup.ids_per_batch} identities of {num_domains} sources, meta-test may get one, "
            f"which has no triplets; set ids_per_batch={2 * num_domains} or higher"
        )


# --- Eq. (B1) --------------------------------------------------------------------------------------------------------


class BatchInstanceNorm2d(nn.Module):
    """Equation (B1) in the place of one batch normalisation.

    Args:
        old: whose gamma, beta and running statistics the BN part begins with.
        trained_gates: the gates are a parameter; else a buffer, which no optimiser sees.
    """

    gate: Tensor

    def __init__(self, old: nn.BatchNorm2d, trained_gates: bool = False) -> None:
        super().__init__()
        self.batch = nn.BatchNorm2d(old.num_features, eps=old.eps, momentum=old.momentum)
        self.batch.load_state_dict(old.state_dict())
        self.instance = InstanceSite(old.num_features, eps=old.eps, affine=True)
        gate = torch.ones(old.num_features)
        if trained_gates:
            self.gate = nn.Parameter(gate)
        else:
            self.register_buffer("gate", gate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). Raises UsageError on maps of 1 x 1."""
        gate = self.gate[:, None, None]
        mixed = gate * self.batch(x) + (1.0 - gate) * self.instance(x)
        same_type: Tensor = mixed.to(x.dtype)
        return same_type


def use_batch_instance_norm(backbone: Backbone, trained_gates: bool = False) -> None:
    """Turn a plain backbone into one with (B1) at every layer: in what it computes still the plain one."""
    convert_norm(backbone, lambda old: BatchInstanceNorm2d(old, trained_gates))


def gates_of(network: nn.Module) -> dict[str, Tensor]:
    """Name -> gates (C,) of every BIN layer, named as among the network's buffers or parameters."""
    return {f"{name}.gate": m.gate for name, m in network.named_modules() if isinstance(m, BatchInstanceNorm2d)}


def undecayed(network: nn.Module) -> list[nn.Parameter]:
    """What weight decay has to leave alone: gain and shift of every IN, and gates that are parameters."""
    layers = [m for m in network.modules() if isinstance(m, BatchInstanceNorm2d)]
    affine = [parameter for layer in layers for parameter in layer.instance.parameters()]
    return affine + [layer.gate for layer in layers if isinstance(layer.gate, nn.Parameter)]


@torch.no_grad()
def clamp_gates(network: nn.Module) -> None:
    """Gates back into [0, 1], after an optimiser moved them."""
    for gate in gates_of(network).values():
        gate.clamp_(0.0, 1.0)


@torch.no_grad()
def mean_gate(network: nn.Module) -> Tensor:
    """Scalar, over all channels of all layers: 1 is batch normalisation."""
    return torch.cat(list(gates_of(network).values())).mean()


# --- Eqs. (B3), (B4) and (B8) ----------------------------------------------------------------------------------------


def scatter_loss(features: Tensor, domains: Tensor) -> Tensor:
    """Equation (B3) of features (n, D) and domains (n,) on the CPU. Minimised, so it spreads every domain.

    The mean cosine to the mean of unit vectors is the length of that mean, so it does not matter whether the centre is
    detached.
    """
    unit = F.normalize(features)
    rows = [(domains == domain).nonzero()[:, 0].to(unit.device) for domain in sorted(set(domains.tolist()))]
    return torch.stack([unit[own].mean(0).norm() for own in rows]).mean()


def shuffle_loss(features: Tensor, labels: Tensor, domains: Tensor, itself: bool = False) -> Tensor:
    """Equation (B4) of features (n, D), identities (n,) unique over all domains, and domains (n,) on the CPU.

    Minimised, it brings domains closer together than a domain's own identities are. An anchor without an image of
    another domain, or without another identity of its own, adds 0.

    itself: the anchor counts among the images that d+ looks at, which matters where there is no other domain.
    """
    domains = domains.to(features.device)
    same_domain = domains[:, None] == domains[None, :]
    other_identity = labels[:, None] != labels[None, :]
    distances = distances_among(features)
    farthest = distances.masked_fill(same_domain, 0.0 if itself else -torch.inf).amax(1)
    nearest = distances.masked_fill(~(same_domain & other_identity), torch.inf).amin(1)
    return F.softplus(farthest - nearest).mean()


def inner_factor(settings: GateSettings, number: int, total_steps: int) -> float:
    """Equation (B8): c of gate step `number`, counted from 1, in a run of `total_steps`."""
    period = max(2, total_steps // settings.metabin_cycles)
    rise = 1.0 - abs(2.0 * (number / period % 1.0) - 1.0)
    return settings.metabin_inner_low + (settings.metabin_inner_high - settings.metabin_inner_low) * rise


# --- Eqs. (B5) to (B7) -----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Features (n, D) before the BNNeck of a part of a batch, the identities (n,) among those of all sources, and the
    domains (n,) on the CPU."""

    features: Tensor
    labels: Tensor
    domains: Tensor


class GateStep(NamedTuple):
    """What a gate step saw, detached: scalars, and both parts, which passed with the gates rho and rho'."""

    losses: dict[str, Tensor]
    train: Part
    test: Part


def gate_step(backbone: Backbone, batch: Batch, settings: GateSettings, setup: Setup, step: int) -> GateStep:
    """Equations (B5) to (B7) on one batch: writes the gates, and nothing else.

    Step `step` of the run, counted from 0, of which `metabin_warmup` had no gate step. Call it in training mode.
    """
    held_out = len(setup.num_ids) - settings.train_domains(len(setup.num_ids))
    others, tested = split_by_domain(batch, draw_held_out(batch.domains, setup.seed, step, held_out))
    factor = inner_factor(settings, step - settings.metabin_warmup + 1, setup.schedule.total_steps)
    gates = gates_of(backbone)
    with torch.autocast(batch.images.device.type, enabled=False), statistics_held(backbone):
        rho = {name: gate.detach().clone().requires_grad_() for name, gate in gates.items()}
        train = _pass(backbone, rho, others, setup)
        losses = _meta_train_losses(train, settings)
        gradient = inner_gradient(torch.stack(list(losses.values())).sum(), rho)  # Eq. (B5)
        virtual = _stepped(rho, gradient, settings.metabin_gate_rate * factor)  # Eq. (B6)
        virtual = {name: gate.requires_grad_() for name, gate in virtual.items()}
        test = _pass(backbone, virtual, tested, setup)
        judged = batch_hard_triplet_loss(test.features, test.labels, settings.triplet_margin, part=True)
        outer = inner_gradient(judged, virtual)
    for name, gate in _stepped(rho, outer, settings.metabin_gate_rate).items():  # Eq. (B7)
        gates[name].copy_(gate)
    scalars = {**losses, "loss/gate_held_out": judged, "gate/mean": mean_gate(backbone)}
    return GateStep(
        {name: value.detach() for name, value in scalars.items()},
        train._replace(features=train.features.detach()),
        test._replace(features=test.features.detach()),
    )


def _pass(backbone: Backbone, gates: Mapping[str, Tensor], batch: Batch, setup: Setup) -> Part:
    maps: Tensor = functional_call(backbone, dict(gates), (batch.images,))
    labels = batch.labels + label_offsets(setup.num_ids)[batch.domains].to(batch.labels.device)
    return Part(gem(maps, setup.network.gem_p), labels, batch.domains)


def _meta_train_losses(part: Part, settings: GateSettings) -> dict[str, Tensor]:
    chosen = settings.metabin_losses.split("+")
    losses = {}
    if "shuffle" in chosen and len(set(part.domains.tolist())) > 1:
        losses["loss/gate_shuffle"] = shuffle_loss(*part)
    if "triplet" in chosen:
        losses["loss/gate_triplet"] = batch_hard_triplet_loss(
            part.features, part.labels, settings.triplet_margin, part=True
        )
    if "scatter" in chosen:
        losses["loss/gate_scatter"] = scatter_loss(part.features, part.domains)
    return losses


def _stepped(gates: Mapping[str, Tensor], gradient: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """clamp(rho - rate g, 0, 1), detached."""
    return {name: (gate.detach() - rate * gradient[name]).clamp(0.0, 1.0) for name, gate in gates.items()}
