"""META: Mimic Embedding via Adaptive Aggregation, Learning Generalizable Person Re-identification (Boqiang Xu, Jian
Liang, Lingxiao He, Zhenan Sun), ECCV 2022.

One trunk of convolutions with a complete set of batch normalisation, statistics and affine, for every source domain: K
experts. Beside it a global branch. An image of a new domain gets a mixture of the experts' last maps, by how far its
own statistics are from those that each expert has learnt. Batches are of one domain k. At layer l of S, expert j has
running statistics m_jl, V_jl (C_l,); on its way image i has mean and unbiased variance mu_il, v_il (C_l,) over (h, w)
in what enters that layer; F^j (B, D, h, w) are its last maps, e^j = GeM(F^j) (B, D).

    (M1) expert k on its own images: batch statistics, which enter m_k, V_k by torch's momentum 0.1;
         expert j != k on them: its running statistics, and no gradient to anything
    (M2) global branch: the trunk's convolutions up to and with the first block of stage 3, under a set of their own;
         then own copies of what follows, batch normalisation in stage 3, instance normalisation in stage 4;
         e_g = GeM of its maps, g = n_g(e_g), n_g its BNNeck
    (M3) W^j_il = sqrt((|m_jl - mu_il|^2 + |sqrt V_jl - sqrt v_il|^2) / C_l)                      no gradient
         `meta_relevance_scale=raw`: without C_l
    (M4) a_ij = softmax_{j != k} A_j(W^j_i),  A_j = Linear(S, 512), then Linear(512, 1), nothing between
    (M5) e_mix = GeM(sum_{j != k} a_ij F^j_i)
    (M6) L_cons = mean_i [d+(e_mix) - d+(e^k)]_+ + mean_i [d-(e^k) - d-(e_mix)]_+
         d+, d- hardest distances in the batch; no gradient to e^k
    (M7) L = CE(h_k(n_k(e^k))) + w Tri(e^k) + CE(h_g(g)) + w Tri(e_g) + c L_cons
         h_k: a classifier per domain, h_g: one over all sources; c = `meta_consistency_weight`
    (M8) test: f = l2([e_mix / sqrt(1 + 1e-5), g]) of 2 D values, with e_mix over all K experts

`meta_test_weights`, a_ij of (M8) over all j:
    learned     (M4)
    distance    softmax_j of -sum_l W^j_il: the nearest expert counts most; `meta_relevance_sign=far`: of the plus sum
    uniform     1 / K

What trains what, by (M5) and (M6): the trunk learns from its own expert and the global branch, set k and its head from
their own images only, the aggregators A_j from L_cons and from nothing else; nothing learns from W. In a step on
domain k the sets, heads and moments of the other domains stay as they are, since their gradients are absent.

Release (xbq1994/META, 5883a0b) and paper disagree where it matters most: the release tests by distance/far, so with its
aggregators unused and the *farthest* expert weighted most. We read the paper's intention as `learned`, confidence
60 %; the four rows learned, distance/near, distance/far and uniform should be reported together. Confidence in the
rest 95 %, from the release. In (M8) the second neck is one that never saw data: it divides by sqrt(1 + 1e-5), and the
norms of the two parts decide their share of the cosine, as in the release.

Departures. W is divided by sqrt(C_l), and the last layer of A_j starts at zero, so at uniform weights: with the
release's `raw` and `kaiming` the softmax starts saturated. No frozen phase (`meta_freeze_steps`, release 500): then
the trunk's convolutions get no update for so many steps; that the release leaves the global set in evaluation mode
meanwhile is not copied. Optimiser, schedule and batch are those of all methods here. The release shares storage
between sets on the CPU; here they are copies. Any K >= 2, where the release knows three. For two the mixture in
training is the other expert, whatever the weights: no aggregator learns, and `learned` stays at 1/2. A network with one
block a stage shares it in stage 3, so the branch owns stage 4 alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch, Layout
from lda.errors import UsageError
from lda.groups import Setup
from lda.methods.base import Cost, Losses, Method, ParameterGroup, Update
from lda.parts.backbones import Backbone, backbone_of, convert_norm
from lda.parts.domain_norm import DomainBatchNorm2d, DomainRoute, OneSet, site_distances, use_domain_norm
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.instance_sites import as_instance_site
from lda.parts.losses import (
    IdentitySettings,
    batch_hard_triplet_loss,
    batch_statistics,
    identity_loss,
    relation_loss,
    scale_of,
)
from lda.parts.routes import Switch
from lda.settings import Range, setting

_HIDDEN = 512  # of an aggregator
_FRESH_NECK = (1.0 + 1e-5) ** -0.5  # what a BNNeck does that never saw data


@dataclass(frozen=True, kw_only=True)
class METASettings(IdentitySettings):
    """Settings of META."""

    meta_test_weights: Literal["learned", "distance", "uniform"] = setting(
        "learned", "weights of (M8): learned aggregators, a fixed function of the distances, or 1/K",
        "META: paper learned, release distance", test=True,
    )  # fmt: skip
    meta_relevance_sign: Literal["near", "far"] = setting(
        "near", "with meta_test_weights=distance: near or far experts count most", "META: release far", test=True
    )
    meta_relevance_scale: Literal["sqrt_c", "raw"] = setting(
        "sqrt_c", "W of (M3) over the root of the channels, or as it is", "META raw"
    )
    meta_aggregator_init: Literal["zero", "kaiming"] = setting(
        "zero", "last layer of the aggregators at the start; zero: uniform weights", "META kaiming"
    )
    meta_consistency_weight: float = setting(
        1.0, "c of (M7); 0: no aggregator is trained", "META", low=0.0, high=100.0, search=Range(0.1, 10.0, log=True)
    )
    meta_freeze_steps: int = setting(
        0, "first steps without an update of the trunk's convolutions", "META 500", low=0, high=10**5,
        search=Range(0, 1000, step=100),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.meta_relevance_sign == "far" and self.meta_test_weights != "distance":
            raise UsageError(
                f"meta_relevance_sign: far says nothing with meta_test_weights={self.meta_test_weights}; "
                "set meta_test_weights=distance"
            )
        if self.meta_consistency_weight == 0 and self.meta_test_weights == "learned":
            raise UsageError(
                "meta_consistency_weight: at 0 nothing trains the aggregators that the test uses; "
                "set meta_test_weights=uniform or distance, or another weight"
            )


# --- Eqs. (M2) and (M4) ----------------------------------------------------------------------------------------------


class GlobalBranch(nn.Module):
    """Eq. (M2): what the branch owns, and how a pass goes through the trunk's layers and on through them.

    Args:
        backbone: still plain; what is owned is copied from it.

    Attributes:
        shared: names of the trunk's steps that the branch passes through.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        steps = backbone.steps()
        last = f"{backbone.stages[2]}.0"
        count = [name for name, _ in steps].index(last) + 1
        self.shared = [name for name, _ in steps[:count]]
        self.names = [name for name, _ in steps[count:]]
        self.own = nn.ModuleList(copy.deepcopy(step) for _, step in steps[count:])
        for name, step in zip(self.names, self.own, strict=True):
            if name.startswith(backbone.stages[3]):
                convert_norm(step, as_instance_site)

    def forward(self, images: Tensor, trunk: Backbone, switch: Switch[DomainRoute], beside: int) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w); `beside`: number of the set that is the branch's own in the trunk."""
        with switch.on(OneSet(beside)):
            x = trunk.walk(images, trunk.steps()[: len(self.shared)])
            return trunk.walk(x, zip(self.names, self.own, strict=True))


