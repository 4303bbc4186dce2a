"""ACL: Adaptive Cross-Domain Learning for Generalizable Person Re-Identification (Zhang, Dou, Yu, Li), ECCV 2022.

Every stage ends in a block that normalises each image by itself and in a bank of thin blocks that a router mixes per
image (`lda/parts/routed_blocks.py`, (A1) to (A5)). Two losses shape the routing by domain, and every n-th step a meta
step asks that what is learnt of K - 1 sources helps the one that is held out, h. Images (B, 3, H, W) of a mixed batch
of K sources; e = GeM(last map) (B, D), f = n(e) behind the BNNeck n (without shift), u = f / |f|; w_s (B, E) the
routing of stage s of S; l2: to length one; C_y (D) a learnt centre of every identity of every source.

    (A6)  r = l2([w_1, ..., w_S])  (B, S E);   c_d = mean of r over the images of domain d, (S E)
          `acl_centre=scalar`: the mean over entries as well, one number, which every entry is compared with
    (A7)  L_intra = mean_d mean_{i in d} [ |r_i - c_d| - m1 ]_+^2,    d over the domains that are present
    (A8)  L_inter = mean_{d < d'} [ m2 - |c_d - c_d'| ]_+^2,          0 for a single domain
    (A9)  L_basic = a mean_d CE_d(f) + w Tri(u) + b L_centre + c (L_intra + L_inter),  theta <- optimiser(theta)
          CE_d: the classifier of domain d, on its images;  L_centre = mean_i |f_i - C_y_i|^2
    (A10) L_tr = L_sh(u) + w Tri(u) + L_sc(u) + c (L_intra + L_inter)     on the K - 1 sources that train
          L_sh = mean_i softplus(d+_i - d-_i),  d+: to the farthest image of another domain, or to itself where there is
          none, d-: to the nearest of another identity of the same domain;  L_sc = mean_d mean_{i in d} cos(u_i, u_d),
          u_d the mean of u in d
    (A11) theta' = theta - alpha g,  g = grad L_tr(theta), constant;  alpha = eta, for F and F_e of (A1), (A2) eta / 2
    (A12) L_te = w Tri(u) + 2 b L_centre + c L_intra    on the held-out source, at theta'
    (A13) theta <- theta - eta (grad L_tr(theta) + grad L_te(theta')),  first order, without momentum
    (A14) test: l2(f), with the routing of the image

m1 `acl_intra_margin`, m2 `acl_inter_margin`, a `acl_ce_weight`, b `acl_centre_weight`, c `acl_cluster_weight`, w
`triplet_weight`; eta = `acl_meta_rate` x the shape of the schedule (its rate over its peak). (A10) to (A13) happen in
every `acl_meta_every`-th step, ahead of (A9) and on the same images, split by domain; h is drawn from (seed, step).
There, each part is normalised by its own statistics and no running statistics move. An anchor without the other image
that a loss asks for adds 0. Every term is of the whole batch.

Costs of ResNet-50: 1.15 forward passes in a test; 1.53 training passes with a meta step in every third, 1.48 where it
moves the routers only. Basic-block networks are given a block more a stage: 2.1 and 2.8 for ResNet-18.
MobileNetV2 is refused: it has neither kind of block.

Confidence 90 %, from the release (peterzpy/ACL-DGReID d84c75d: meta_arch/baseline.py, losses/, engine/train_loop.py).
Paper and release. We could not open the paper, so its intention is our inference. Centres are meant to be vectors
(`vector`); the release takes the mean over an axis too many (`scalar`). With it, (A8)
cannot reach its margin of 0.3, since such a mean lies in [0.125, 0.25] for 4 stages of 4 experts, and (A7) pulls all
routing to uniform. Which parameters (A13) moves: the release's optimiser names the routers and moves all, because its
freezing is never on (`acl_meta_params=router`, `all`). That half of the experts begin with IN follows from one IBN over
all of them, in a backbone that has IBN (`acl_expert_norm`, `acl_backbone`).

Departures. The release runs one process over several GPUs, so its losses see 16 images, which in (A10) are of one
domain; here they see all. Its optimiser is SGD with a peak of 0.04 for (A9) and (A13); (A9) has the common optimiser
here, so (A13) has a rate of its own. The weight decay of (A13), where the optimiser's is due, is at the schedule's
rate. Meta images are another, larger draw there. Its first step makes ten updates (A9). Smoothing is by eps / N, and
classifiers begin like those of all methods here. `router` holds back only (A13): the virtual step (A11) is of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch
from lda.groups import Setup
from lda.methods.base import Cost, Losses, Method, ParameterGroup, Update
from lda.parts.backbones import backbone_of, forward_counts
from lda.parts.batch_instance_norm import scatter_loss, shuffle_loss
from lda.parts.episodes import (
    draw_held_out,
    inner_gradient,
    inner_step,
    refuse_recomputation,
    split_by_domain,
    virtual_call,
)
from lda.parts.heads import gem, label_offsets
from lda.parts.instance_sites import use_ibn_a
from lda.parts.losses import IdentitySettings, batch_hard_triplet_loss, batch_statistics, identity_loss, scale_of
from lda.parts.routed_blocks import ExpertNorm, Router, use_routed_blocks
from lda.parts.routes import statistics_held
from lda.settings import Range, setting

Centre = Literal["vector", "scalar"]

_BLOCK_STEP = 0.5  # alpha of (A11) over eta, for the blocks of (A1) and (A2)
_HELD_OUT_CENTRE = 2.0  # weight of L_centre in (A12) over the one in (A9)


@dataclass(frozen=True, kw_only=True)
class ACLSettings(IdentitySettings):
    """Settings of ACL."""

    acl_experts: int = setting(
        4, "E, thin blocks a stage, whatever the number of sources", "ACL", low=1, high=16, search=Range(2, 8)
    )
    acl_expert_norm: ExpertNorm = setting("split", "the thin blocks' first norm: half of them IN, or all BN", "ACL")
    acl_backbone: Literal["plain", "ibn_a"] = setting(
        "plain", "the other blocks: as they are, or with IBN-a in stages 1 to 3", "ACL: ibn_a"
    )
    acl_centre: Centre = setting(
        "vector", "c_d of (A6): per entry of the routing vector, or one number", "inferred; ACL's release scalar"
    )
    acl_intra_margin: float = setting(0.1, "m1 of (A7)", "ACL", low=0.0, high=2.0, search=Range(0.0, 0.5))
    acl_inter_margin: float = setting(0.3, "m2 of (A8)", "ACL", low=0.0, high=2.0, search=Range(0.1, 1.0))
    acl_cluster_weight: float = setting(
        1.0, "c, weight of (A7) and (A8)", "ACL", low=0.0, high=100.0, search=Range(0.1, 10.0, log=True)
    )
    acl_centre_weight: float = setting(
        5e-4, "b, weight of L_centre; twice that in (A12)", "ACL", low=0.0, high=1.0, search=Range(1e-5, 0.01, log=True)
    )
    acl_ce_weight: float = setting(
        0.5, "a, weight of the cross-entropy", "ACL", low=0.0, high=100.0, search=Range(0.1, 2.0, log=True)
    )
    acl_meta_every: int = setting(
        3, "steps from meta step to meta step; 0: none", "ACL", low=0, high=1000, search=Range(1, 10)
    )
    acl_meta_rate: float = setting(
        0.04, "peak of eta of (A11) and (A13), which has the schedule's shape", "ACL", low=0.0, high=10.0,
        search=Range(1e-3, 0.1, log=True),
    )  # fmt: skip
    acl_meta_params: Literal["all", "router"] = setting(
        "all", "what (A13) moves", "ACL's release; router: as its optimiser reads"
    )


# --- (A6) to (A8) ----------------------------------------------------------------------------------------------------


def cluster_losses(
    routing: Tensor, domains: Tensor, centre: Centre, intra_margin: float, inter_margin: float
) -> tuple[Tensor, Tensor]:
    """(L_intra, L_inter) of routing weights (B, S E) of all stages side by side, and domains (B,) on the CPU."""
    unit = F.normalize(routing.float())
    rows = [(domains == domain).nonzero()[:, 0].to(unit.device) for domain in sorted(set(domains.tolist()))]
    within, centres = [], []
    for own in (unit[chosen] for chosen in rows):
        centres.append(own.mean(0) if centre == "vector" else own.mean().view(1))
        within.append(F.relu((own - centres[-1]).norm(dim=1) - intra_margin).square().mean())
    between = [F.relu(inter_margin - (a - b).norm()).square() for a, b in itertools.combinations(centres, 2)]
    return torch.stack(within).mean(), torch.stack(between).mean() if between else unit.new_zeros(())


class Seen(NamedTuple):
    """What a pass gives: the last map (B, D, h, w), features behind the neck f (B, D) in fp32, routing (B, S E),
    identities (B,) within their domain and among those of all sources, and domains (B,) on the CPU."""

    maps: Tensor
    features: Tensor
    routing: Tensor
    labels: Tensor
    joint_labels: Tensor
    domains: Tensor

    @property
    def unit(self) -> Tensor:
        """u (B, D)."""
        return F.normalize(self.features)


# --- the method ------------------------------------------------------------------------------------------------------


class ACL(Method):
    """One network with routed blocks; (A9) in every step, and in some before it a meta step."""

    title = "ACL"
    reference = (
        "Zhang, Dou, Yu, Li: Adaptive Cross-Domain Learning for Generalizable Person Re-Identification, ECCV 2022"
    )
    searched = ("acl_cluster_weight", "acl_centre", "acl_meta_rate", "acl_meta_params")
    min_domains = 2
    Settings = ACLSettings
    settings: ACLSettings

    def __init__(self, settings: ACLSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        if settings.acl_meta_every:
            refuse_recomputation(setup, self.title)
        self.backbone = backbone_of(setup)
        self._plain_counts = forward_counts(self.backbone)
        self.switch = use_routed_blocks(self.backbone, settings.acl_experts, settings.acl_expert_norm)
        if settings.acl_backbone == "ibn_a":
            use_ibn_a(self.backbone)
        channels = self.backbone.channels
        self.neck = nn.BatchNorm1d(channels)
        self.neck.bias.requires_grad_(False)
        self.classifiers = nn.ModuleList(nn.Linear(channels, number, bias=False) for number in setup.num_ids)
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.001)  # type: ignore[arg-type]
        self.centres = nn.Parameter(0.01 * torch.randn(sum(setup.num_ids), channels))
        self.register_buffer("offsets", label_offsets(setup.num_ids), persistent=False)
        self.offsets: Tensor

    @property
    def cost(self) -> Cost:
        counts, plain = forward_counts(self.backbone), sum(self._plain_counts.values())
        forward, stem = sum(counts.values()), counts["conv1"]
        step = 3 * forward - stem  # the images have no gradient
        meta: float = step
        if self.settings.acl_meta_params == "router":  # of the held-out images, a gradient of activations only
            names = list(counts)
            behind = sum(counts[name] for name in names[names.index("routed1") + 1 :])
            held_out = 1 / self.num_domains
            meta = (1 - held_out) * step + held_out * (forward + behind)
        every = self.settings.acl_meta_every
        total = step + (meta / every if every else 0.0)
        return Cost(train_passes=total / (3 * plain - stem), test_forwards=forward / plain)

    # --- training ----------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """ "routers": fc1 and fc2 of (A3) in all stages; "main": the rest."""
        routers = [p for m in self.backbone.modules() if isinstance(m, Router) for p in m.parameters()]
        apart = {id(parameter) for parameter in routers}
        main = [p for p in self.parameters() if p.requires_grad and id(p) not in apart]
        return {"main": ParameterGroup(main), "routers": ParameterGroup(routers)}

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        """(A10) to (A13) where they are due, then (A9)."""
        every, met = self.settings.acl_meta_every, {}
        if every and (step + 1) % every == 0:
            met = self.meta_losses(batch, step)
            update(met, ("main", "routers") if self.settings.acl_meta_params == "all" else ("routers",), "plain_sgd")
        losses = self.training_losses(batch, step)
        update(losses, groups=("main", "routers"))
        return met | losses

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """(A9)."""
        settings = self.settings
        seen = self.passed(batch, {})
        losses = {
            "loss/id": self.identity_term(seen),
            "loss/triplet": self.triplet_term(seen),
            "loss/centre": self.centre_term(seen, self.centres),
            **self.cluster_terms(seen, "loss/"),
        }
        total = settings.acl_ce_weight * losses["loss/id"] + settings.triplet_weight * losses["loss/triplet"]
        total = total + settings.acl_centre_weight * losses["loss/centre"]
        total = total + settings.acl_cluster_weight * (losses["loss/intra"] + losses["loss/inter"])
        watched = scale_of(seen.features, batch_statistics(seen.maps.detach()))
        return {
            "loss/total": total,
            **losses,
            **watched,
            "router/experts": experts_in_use(seen.routing, settings.acl_experts),
        }

    def meta_losses(self, batch: Batch, step: int) -> Losses:
        """(A10) to (A12): `loss/total`, by one plain step at the schedule's rate, is (A13), so its gradient is that of
        the two terms, times eta over that rate."""
        settings, schedule = self.settings, self.setup.schedule
        theta = {name: p for name, p in self.named_parameters() if p.requires_grad}
        others, held_out = split_by_domain(batch, draw_held_out(batch.domains, self.setup.seed, step))
        with statistics_held(self):
            losses = self._meta_train_losses(self.passed(others, {}))
            value = losses.pop("value")
            gradient = inner_gradient(value, theta)
            virtual = self._virtual(theta, gradient, step)
            seen = self.passed(held_out, virtual)
            judged = self._held_out_losses(seen, virtual.get("centres", self.centres))
            held_out_value = judged.pop("value")
        # <g, theta> less its own value: the gradient g, and no second backward pass through L_tr.
        slope = torch.stack([(g * theta[name]).sum() for name, g in gradient.items()]).sum()
        total = value.detach() + (slope - slope.detach()) + held_out_value
        return {"loss/total": settings.acl_meta_rate / schedule.learning_rate * total, **losses, **judged}

    def _virtual(self, theta: Mapping[str, Tensor], gradient: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """(A11)."""
        schedule = self.setup.schedule
        eta = self.settings.acl_meta_rate * schedule.rate(step) / schedule.learning_rate
        blocks = {name: g for name, g in gradient.items() if ".invariant." in name or ".experts." in name}
        rest = {name: g for name, g in gradient.items() if name not in blocks}
        return inner_step(theta, blocks, _BLOCK_STEP * eta) | inner_step(theta, rest, eta)

    def _meta_train_losses(self, seen: Seen) -> Losses:
        """(A10), its terms, and `value`, their sum."""
        losses = {
            "loss/meta_shuffle": shuffle_loss(seen.unit, seen.joint_labels, seen.domains, itself=True),
            "loss/meta_triplet": self.triplet_term(seen),
            "loss/meta_scatter": scatter_loss(seen.features, seen.domains),
            **self.cluster_terms(seen, "loss/meta_"),
        }
        value = losses["loss/meta_shuffle"] + self.settings.triplet_weight * losses["loss/meta_triplet"]
        value = value + losses["loss/meta_scatter"]
        clusters = losses["loss/meta_intra"] + losses["loss/meta_inter"]
        return {"value": value + self.settings.acl_cluster_weight * clusters, **losses}

    def _held_out_losses(self, seen: Seen, centres: Tensor) -> Losses:
        """(A12), its terms, and `value`, their sum."""
        losses = {
            "loss/held_out_triplet": self.triplet_term(seen),
            "loss/held_out_centre": self.centre_term(seen, centres),
            "loss/held_out_intra": self.cluster_terms(seen, "")["intra"],
        }
        value = self.settings.triplet_weight * losses["loss/held_out_triplet"]
        value = value + _HELD_OUT_CENTRE * self.settings.acl_centre_weight * losses["loss/held_out_centre"]
        return {"value": value + self.settings.acl_cluster_weight * losses["loss/held_out_intra"], **losses}

    def passed(self, batch: Batch, weights: Mapping[str, Tensor]) -> Seen:
        """A pass of a batch in training mode, with `weights` in the place of its own, by name."""
        routing: list[Tensor] = []
        with self.switch.on(routing):
            maps: Tensor = virtual_call(self, "backbone", weights, batch.images)
        features: Tensor = virtual_call(self, "neck", weights, gem(maps, self.setup.network.gem_p))
        joint = batch.labels + self.offsets[batch.domains.to(self.offsets.device)]
        return Seen(maps, features.float(), torch.cat(routing, dim=1), batch.labels, joint, batch.domains)

    def identity_term(self, seen: Seen) -> Tensor:
        """mean_d CE_d of (A9)."""
        terms = []
        for domain in sorted(set(seen.domains.tolist())):
            own = (seen.domains == domain).nonzero()[:, 0].to(seen.labels.device)
            logits = self.classifiers[domain](seen.features[own])
            terms.append(identity_loss(logits, seen.labels[own], self.settings.label_smoothing))
        return torch.stack(terms).mean()

    def triplet_term(self, seen: Seen) -> Tensor:
        """Tri(u)."""
        return batch_hard_triplet_loss(seen.unit, seen.joint_labels, self.settings.triplet_margin, part=True)

    def centre_term(self, seen: Seen, centres: Tensor) -> Tensor:
        """L_centre of (A9), with centres (sum N, D)."""
        return (seen.features - centres[seen.joint_labels].float()).square().sum(1).mean()

    def cluster_terms(self, seen: Seen, prefix: str) -> Losses:
        """(A7) and (A8), unweighted."""
        settings = self.settings
        intra, inter = cluster_losses(
            seen.routing, seen.domains, settings.acl_centre, settings.acl_intra_margin, settings.acl_inter_margin
        )
        return {f"{prefix}intra": intra, f"{prefix}inter": inter}

    # --- test --------------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """(A14): features (B, D) behind the BNNeck, L2-normalised."""
        features: Tensor = self.neck(gem(self.backbone(images), self.setup.network.gem_p))
        return F.normalize(features)


@torch.no_grad()
def experts_in_use(routing: Tensor, experts: int) -> Tensor:
    """exp of the mean entropy of the routing (B, S E): 1 where every image takes one expert, E where it takes all."""
    weights = routing.float().reshape(-1, experts)
    entropy: Tensor = torch.special.entr(weights).sum(1).mean()
    return entropy.exp()
