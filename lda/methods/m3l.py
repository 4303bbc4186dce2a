"""M3L: Learning to Generalize Unseen Domains via Memory-based Multi-Source Meta-Learning for Person Re-Identification
(Zhao, Zhong, Yang, Luo, Lin, Li, Sebe), CVPR 2021.

One source q of a mixed batch is held out, the others are trained on. A virtual step on these should lower the loss of
the one that is held out. Identities are compared with a memory of one vector each, so there is no classifier to learn;
the neck of the held-out source sees its features mixed with draws from the others (MetaBN). theta: all weights.

    (M1) f = GeM(F) (b, D),  z = unit(BN(f))                     per domain, by the statistics of its share of the batch
    (M2) l(z, y; k) = mean CE(M_k z / tau, y)                    M_k (N_k, D): memory of domain k, rows of length one
    (M3) L_tr = mean_{k != q} [l(z, y; k) + w Tri(f, y)]
    (M4) g = dL_tr/dtheta,  d = g + wd theta,  theta' = theta - alpha d / (sqrt(d^2 + 1e-5) + 1e-8)
    (M5) f_j = lam e_j + (1 - lam) f  on domain q with theta',  e_j ~ N(mu_j, sigma_j) (b, D),  lam ~ Beta(1, 1) a step
         z_j = unit(BN(f_j)),  mu_j, sigma_j (D,): mean and deviation of f on domain j != q, constant
    (M6) L_te = mean_{j != q} l(z_j, y; q) + w Tri(f, y)
    (M7) theta <- optimiser(d/dtheta [L_tr(theta) + L_te(theta'(theta))])
    (M8) with the new theta, no gradient, all domains k:  M_k[y] <- unit(m M_k[y] + (1 - m) z), image by image
    test: z, by the neck's running statistics

alpha is the schedule's rate of the step (`m3l_inner_rate` sets another), wd its weight decay. (M4) is the first step of
a fresh Adam, whose floor lies inside the root: for |d| << 3e-3 a step of rate alpha / 3.2e-3, for large d one of alpha.
q, lam and the draws are functions of (seed, step). Memories begin as the mean unit vector of an identity's images, by
the network at the start in evaluation mode; with `m3l_memory_init=lazy`, and as long as an identity has no row, it is
no candidate in (M2), its images add nothing to (M2), and the first (M8) copies their mean.

What (M7) differentiates is `m3l_meta`. H = dg/dtheta, D = du/dd of (M4), g_te = dL_te/dtheta':
    exact     (I - alpha D (H + wd))^T g_te        first     g_te: d is constant
    release   -(alpha D H)^T g_te                  none      no held-out source: 2 mean_k [l + w Tri] over all K;
                                                             (M4) and (M5), and their settings, have no part in it
The release clones the weights as new leaves before it steps, which cuts the identity out of dtheta'/dtheta, so L_te
reaches the weights through H only. exact is the paper's objective; passes in bf16 leave noise in its H. The factor 2 of
none, the control, gives a domain the weight in the total that it has in the others on average, against the same weight
decay.

Statistics: the passes of (M1) to (M6) leave the running statistics alone; those of (M8) enter them, each domain once a
step, in an order that goes round by one each step (the last one weighs most). The release records every pass, that of
theta' too. With m = 0.2 and four images of an identity a row is practically its last image.

Confidence 90 %: the release was read in full (HeliosZhao/M3L, fa6c234), the paper's text was not. Departures: 64 images
a step are split over the domains, where the release takes 64 of each; any K >= 2, where it knows three; sigma_j in (M5)
is the deviation, where it takes the variance (`m3l_scale=variance`), which the neck divides out again almost wholly
unless lam is close to 1; GeM, augmentation and schedule are those of all methods here; no choice of an epoch by the
target. A domain with a single identity in the batch has no triplets. Its neck has a shift, which learns, and test
features lie behind it, both unlike the plain baseline's. On the stand-in tau is 0.2: its 160 steps show an identity
twice, so most rows are those of the network before step 0, and at 0.05 the sharp (M2) holds features to them. Chosen by
source validation (one run, seed 0: 48.2 at 0.05, 70.2 at 0.2).

Shapes: b images of one domain in a batch, N_k identities of domain k, D feature size, K sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lda.batch import Batch
from lda.groups import Setup
from lda.methods.base import Cost, Losses, Method, Update
from lda.parts.backbones import backbone_of
from lda.parts.episodes import domain_parts, draw_held_out, refuse_recomputation, virtual_call
from lda.parts.heads import gem
from lda.parts.identity_memory import IdentityMemory, unit
from lda.parts.losses import Gaussian, batch_hard_triplet_loss, batch_statistics, scale_of
from lda.parts.routes import statistics_held
from lda.settings import Range, Settings, setting

_STREAM = 9001  # keeps these draws apart from others of the same seed and step

Meta = Literal["exact", "first", "release", "none"]
Scale = Literal["std", "variance"]


@dataclass(frozen=True, kw_only=True)
class M3LSettings(Settings):
    """Settings of M3L; its cross-entropy has no label smoothing."""

    triplet_margin: float = setting(0.3, "batch-hard margin", "M3L", low=0.0, high=10.0, search=Range(0.1, 1.0))
    triplet_weight: float = setting(
        1.0, "weight of the triplet loss", "M3L", low=0.0, high=100.0, search=Range(0.1, 10.0, log=True)
    )
    m3l_meta: Meta = setting(
        "exact", "what Eq. (M7) differentiates: exact, first order, release, or none = no held-out source", "M3L"
    )
    m3l_temperature: float = setting(
        0.05, "tau of Eq. (M2)", "M3L", low=1e-3, high=10.0, standin=0.2, search=Range(0.02, 0.5, log=True)
    )
    m3l_memory_momentum: float = setting(
        0.2, "m of Eq. (M8), share of the old row", "M3L", low=0.0, high=0.999, search=Range(0.0, 0.95)
    )
    m3l_metabn: Literal["on", "off"] = setting("on", "Eq. (M5): mix the held-out source's features", "M3L")
    m3l_scale: Scale = setting(
        "std", "sigma_j of Eq. (M5): standard deviation, or the variance in its place", "M3L; its release variance"
    )
    m3l_memory_init: Literal["pass", "lazy"] = setting(
        "pass", "memories begin with a pass over the sources, or with the first batch that shows an identity", "M3L"
    )
    m3l_inner_rate: float = setting(
        0.0, "alpha of Eq. (M4); 0 = the learning rate of the step", "M3L", low=0.0, high=10.0,
        search=Range(1e-4, 0.1, log=True),
    )  # fmt: skip


# --- Eqs. (M4), (M5) -------------------------------------------------------------------------------------------------


def virtual_weights(
    theta: Mapping[str, Tensor], gradient: Mapping[str, Tensor], rate: float, decay: float, meta: Meta
) -> dict[str, Tensor]:
    """Eq. (M4): theta' of the weights that have a gradient g, as a function of theta by what `meta` leaves in it.

    exact and release need a g with a graph.
    """
    virtual = {}
    for name, g in gradient.items():
        base = theta[name].detach() if meta == "release" else theta[name]
        d = g + decay * base
        if meta == "first":
            d = d.detach()
        virtual[name] = base - rate * (d / ((d.square() + 1e-5).sqrt() + 1e-8))
    return virtual


class Draws(NamedTuple):
    """What is random in Eq. (M5): lam, and standard normal numbers (domains j, b, D)."""

    share: float
    noise: Tensor


def draws(seed: int, step: int, shape: tuple[int, int, int]) -> Draws:
    """A function of (seed, step), on the CPU."""
    random = np.random.default_rng([seed, step, _STREAM])
    share = float(random.beta(1.0, 1.0))
    return Draws(share, torch.from_numpy(random.standard_normal(shape, dtype=np.float32)))


def moments(features: Tensor) -> Gaussian:
    """mu_j and the biased variance of features (b, D), (D,) each, constant."""
    var, mean = torch.var_mean(features.detach(), dim=0, correction=0)
    return Gaussian(mean, var)


def mixed(features: Tensor, donor: Gaussian, share: float, noise: Tensor, scale: Scale) -> Tensor:
    """f_j of Eq. (M5): features and noise (b, D), the donor's moments (D,)."""
    sigma = donor.var if scale == "variance" else donor.var.clamp_min(0.0).sqrt()
    return share * (donor.mean + sigma * noise) + (1.0 - share) * features


