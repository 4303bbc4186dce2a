"""RaMoE: Generalizable Person Re-identification with Relevance-aware Mixture of Experts (Dai, Li, Liu, Tong, Duan),
CVPR 2021: A RECONSTRUCTION. No code was published, and we could not read the paper.

What is known. Abstract (arXiv 2105.09156): an expert for every source; a decorrelation loss that keeps experts apart; a
voting network that joins all experts' features by how relevant their domains are; a "learning-to-learn" algorithm with
a relation alignment loss for it, since no target is seen. A later paper (MoDA, TOMM 2025) says that the vote compares a
sample with prototypes of the sources, commonly class centres, and that in training a sample's own domain plays the
unseen one, on which the others vote. Everything below with a number in it, and every form, is OUR CHOICE; the hinge of
(R10) is that of META's release, which has the same role there. What it is worth is told by `ramoe_vote=uniform`, the
control with equal weights: a number of this file says nothing about the paper's.

t (B, C', h, w): map of a trunk that all share; k, j experts, one a domain; y joint identities; sg: no gradient.

    (R1)  t = trunk(I), the backbone without its last stage      `ramoe_expert=head`: the whole backbone
    (R2)  e_k = GeM(stage_k(t)) (B, D), stage_k a copy of the last stage     head: ReLU(BN(linear(GeM(t))))
    (R3)  L_exp = mean_k [CE(h_k(n_k(e_k)), y) + w Tri(e_k, y)]              on images of domain k
    (R4)  L_dec = mean_{x of k, j != k} cos(e_k(x) - a_k, sg(e_j(x) - a_j))^2,  a_j: mean of e_j over domain k's images
    (R5)  v = l2(linear(ReLU(BN(linear(sg GAP(t)))))) (B, V)                 the voting network
    (R6)  c_y <- l2(m c_y + (1 - m) mean v of identity y)                    after the step; at first l2(mean v)
    (R7)  rel_k(x) = tau log mean_{y of k, seen} exp(v . c_y / tau),   omega(x) = softmax over allowed k of rel_k / tau
    (R8)  a(x) = sum_k omega_k(x) sg e_k(x)                                  training: all k but x's own domain
    (R9)  L_vote = CE(h_0(n_0(a)), y) + w mean_k Tri(a, y)                   Tri within each domain
    (R10) L_rel = mean_k { mean [d+(a) - sg d+(e_k)]_+ + mean [sg d-(e_k) - d-(a)]_+ }       on images of domain k
          d+, d- hardest distances among them
    (R11) L = L_exp + lambda_d L_dec + L_vote + lambda_r L_rel
    test: l2(a(x)), all k allowed

Every domain is held out in every step, each on its own images: K episodes of the same forward pass. The vote begins
when all domains have centres, in the second step. A mean, not a sum, over identities in (R7): else the largest source
would win every vote. Trunk and experts learn from (R3) and (R4) alone; the voting network, n_0 and h_0 from (R9) and
(R10) alone. An inner step before (R9) is not made: with detached experts it could change nothing that the vote learns
from. Expert k normalises its own domain's images by their batch and records them; others' by its running statistics,
as test images.

Confidence: in the parts that exist (experts, decorrelation, vote by relevance with the own domain left out, relation
alignment) medium; in each formula low. The published rows train on DukeMTMC too.

Shapes: B images of a mixed batch, K sources, N identities of all, D feature size, V `ramoe_embedding`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch
from lda.errors import UsageError
from lda.groups import Setup
from lda.methods.base import Cost, Losses, Method, Update
from lda.parts.backbones import backbone_of, forward_shares
from lda.parts.domain_norm import RowWise
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.losses import (
    IdentitySettings,
    batch_hard_triplet_loss,
    batch_statistics,
    identity_loss,
    relation_loss,
    scale_of,
)
from lda.settings import Range, setting


@dataclass(frozen=True, kw_only=True)
class RaMoESettings(IdentitySettings):
    """Settings of the reconstruction of RaMoE."""

    ramoe_expert: Literal["stage", "head"] = setting(
        "stage", "Eq. (R2): an expert is a copy of the last stage, or a layer behind the whole network"
    )
    ramoe_vote: Literal["relevance", "uniform"] = setting(
        "relevance", "weights of the experts: Eq. (R7), or equal ones, the control", "RaMoE; uniform is the control"
    )
    ramoe_decorrelation_weight: float = setting(
        1.0, "lambda_d of Eq. (R11)", low=0.0, high=100.0, search=Range(0.01, 10.0, log=True)
    )
    ramoe_relation_weight: float = setting(
        1.0, "lambda_r of Eq. (R11)", low=0.0, high=100.0, search=Range(0.01, 10.0, log=True)
    )
    ramoe_temperature: float = setting(
        0.1, "tau of Eq. (R7), in both places", low=0.01, high=10.0, search=Range(0.02, 1.0, log=True)
    )
    ramoe_centre_momentum: float = setting(
        0.9, "m of Eq. (R6), share of the old centre", low=0.0, high=0.9999, search=Range(0.0, 0.99)
    )
    ramoe_embedding: int = setting(256, "V of Eq. (R5)", low=8, high=4096, search=Range(32, 512, log=True))


# --- Eqs. (R4), (R6) and (R7) ----------------------------------------------------------------------------------------


def decorrelation_loss(own: Tensor, others: list[Tensor]) -> Tensor:
    """Eq. (R4) on the images of one domain: e_k (n, D) against each e_j (n, D), which gets no gradient. A scalar."""
    centred = own.float() - own.float().mean(0)
    found = []
    for other in others:
        constant = other.detach().float()
        found.append(F.cosine_similarity(centred, constant - constant.mean(0), dim=1).square().mean())
    return torch.stack(found).mean()


class Centres(nn.Module):
    """Eqs. (R6) and (R7): a centre of every identity, and how relevant each domain is to an image.

    Attributes:
        rows: (N, V) of length one; zero where nothing was seen.
        seen: (N,) bool.
        of: (N,) domain of each identity.
    """

    def __init__(self, num_ids: tuple[int, ...], size: int, momentum: float, temperature: float) -> None:
        super().__init__()
        self.num_domains, self.momentum, self.temperature = len(num_ids), momentum, temperature
        self.register_buffer("rows", torch.zeros(sum(num_ids), size))
        self.register_buffer("seen", torch.zeros(sum(num_ids), dtype=torch.bool))
        of = torch.arange(len(num_ids)).repeat_interleave(torch.tensor(num_ids))
        self.register_buffer("of", of, persistent=False)
        self.rows: Tensor
        self.seen: Tensor
        self.of: Tensor

    def ready(self) -> bool:
        """Whether every domain has a centre."""
        return all(bool(self.seen[self.of == domain].any()) for domain in range(self.num_domains))

    def weights(self, vectors: Tensor, allowed: Tensor | None = None) -> Tensor:
        """omega (B, K) of v (B, V); `allowed`: (B, K) bool, those that vote. Domains without a centre have no vote, and
        where nobody has one all that are allowed count the same."""
        with torch.autocast(vectors.device.type, enabled=False):
            similar = vectors.float() @ self.rows.T / self.temperature  # (B, N)
            relevance = []
            for domain in range(self.num_domains):
                there = self.seen & (self.of == domain)
                of_seen = similar.masked_fill(~there, -torch.inf).logsumexp(1)
                relevance.append(of_seen - there.sum().clamp_min(1).log())
            logits = torch.stack(relevance, dim=1)  # rel / tau
            logits = logits.masked_fill(~torch.isfinite(logits), -1e9)
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -torch.inf)
            return logits.softmax(1)

    @torch.no_grad()
    def update(self, vectors: Tensor, labels: Tensor) -> None:
        """Eq. (R6): v (B, V), joint identities (B,)."""
        identities, which = torch.unique(labels, return_inverse=True)
        mean = torch.zeros(len(identities), vectors.shape[1], device=vectors.device)
        mean.index_add_(0, which, vectors.float())
        mean /= which.bincount(minlength=len(identities))[:, None]
        moved = self.momentum * self.rows[identities] + (1.0 - self.momentum) * mean
        self.rows[identities] = F.normalize(moved)  # at first the old row is zero
        self.seen[identities] = True


# --- the method ------------------------------------------------------------------------------------------------------


class RaMoE(Method):
    """A trunk, an expert of each domain behind it, and a vote of the experts for every image."""

    title = "RaMoE"
    reference = (
        "Dai, Li, Liu, Tong, Duan: Generalizable Person Re-identification with Relevance-aware Mixture of Experts, "
        "CVPR 2021"
    )
    reconstructed = "everything but the abstract: architecture, losses, vote, weights; no code, no readable text"
    searched = ("ramoe_decorrelation_weight", "ramoe_relation_weight", "ramoe_temperature")
    min_domains = 2
    Settings = RaMoESettings
    settings: RaMoESettings

    def __init__(self, settings: RaMoESettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.votes = settings.ramoe_vote == "relevance"
        if self.votes and self.num_domains < 3:
            raise UsageError(
                f"ramoe_vote: relevance needs 3 or more source domains, this protocol has {self.num_domains}: an image "
                "of a held-out one would have a single expert; set ramoe_vote=uniform"
            )
        self.trunk = backbone_of(setup)
        self.last = self.trunk.stages[-1]
        size, share = self.trunk.channels, forward_shares(self.trunk)[self.last]
        self.share = share if settings.ramoe_expert == "stage" else 0.0
        self.experts = nn.ModuleList(self._expert(size) for _ in range(self.num_domains))
        if settings.ramoe_expert == "stage":
            self.trunk.cut_after(self.trunk.stages[-2])
        self.head = Head(size, setup.num_ids)
        self.register_buffer("offsets", label_offsets(setup.num_ids), persistent=False)
        self.offsets: Tensor
        if self.votes:
            wide = settings.ramoe_embedding
            hidden = (nn.Linear(self.trunk.channels, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, wide))
            self.voting = nn.Sequential(*hidden)
            self.head_vote = Head(size, [sum(setup.num_ids)])
            momentum, temperature = settings.ramoe_centre_momentum, settings.ramoe_temperature
            self.centres = Centres(setup.num_ids, wide, momentum, temperature)

    def _expert(self, size: int) -> nn.Module:
        if self.settings.ramoe_expert == "stage":
            return copy.deepcopy(self.trunk.get_submodule(self.last))
        return nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size), nn.ReLU())

    @property
    def label(self) -> str:
        return self.title if self.votes else f"{self.title}, uniform weights"

    @property
    def cost(self) -> Cost:
        more = self.share * (self.num_domains - 1)
        return Cost(train_passes=1 + more / 3, test_forwards=1 + more)

    # --- a step ------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        """Eq. (R11) by one update, then Eq. (R6)."""
        maps = self.trunk(batch.images)
        route = RowWise(batch.domains)
        features = self._features(maps, route)
        losses = self._expert_terms(features, batch, route)
        settings = self.settings
        total = losses["loss/id"] + settings.triplet_weight * losses["loss/triplet"]
        total = total + settings.ramoe_decorrelation_weight * losses["loss/decorrelation"]
        vectors = self._vectors(maps) if self.votes else None
        if vectors is not None and self.centres.ready():
            losses |= self._vote_terms(vectors, features, batch, route)
            total = total + losses["loss/id_vote"] + settings.triplet_weight * losses["loss/triplet_vote"]
            total = total + settings.ramoe_relation_weight * losses["loss/relation"]
        own = torch.cat([features[domain][rows] for domain, rows in route.rows(maps.device).of])
        losses = {"loss/total": total, **losses, **scale_of(own, batch_statistics(maps.detach()))}
        update(losses)
        if vectors is not None:
            self.centres.update(vectors.detach(), self._joint(batch))
        return losses

    def _joint(self, batch: Batch) -> Tensor:
        return batch.labels + self.offsets[batch.domains.to(self.offsets.device)]

    def _features(self, maps: Tensor, route: RowWise) -> list[Tensor]:
        """e_k (B, D) of every expert: with gradient for its own domain's images, without for the others'."""
        found = []
        rows = dict(route.rows(maps.device).of)
        for domain, expert in enumerate(self.experts):
            own = self._pooled_by(expert, maps[rows[domain]]) if domain in rows else None
            others = torch.cat([where for other, where in rows.items() if other != domain])
            expert.eval()  # others' images pass as test images do
            with torch.no_grad():
                of_others = self._pooled_by(expert, maps[others])
            expert.train()
            everyone = torch.zeros(len(maps), of_others.shape[1], device=maps.device).index_copy(0, others, of_others)
            found.append(everyone if own is None else everyone.index_copy(0, rows[domain], own))
        return found

    def _pooled_by(self, expert: nn.Module, maps: Tensor) -> Tensor:
        """Eq. (R2): one expert on maps (n, C', h, w) -> (n, D)."""
        if self.settings.ramoe_expert == "head":
            with torch.autocast(maps.device.type, enabled=False):
                of_layer: Tensor = expert(gem(maps, self.setup.network.gem_p))
            return of_layer
        blocks = [(f"{self.last}.{name}", block) for name, block in expert.named_children()]
        return gem(self.trunk.walk(maps, blocks), self.setup.network.gem_p)

    def _vectors(self, maps: Tensor) -> Tensor:
        """Eq. (R5)."""
        with torch.autocast(maps.device.type, enabled=False):
            vectors: Tensor = self.voting(maps.detach().float().mean((2, 3)))
        return F.normalize(vectors)

    def _expert_terms(self, features: list[Tensor], batch: Batch, route: RowWise) -> Losses:
        """Eqs. (R3) and (R4), unweighted."""
        settings = self.settings
        identity, triplet, decorrelation = [], [], []
        for domain, rows in route.rows(features[0].device).of:
            own, labels = features[domain][rows], batch.labels[rows]
            identity.append(identity_loss(self.head(own, domain), labels, settings.label_smoothing))
            triplet.append(batch_hard_triplet_loss(own, labels, settings.triplet_margin, part=True))
            others = [of_other[rows] for j, of_other in enumerate(features) if j != domain]
            decorrelation.append(decorrelation_loss(own, others))
        terms = {"loss/id": identity, "loss/triplet": triplet, "loss/decorrelation": decorrelation}
        return {name: torch.stack(values).mean() for name, values in terms.items()}

    def _vote_terms(self, vectors: Tensor, features: list[Tensor], batch: Batch, route: RowWise) -> Losses:
        """Eqs. (R7) to (R10), unweighted: each image held out with its domain."""
        settings, labels = self.settings, self._joint(batch)
        domains = batch.domains.to(vectors.device)
        allowed = domains[:, None] != torch.arange(self.num_domains, device=vectors.device)
        weights = self.centres.weights(vectors, allowed)
        mixed = mixture(weights, [of_expert.detach() for of_expert in features])
        triplet, relation = [], []
        for domain, rows in route.rows(vectors.device).of:
            triplet.append(batch_hard_triplet_loss(mixed[rows], labels[rows], settings.triplet_margin, part=True))
            relation.append(relation_loss(mixed[rows], features[domain][rows], labels[rows], part=True))
        own = self.centres.rows[labels]
        return {
            "loss/id_vote": identity_loss(self.head_vote(mixed, 0), labels, settings.label_smoothing),
            "loss/triplet_vote": torch.stack(triplet).mean(),
            "loss/relation": torch.stack(relation).mean(),
            "vote/largest": weights.detach().amax(1).mean(),
            "vote/own_centre": (own * vectors.detach()).sum(1).mean(),  # how far centres lag behind
        }

    # --- test --------------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """Eq. (R8) over all experts: features (B, D), L2-normalised."""
        maps = self.trunk(images)
        features = [self._pooled_by(expert, maps) for expert in self.experts]
        if not self.votes:
            return F.normalize(torch.stack(features).mean(0))
        return F.normalize(mixture(self.centres.weights(self._vectors(maps)), features))


def mixture(weights: Tensor, features: list[Tensor]) -> Tensor:
    """Eq. (R8): omega (B, K), K features (B, D) -> (B, D)."""
    return torch.einsum("bk,kbd->bd", weights, torch.stack(features).float())
