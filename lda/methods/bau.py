"""BAU: strongly augmented views align features, uniformity keeps them spread out.

Two views of every image, w weak and s strong, on a network whose stages 1, 2, 3 are instance-normalised behind their
ReLU (`use_after_stages`). Strong augmentation helps on the sources and hurts on other domains, as features crowd
together; so strong views never see an identity or triplet loss: they are aligned with weak ones only, and a uniformity
term pushes all features apart.

    (B1)  x_w flip and crop as for all methods; x_s `lda.data.transforms.StrongAugment`, both drawn by the trainer
          e = GeM(F) (B, D);  f = n(e) / |n(e)|, n the BNNeck without shift
    (B2)  L_id = CE(h(n(e_w)), y) + w_tri Tri(e_w, y),   y among the identities of all sources
    (B3)  among all 2B features: N(a) = the k nearest to a by cosine, a included;  R(a) = {b in N(a) : a in N(b)}
          w_ij = |R(s_i) & R(w_j)| / |R(s_i) | R(w_j)|, (B, B), without gradient
    (B4)  L_align = sum_{y_i = y_j} w_ij |f_si - f_wj|^2 / max(sum_{y_i = y_j} w_ij, 1e-6)
    (B5)  U(f) = log mean_{a < b} exp(-t |f_a - f_b|^2);   L_uni = (U(f_w) + U(f_s)) / 2
    (B6)  D(f) = log mean_{i, q} exp(-t |f_i - c_(q)|^2), q = 2 .. B + 1;   L_dom = (D(f_w) + D(f_s)) / 2
          c_(q) the q-th nearest to f_i of the prototypes of image i's domain; the nearest counts as its own
    (B7)  after the update, image after image:  c_y <- l2(m c_y + (1 - m) f_w), m the share of the old
    (B8)  L = L_id + lambda_align L_align + lambda_uni L_uni + lambda_dom L_dom

Images are compared by the cosine of f. Shapes: B images of a mixed batch, D feature size, N identities of all sources;
prototypes c (N, D), a buffer of unit rows. They begin as l2 of an identity's mean f over all its images, not augmented,
before the first step (`images`), or empty (`first_seen`): an identity joins (B6) when (B7) has met it.

What happens at the edges. No common neighbour in the batch: all w are 0, and so is (B4), whose denominator is floored.
Fewer than B + 1 prototypes in a domain: the mean is over the pairs that there are (the release fills up with distances
that count as exp(-inf): the same gradient, another constant in the log); where there is no pair at all, D = 0.
k above 2B: everybody is a neighbour.

Paper: Cho, Kim, Kim, Jung and Yoon, NeurIPS 2024 (arXiv 2411.11471); equations read in its release (yoonkicho/BAU
70e1a50; bau/trainers.py, bau/models/model.py, bau/models/memory.py, examples/train_bau.py): confidence 97 %.

`bau_bn`: on the authors' two GPUs, DataParallel sends the weak half of cat(x_w, x_s) to one, the strong half to the
other. So each view is normalised by its own batch, and running statistics, which come from the first GPU, are of weak
views only: `split`, two passes. `joint` is what the release does on one GPU: one pass of 2B, where the statistics mix
the views (and (B2) depends on strong images through them).

Where we depart: the release moves prototypes between forward and backward pass, which only its half-precision copy
survives; gradients are the same. GeM's p is the harness's, fixed, as for all methods; the release learns it (from 3),
and pools a second time, which changes nothing. Augmentation of x_w, batches (equal shares of domains, where the release
draws identities of the union), schedule, steps and the choice of the last model are those of all methods; the release
takes batches of 256, 60 epochs, and the best of three epochs on the target. Two passes an image in both modes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lda.batch import Batch, Layout
from lda.groups import Setup
from lda.methods.base import Cost, Losses, Update
from lda.methods.plain import PlainMethod
from lda.parts.instance_sites import use_after_stages
from lda.parts.losses import (
    IdentitySettings,
    batch_hard_triplet_loss,
    batch_statistics,
    identity_loss,
    scale_of,
    squared_distances,
)
from lda.parts.routes import statistics_held
from lda.settings import Range, setting

_FLOOR = 1e-6  # of the denominator of (B4): far below the least w that is not 0, which is 1 / (2 k)


@dataclass(frozen=True, kw_only=True)
class BAUSettings(IdentitySettings):
    """Settings of BAU."""

    bau_align_weight: float = setting(
        1.5, "lambda_align of (B8)", "BAU", low=0.0, high=100.0, search=Range(0.1, 10.0, log=True)
    )
    bau_uniform_weight: float = setting(
        1.0, "lambda_uni of (B8)", "BAU", low=0.0, high=100.0, search=Range(0.1, 10.0, log=True)
    )
    bau_domain_weight: float = setting(
        1.0, "lambda_dom of (B8)", "BAU", low=0.0, high=100.0, search=Range(0.1, 10.0, log=True)
    )
    bau_neighbours: int = setting(
        10, "k of (B3), the feature itself included", "BAU", low=1, high=512, search=Range(4, 40, log=True)
    )
    bau_temperature: float = setting(
        2.0, "t of (B5) and (B6)", "BAU", low=0.1, high=20.0, search=Range(0.5, 8.0, log=True)
    )
    bau_momentum: float = setting(
        0.1, "m of (B7), the share of the old prototype", "BAU", low=0.0, high=0.999, search=Range(0.0, 0.99)
    )
    bau_bn: Literal["split", "joint"] = setting(
        "split", "batch statistics of each view by itself, running ones of weak views; or of both together",
        "BAU on two GPUs; on one: joint",
    )  # fmt: skip
    bau_prototypes: Literal["images", "first_seen"] = setting(
        "images", "prototypes begin as the mean of all source images, or at an identity's first image", "BAU"
    )
    bau_strong_probability: float = setting(
        0.5, "of each part of the strong augmentation", "BAU", low=0.0, high=1.0, search=Range(0.1, 1.0)
    )


# --- (B3) to (B7), on unit features (B, D) ---------------------------------------------------------------------------


@torch.no_grad()
def reciprocal_weights(weak: Tensor, strong: Tensor, neighbours: int) -> Tensor:
    """(B3): w (B, B), row i of the strong view s_i, column j of the weak view w_j; from 0 to 1."""
    features = torch.cat([weak, strong])
    distances = squared_distances(features, features)  # of unit vectors: the nearest have the largest cosine
    nearest = distances.topk(min(neighbours, len(features)), largest=False).indices
    near = torch.zeros_like(distances).scatter_(1, nearest, 1.0)
    of_weak, of_strong = (near * near.T).chunk(2)
    with torch.autocast(near.device.type, enabled=False):  # counts, which bf16 would round
        common = of_strong @ of_weak.T
    either = of_strong.sum(1)[:, None] + of_weak.sum(1)[None, :] - common
    return common / either.clamp_min(1.0)


def alignment_loss(weak: Tensor, strong: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """(B4), a scalar; weights (B, B) as of (B3), labels (B,)."""
    chosen = weights * (labels[:, None] == labels[None, :])
    return (chosen * squared_distances(strong, weak)).sum() / chosen.sum().clamp_min(_FLOOR)


def uniformity_loss(features: Tensor, temperature: float) -> Tensor:
    """U of (B5), a scalar <= 0; two or more features."""
    first, second = torch.triu_indices(len(features), len(features), 1, device=features.device)
    pairs = squared_distances(features, features)[first, second]
    return _log_mean(-temperature * pairs, torch.ones_like(pairs, dtype=torch.bool))


def domain_uniformity_loss(features: Tensor, prototypes: Tensor, own_domain: Tensor, temperature: float) -> Tensor:
    """D of (B6), a scalar <= 0.

    Args:
        prototypes: (N, D), constant.
        own_domain: (B, N) bool, the prototypes that are there and of the image's domain.
    """
    distances = squared_distances(features, prototypes).masked_fill(~own_domain, torch.inf)
    nearest = distances.topk(min(len(features) + 1, len(prototypes)), largest=False).values[:, 1:]
    return _log_mean(-temperature * nearest, nearest.isfinite())


def _log_mean(exponents: Tensor, there: Tensor) -> Tensor:
    """log of the mean of exp over the entries that are `there`; 0 if there are none."""
    if exponents.numel() == 0:
        return exponents.sum()
    number = there.sum()
    total = exponents.masked_fill(~there, -1e9).flatten().logsumexp(0)
    return torch.where(number > 0, total - number.clamp_min(1).log(), 0.0)


@torch.no_grad()
def move_prototypes(prototypes: Tensor, labels: Tensor, features: Tensor, momentum: float) -> None:
    """(B7), in place: prototypes (N, D), labels (B,) among all N, features (B, D) in the order of the batch."""
    for label, feature in zip(labels[:, None], features.float(), strict=True):  # labels (1,): no wait for a GPU
        moved = momentum * prototypes[label] + (1.0 - momentum) * feature
        prototypes.index_copy_(0, label, F.normalize(moved))


# --- the method ------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """What the network makes of one view: maps (B, D, h, w), e, n(e) and f, each (B, D)."""

    maps: Tensor
    pooled: Tensor
    neck: Tensor
    unit: Tensor


class BAU(PlainMethod):
    """Two views on an instance-normalised network: identities by one, alignment and uniformity by both."""

    title = "BAU"
    reference = (
        "Cho, Kim, Kim, Jung and Yoon, Generalizable Person Re-identification via Balancing Alignment and Uniformity, "
        "NeurIPS 2024"
    )
    searched = ("bau_align_weight", "bau_domain_weight", "bau_strong_probability")
    Settings = BAUSettings
    settings: BAUSettings

    def __init__(self, settings: BAUSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        use_after_stages(self.backbone)
        self.register_buffer("prototypes", torch.zeros(sum(setup.num_ids), self.backbone.channels))
        domains = torch.arange(self.num_domains).repeat_interleave(torch.tensor(setup.num_ids))
        self.register_buffer("prototype_domains", domains, persistent=False)
        self.prototypes: Tensor
        self.prototype_domains: Tensor

    @property
    def layout(self) -> Layout:
        return Layout(views=2, strong=self.settings.bau_strong_probability)

    @property
    def cost(self) -> Cost:
        return Cost(train_passes=2)

    def looks_at_sources(self, step: int) -> bool:
        return step == 0 and self.settings.bau_prototypes == "images"

    @torch.no_grad()
    def prepare(self, sources: Iterable[Batch]) -> None:
        """Fill the prototypes with l2 of an identity's mean f, by the untrained network in evaluation mode."""
        training = self.training
        self.eval()
        sums = torch.zeros_like(self.prototypes)
        for batch in sources:
            sums.index_add_(0, self.joint_labels(batch), self.encode(batch.images))
        self.prototypes.copy_(F.normalize(sums))
        self.train(training)

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        """(B8) by one update, then (B7) by the weak features that it was computed from."""
        weak, strong = self.views(batch)
        losses = self.losses(batch, weak, strong)
        update(losses)
        move_prototypes(self.prototypes, self.joint_labels(batch), weak.unit.detach(), self.settings.bau_momentum)
        return losses

    def views(self, batch: Batch) -> tuple[View, View]:
        """The weak and the strong view of a batch. Raises ValueError when there is one view only."""
        if batch.second is None:
            raise ValueError("BAU needs two views of every image")
        if self.settings.bau_bn == "split":
            weak = self._view(batch.images)
            with statistics_held(self):
                return weak, self._view(batch.second)
        both = self._view(torch.cat([batch.images, batch.second]))
        return View(*(part.chunk(2)[0] for part in both)), View(*(part.chunk(2)[1] for part in both))

    def _view(self, images: Tensor) -> View:
        maps = self.backbone(images)
        pooled = self.pooled(maps)
        neck = self.head.necks[0](pooled)
        return View(maps, pooled, neck, F.normalize(neck.float()))

    def losses(self, batch: Batch, weak: View, strong: View) -> Losses:
        """(B2) to (B6) and their sum (B8). The prototypes are read, not changed."""
        settings, labels = self.settings, self.joint_labels(batch)
        identity = identity_loss(self.head.classifiers[0](weak.neck), labels, settings.label_smoothing)
        triplet = batch_hard_triplet_loss(weak.pooled, labels, settings.triplet_margin)
        weights = reciprocal_weights(weak.unit, strong.unit, settings.bau_neighbours)
        align = alignment_loss(weak.unit, strong.unit, labels, weights)
        own, t, units = self._own_prototypes(batch.domains), settings.bau_temperature, (weak.unit, strong.unit)
        uniform = torch.stack([uniformity_loss(f, t) for f in units]).mean()
        domain = torch.stack([domain_uniformity_loss(f, self.prototypes, own, t) for f in units]).mean()
        total = identity + settings.triplet_weight * triplet + settings.bau_align_weight * align
        return {
            "loss/total": total + settings.bau_uniform_weight * uniform + settings.bau_domain_weight * domain,
            "loss/id": identity,
            "loss/triplet": triplet,
            "loss/align": align,
            "loss/uniform": uniform,
            "loss/domain": domain,
            "align/own_weight": weights.diagonal().mean(),
            **scale_of(weak.pooled, batch_statistics(weak.maps.detach())),
        }

    def _own_prototypes(self, domains: Tensor) -> Tensor:
        """(B, N): the prototypes that (B6) compares image i with; an empty row is not there yet."""
        there = self.prototypes.square().sum(1) > 0
        own: Tensor = domains.to(there.device)[:, None] == self.prototype_domains[None, :]
        return own & there

    def encode(self, images: Tensor) -> Tensor:
        """f: features (B, D) behind the BNNeck, L2-normalised."""
        return F.normalize(self.head.necks[0](self.pooled(self.backbone(images))).float())