# --- the method ------------------------------------------------------------------------------------------------------


class M3L(Method):
    """One network, a memory of identities, and a virtual step on all sources but one, judged by that one."""

    title = "M3L"
    reference = (
        "Zhao, Zhong, Yang, Luo, Lin, Li, Sebe: Learning to Generalize Unseen Domains via Memory-based Multi-Source "
        "Meta-Learning for Person Re-Identification, CVPR 2021"
    )
    searched = ("m3l_temperature", "m3l_memory_momentum", "m3l_metabn")
    min_domains = 2
    Settings = M3LSettings
    settings: M3LSettings

    def __init__(self, settings: M3LSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        refuse_recomputation(setup, self.title)
        self.backbone = backbone_of(setup)
        size = self.backbone.channels
        self.neck = nn.BatchNorm1d(size)
        self.memory = IdentityMemory(setup.num_ids, size, settings.m3l_memory_momentum, settings.m3l_temperature)

    @property
    def cost(self) -> Cost:
        # The share of the images that is trained on passes forward and backward; its inner gradient is another backward
        # pass, whose own derivative (exact, release) costs two more. All pass forward once more in Eq. (M8).
        trained_on = 1 - 1 / self.num_domains
        more = {"none": 0.0, "first": 2 / 3, "exact": 2.0, "release": 2.0}[self.settings.m3l_meta]
        return Cost(train_passes=4 / 3 + more * trained_on)

    # --- the memory's beginning --------------------------------------------------------------------------------------

    def looks_at_sources(self, step: int) -> bool:
        return step == 0 and self.settings.m3l_memory_init == "pass"

    @torch.no_grad()
    def prepare(self, sources: Iterable[Batch]) -> None:
        """Fill the memories: mean of an identity's encodings by the network as it is, in evaluation mode."""
        self.eval()
        self.memory.fill((self.encode(batch.images), batch.labels, batch.domains) for batch in sources)
        self.train()

    # --- a step ------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        """Eqs. (M1) to (M8)."""
        losses = self.training_losses(batch, step)
        update(losses)
        self.remember(batch, step)
        return losses

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Eqs. (M1) to (M6): `loss/total` has the value L_tr + L_te, and the derivative that `m3l_meta` says.

        Writes nothing. Raises ValueError for a batch of a single domain, unless `m3l_meta` is none.
        """
        parts = domain_parts(batch)
        with statistics_held(self):
            if self.settings.m3l_meta == "none":
                losses, _ = self._trained_on(parts)
                return {"loss/total": 2.0 * self._sum(losses), **losses}
            held_out = draw_held_out(batch.domains, self.setup.seed, step)[0]
            judged = parts.pop(held_out)
            losses, donors = self._trained_on(parts)
            value = self._sum(losses)
            virtual = self._stepped(value, step)
            tested = self._tested_on(judged, held_out, virtual, donors, step)
            named = {f"{name}_held_out": term for name, term in tested.items()}
            return {"loss/total": value + self._sum(tested), **losses, **named}

    def _sum(self, losses: Losses) -> Tensor:
        return losses["loss/memory"] + self.settings.triplet_weight * losses["loss/triplet"]

    def _trained_on(self, parts: Mapping[int, Batch]) -> tuple[Losses, list[Gaussian]]:
        """Terms of Eq. (M3), and the moments of f in every domain."""
        of_all: list[Losses] = []
        donors = []
        for domain, part in parts.items():
            maps = self.backbone(part.images)
            features = self._pooled(maps)
            vectors = unit(self.neck(features))
            scale = scale_of(features, batch_statistics(maps.detach()))
            of_all.append(self._terms(features, [vectors], part.labels, domain) | scale)
            donors.append(moments(features))
        return {name: torch.stack([terms[name] for terms in of_all]).mean() for name in of_all[0]}, donors

    def _stepped(self, value: Tensor, step: int) -> dict[str, Tensor]:
        """Eq. (M4)."""
        meta, schedule = self.settings.m3l_meta, self.setup.schedule
        theta = {name: p for name, p in self.named_parameters() if p.requires_grad}
        with torch.autocast(value.device.type, enabled=False):
            found = torch.autograd.grad(
                value, list(theta.values()), retain_graph=True, create_graph=meta != "first", allow_unused=True
            )
        gradient = {name: g for name, g in zip(theta, found, strict=True) if g is not None}
        rate = self.settings.m3l_inner_rate or schedule.rate(step)
        return virtual_weights(theta, gradient, rate, schedule.weight_decay, meta)

    def _tested_on(
        self, part: Batch, domain: int, virtual: Mapping[str, Tensor], donors: Sequence[Gaussian], step: int
    ) -> Losses:
        """Terms of Eq. (M6)."""
        settings = self.settings
        features = self._pooled(virtual_call(self, "backbone", virtual, part.images))
        before_neck = [features]
        if settings.m3l_metabn == "on":
            share, noise = draws(self.setup.seed, step, (len(donors), *features.shape))
            noise = noise.to(features.device)
            before_neck = [
                mixed(features, donor, share, e, settings.m3l_scale) for donor, e in zip(donors, noise, strict=True)
            ]
        vectors = [unit(virtual_call(self, "neck", virtual, f)) for f in before_neck]
        return self._terms(features, vectors, part.labels, domain)

    def _terms(self, features: Tensor, vectors: Sequence[Tensor], labels: Tensor, domain: int) -> Losses:
        """l, the mean over `vectors`, and Tri of one domain's images."""
        memory = torch.stack([self.memory.loss(z, labels, domain) for z in vectors]).mean()
        triplet = batch_hard_triplet_loss(features, labels, self.settings.triplet_margin, part=True)
        return {"loss/memory": memory, "loss/triplet": triplet}

    @torch.no_grad()
    def remember(self, batch: Batch, step: int) -> None:
        """Eq. (M8), by the statistics of each domain's share, which enter the running ones."""
        parts = list(domain_parts(batch).items())
        first = step % len(parts)
        for domain, part in parts[first:] + parts[:first]:
            self.memory.update(self.encode(part.images), part.labels, domain)

    def _pooled(self, maps: Tensor) -> Tensor:
        return gem(maps, self.setup.network.gem_p)

    def encode(self, images: Tensor) -> Tensor:
        """z of Eq. (M1), (B, D)."""
        return unit(self.neck(self._pooled(self.backbone(images))))