def aggregator(sites: int, init: Literal["zero", "kaiming"]) -> nn.Sequential:
    """A_j of Eq. (M4): (N, S) -> (N, 1), a linear function in two layers."""
    layers = nn.Sequential(nn.Linear(sites, _HIDDEN), nn.Linear(_HIDDEN, 1))
    for name, parameter in layers.named_parameters():
        if name.endswith("bias") or (init == "zero" and name.startswith("1.")):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, mode="fan_out")
    return layers


# --- Eqs. (M1), (M3), (M5) to (M8) -----------------------------------------------------------------------------------


class META(Method):
    """K experts by sets of batch normalisation, a global branch, and a mixture of experts, on batches of one domain."""

    title = "META"
    reference = (
        "Xu, Liang, He, Sun: Mimic Embedding via Adaptive Aggregation, Learning Generalizable Person "
        "Re-identification, ECCV 2022"
    )
    searched = ("meta_consistency_weight", "meta_relevance_scale", "meta_aggregator_init")
    min_domains = 2
    Settings = METASettings
    settings: METASettings

    def __init__(self, settings: METASettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        random = settings.meta_aggregator_init == "kaiming" and settings.meta_test_weights == "learned"
        if self.num_domains == 2 and random:
            raise UsageError(
                "meta_aggregator_init: with 2 source domains nothing trains the aggregators, and kaiming would leave "
                "the test's weights random; set meta_aggregator_init=zero, or meta_test_weights=uniform or distance"
            )
        self.backbone = backbone_of(setup)
        self.branch = GlobalBranch(self.backbone)
        shared = dict(self.backbone.steps())
        self.switch = use_domain_norm(
            self.backbone, self.num_domains, one_beside=[shared[name] for name in self.branch.shared]
        )
        self.head = Head(self.backbone.channels, setup.num_ids)
        self.head_global = Head(self.backbone.channels, [sum(setup.num_ids)])
        sites = sum(isinstance(module, DomainBatchNorm2d) for module in self.backbone.modules())
        self.aggregators = nn.ModuleList(
            aggregator(sites, settings.meta_aggregator_init) for _ in range(self.num_domains)
        )
        self.register_buffer("offsets", label_offsets(setup.num_ids), persistent=False)
        self.offsets: Tensor

    @property
    def layout(self) -> Layout:
        return Layout(domains="one")

    @property
    def inference(self) -> str:
        weights = self.settings.meta_test_weights
        return f"{weights} {self.settings.meta_relevance_sign}" if weights == "distance" else weights

    @property
    def cost(self) -> Cost:
        foreign = (self.num_domains - 1) / 3 if self.settings.meta_consistency_weight > 0 else 0.0
        return Cost(train_passes=2 + foreign, test_forwards=1 + self.num_domains)

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """The trunk's convolutions, which may be frozen for a while, and everything else."""
        trunk = [
            parameter
            for module in self.backbone.modules()
            if isinstance(module, nn.Conv2d)
            for parameter in module.parameters()
        ]
        theirs = {id(parameter) for parameter in trunk}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        return {"main": ParameterGroup(rest), "trunk": ParameterGroup(trunk)}

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        losses = self.training_losses(batch, step)
        frozen = step < self.settings.meta_freeze_steps
        update(losses, groups=("main",) if frozen else ("main", "trunk"))
        return losses

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Eq. (M7) for one batch of a single domain k; writes the statistics of set k and of the global branch."""
        settings, domain = self.settings, int(batch.domains[0])
        foreign = [j for j in range(self.num_domains) if j != domain]
        consistent = settings.meta_consistency_weight > 0
        theirs = [self.expert(batch.images, j) for j in foreign] if consistent else []
        maps = self._maps(batch.images, OneSet(domain))
        features = self.pooled(maps)
        of_branch = self.pooled(self.branch(batch.images, self.backbone, self.switch, self.num_domains))

        losses = self._identity(self.head, domain, features, batch.labels, "")
        losses |= self._identity(self.head_global, 0, of_branch, batch.labels + self.offsets[domain], "_global")
        total = losses["loss/id"] + losses["loss/id_global"]
        total = total + settings.triplet_weight * (losses["loss/triplet"] + losses["loss/triplet_global"])
        if consistent:
            weights = self.learned_weights(foreign, [distances for _, distances in theirs])
            mixed = self.pooled(mixture(weights, [maps_of_j for maps_of_j, _ in theirs]))
            losses["loss/consistency"] = relation_loss(mixed, features, batch.labels)
            losses["weights/largest"] = weights.detach().amax(1).mean()
            total = total + settings.meta_consistency_weight * losses["loss/consistency"]
        return {"loss/total": total, **losses, **scale_of(features, batch_statistics(maps.detach()))}

    def _identity(self, head: Head, group: int, features: Tensor, labels: Tensor, path: str) -> Losses:
        logits = head(features, group)
        return {
            f"loss/id{path}": identity_loss(logits, labels, self.settings.label_smoothing),
            f"loss/triplet{path}": batch_hard_triplet_loss(features, labels, self.settings.triplet_margin),
        }

    @torch.no_grad()
    def expert(self, images: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        """F^j (B, D, h, w) and W^j (B, S) of expert j on images of whatever domain; leaves no trace."""
        with site_distances(self.backbone, self.settings.meta_relevance_scale == "raw") as distances:
            maps = self._maps(images, OneSet(domain, running=True))
        return maps, torch.stack(distances, dim=1)

    def _maps(self, images: Tensor, route: DomainRoute) -> Tensor:
        with self.switch.on(route):
            maps: Tensor = self.backbone(images)
        return maps

    def pooled(self, maps: Tensor) -> Tensor:
        """e: maps (B, D, h, w) -> features (B, D) before the BNNeck."""
        return gem(maps, self.setup.network.gem_p)

    def learned_weights(self, domains: Sequence[int], distances: Sequence[Tensor]) -> Tensor:
        """Eq. (M4): a (B, J) of the experts `domains`, from their W (B, S), in fp32."""
        with torch.autocast(distances[0].device.type, enabled=False):
            logits = [self.aggregators[j](w.float()) for j, w in zip(domains, distances, strict=True)]
            return torch.cat(logits, dim=1).softmax(1)

    def test_weights(self, distances: Sequence[Tensor]) -> Tensor:
        """a of Eq. (M8): (B, K), from W (B, S) of all experts."""
        if self.settings.meta_test_weights == "learned":
            return self.learned_weights(range(self.num_domains), distances)
        far = torch.stack([w.sum(1) for w in distances], dim=1)
        if self.settings.meta_test_weights == "uniform":
            return torch.full_like(far, 1 / self.num_domains)
        return (far if self.settings.meta_relevance_sign == "far" else -far).softmax(1)

    def encode(self, images: Tensor) -> Tensor:
        """Eq. (M8): features (B, 2 D), L2-normalised as a whole."""
        experts = [self.expert(images, domain) for domain in range(self.num_domains)]
        weights = self.test_weights([distances for _, distances in experts])
        mixed = self.pooled(mixture(weights, [maps for maps, _ in experts]))
        of_branch = self.pooled(self.branch(images, self.backbone, self.switch, self.num_domains))
        neck = self.head_global.necks[0]
        return F.normalize(torch.cat([mixed * _FRESH_NECK, neck(of_branch).float()], dim=1))

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """None: the experts are weighed for every image, and the branch has maps of its own."""
        return {}


def mixture(weights: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """The sum of Eq. (M5): weights (B, J), J maps (B, D, h, w) -> (B, D, h, w), in fp32."""
    total = torch.zeros((), device=weights.device)
    for weight, of_expert in zip(weights.unbind(1), maps, strict=True):
        total = total + weight[:, None, None, None] * of_expert.float()
    return total
