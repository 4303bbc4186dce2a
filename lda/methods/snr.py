"""SNR: normalise a stage's style away, then put back the part of what was lost that says who it is.

Behind stages 1 to 4 of a plain network, F the stage's map (B, C, h, w) after its last ReLU:

    (S1)  Ft = gamma (F - mu_i) / sqrt(v_i + 1e-5) + beta,   mu_i, v_i mean and biased variance of image i over (h, w)
    (S2)  R  = F - Ft                                         what was lost
    (S3)  a  = sigmoid(W2 relu(W1 GAP(R) + b1) + b2)          (B, C); W1 (H, C), W2 (C, H), H = max(C // r, 4)
    (S4)  F+ = Ft + a R, the input of the next stage;  F- = Ft + (1 - a) R, which only the loss sees
    (S5)  f, f+, f- = pooled Ft, F+, F-                       (B, C)
    (S6)  L_s = mean_i [ softplus(dp(f+) - dp(f)) + softplus(dp(f) - dp(f-))
                       + softplus(dn(f) - dn(f+)) + softplus(dn(f-) - dn(f)) ]
          dp(z)_i = max_j d(z_i, z_j) over images of i's identity, dn(z)_i = min_j over those of others, each mined in
          its own space;  d Euclidean, with 1e-12 under the root, or cosine: 1/2 - cos / 2
    (S7)  L = CE(h(n(e))) + w Tri(e) + sum_s lambda_s L_s,   e = GeM(F+ of stage 4)

Nothing is detached; normalisation, gate and distances in fp32. Everything else, the optimiser's rate and decay of these
layers too, is the plain baseline's (`PlainMethod`): one pass, features before the BNNeck.

What (S6) amounts to. Average pooling (`snr_pool=plain`) takes of a normalised map what normalisation has put there:
f = beta for every image, f+ = beta + a (GAP(F) - beta), f- = beta + (1 - a) (GAP(F) - beta). So dp(f) = dn(f) = 1e-6,
and nothing is compared with the normalised feature:

    (S8)  L_s = mean_i [ softplus(dp(f+)) + softplus(-dp(f-)) + softplus(-dn(f+)) + softplus(dn(f-)) ]

to 1e-6 each; that is what is computed, without a map of F-. `snr_pool=relu` pools relu(Ft), relu(F+), relu(F-), which
differ between images, and makes (S6) the comparison that it is meant to be; it is not the release's. By the cosine,
beta = 0 (where it begins) is 0/0 and any other beta is distance 0: refused with plain pooling.

Paper: Jin, Lan, Zeng, Chen and Zhang, "Style Normalization and Restitution for Generalizable Person Re-identification",
CVPR 2020. Module: microsoft/SNR f3d51b5 (classification, detection), confidence high. Loss: no re-identification code
of the authors is public; (S6) is read in SunTongtongtong/FedReid a7ac5bc (SNR/hard_mine_triplet_loss.py), which very
likely descends from theirs, confidence medium to high. lambda 0.1, 0.1, 0.5, 0.5 and the cosine distance are the
paper's as remembered, medium; that code has 1 for each lambda, and the Euclidean distance (the default here).
Another third party (hwz-zju/Instruct-ReID 12b6c33, reid/loss/dual_causality_loss.py) has the same four terms on another
network, with 1/2 - cos, and one random positive and negative an image, the same for f, f+ and f-: how pairs are chosen
is the least certain part of (S6).

Where we depart: the triplet loss is the harness's, with a margin (there: soft). At least 4 hidden units in the gate:
with r = 16 narrow stages would get 1 or 3, which die. Stage 4: F+ goes on through the harness's GeM, which cuts at
1e-6; F+ has negative entries, so it is rectified there, where the other code averages it as it is.

MobileNetV2 has no ReLU behind stages 1 to 3: there F is the sum as it is.

Shapes: B images of a mixed batch, C channels of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch
from lda.errors import UsageError
from lda.groups import Setup
from lda.methods.base import Losses
from lda.methods.plain import PlainMethod
from lda.parts.instance_sites import InstanceSite
from lda.parts.losses import Hardest, IdentitySettings, distances_among, hardest_of, squared_distances
from lda.parts.routes import Switch
from lda.settings import Range, setting

_LEAST_HIDDEN = 4

Pool = Literal["plain", "relu"]
Distance = Literal["euclidean", "cosine"]


@dataclass(frozen=True, kw_only=True)
class SNRSettings(IdentitySettings):
    """Settings of SNR."""

    snr_sites: tuple[int, ...] = setting(
        (1, 2, 3, 4), "stages with a module behind them, counted from 1", "FedReid; microsoft/SNR 1 2 3"
    )
    snr_weight1: float = setting(
        0.1, "lambda of stage 1", "SNR; FedReid 1", low=0.0, high=100.0, search=Range(0.01, 2.0, log=True)
    )
    snr_weight2: float = setting(
        0.1, "lambda of stage 2", "SNR; FedReid 1", low=0.0, high=100.0, search=Range(0.01, 2.0, log=True)
    )
    snr_weight3: float = setting(
        0.5, "lambda of stage 3", "SNR; FedReid 1", low=0.0, high=100.0, search=Range(0.01, 2.0, log=True)
    )
    snr_weight4: float = setting(
        0.5, "lambda of stage 4", "SNR; FedReid 1", low=0.0, high=100.0, search=Range(0.01, 2.0, log=True)
    )
    snr_reduction: int = setting(
        16, "r of (S3), channels per hidden unit of the gate; hidden units at least 4", "SNR", low=1, high=64,
        search=Range(4, 32, log=True),
    )  # fmt: skip
    snr_pool: Pool = setting("plain", "(S5): average of the maps, or of their positive part", "SNR; relu is ours")
    snr_distance: Distance = setting("euclidean", "d of (S6)", "FedReid; the paper, as remembered: cosine")

    def __post_init__(self) -> None:
        super().__post_init__()
        sites = self.snr_sites
        if not sites or sorted(set(sites)) != list(sites) or not set(sites) <= {1, 2, 3, 4}:
            raise UsageError(f"snr_sites: expected rising stages from 1 to 4, at least one, got {list(sites)}")
        if self.snr_distance == "cosine" and self.snr_pool == "plain":
            raise UsageError(
                "snr_distance: cosine between averages of normalised maps, which are beta for every image, is 0/0 at "
                "beta = 0; set snr_pool=relu, or snr_distance=euclidean"
            )

    def weight(self, stage: int) -> float:
        """lambda of a stage, counted from 1."""
        return (self.snr_weight1, self.snr_weight2, self.snr_weight3, self.snr_weight4)[stage - 1]


# --- (S1) to (S5) ----------------------------------------------------------------------------------------------------


class Pooled(NamedTuple):
    """(S5), (B, C) each: f+, f-, and f, or None where f is the same for every image."""

    restored: Tensor
    rest: Tensor
    normalised: Tensor | None


class Parts(NamedTuple):
    """Ft and R (B, C, h, w) in fp32, and a (B, C)."""

    normalised: Tensor
    residual: Tensor
    gate: Tensor


class Restitution(nn.Module):
    """One site: F -> F+ by (S1) to (S4), with C channels.

    Args:
        reduction: r of (S3).
        pool: (S5).
        switch: shared by the sites; the list that each of them, in training, adds (S5) to.
    """

    def __init__(self, channels: int, reduction: int, pool: Pool, switch: Switch[list[Pooled]]) -> None:
        super().__init__()
        self.pool: Pool = pool
        self.switch = switch
        self.norm = InstanceSite(channels, affine=True)
        hidden = max(channels // reduction, _LEAST_HIDDEN)
        self.squeeze, self.excite = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        for layer in (self.squeeze, self.excite):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w). Raises RuntimeError in training outside `with switch.on([])`, and UsageError
        on maps of 1 x 1."""
        with torch.autocast(x.device.type, enabled=False):
            parts = self.parts(x)
            restored = parts.normalised + parts.gate[:, :, None, None] * parts.residual
            if self.training:
                self.switch.route.append(self.pooled(x, parts, restored))
        return restored.to(x.dtype)

    def parts(self, x: Tensor) -> Parts:
        """(S1) to (S3)."""
        normalised = self.norm(x.float())
        residual = x.float() - normalised
        return Parts(normalised, residual, self.gate(residual.mean((2, 3))))

    def gate(self, lost: Tensor) -> Tensor:
        """a of (S3) for GAP(R) (B, C)."""
        logits: Tensor = self.excite(F.relu(self.squeeze(lost)))
        return logits.sigmoid()

    def pooled(self, x: Tensor, parts: Parts, restored: Tensor) -> Pooled:
        """(S5) of a map F, its parts and F+."""
        if self.pool == "plain":
            beta = self.norm.bias
            lost = x.float().mean((2, 3)) - beta  # GAP(R), without the rounding of (S1)
            return Pooled(beta + parts.gate * lost, beta + (1.0 - parts.gate) * lost, None)
        rest = parts.normalised + (1.0 - parts.gate)[:, :, None, None] * parts.residual
        normalised, restored, rest = (F.relu(maps).mean((2, 3)) for maps in (parts.normalised, restored, rest))
        return Pooled(restored, rest, normalised)


# --- (S6) ------------------------------------------------------------------------------------------------------------


def distances(features: Tensor, distance: Distance) -> Tensor:
    """d of (S6) between all pairs of features (B, C): (B, B)."""
    if distance == "euclidean":
        return distances_among(features)
    units = F.normalize(features.float())
    return squared_distances(units, units) / 4.0  # |u - v|^2 = 2 - 2 cos


def hardest(features: Tensor, labels: Tensor, distance: Distance) -> Hardest:
    """dp and dn of (S6), (B,) each, of features (B, C) and labels (B,)."""
    return hardest_of(distances(features, distance), labels[:, None] == labels[None, :])


def restitution_loss(pooled: Pooled, labels: Tensor, distance: Distance) -> Tensor:
    """(S6), or (S8) where f is the same for every image: a scalar."""
    dp_restored, dn_restored = hardest(pooled.restored, labels, distance)
    dp_rest, dn_rest = hardest(pooled.rest, labels, distance)
    dp = dn = torch.zeros_like(dp_rest)
    if pooled.normalised is not None:
        dp, dn = hardest(pooled.normalised, labels, distance)
    gaps = (dp_restored - dp, dp - dp_rest, dn - dn_restored, dn_rest - dn)
    return torch.stack([F.softplus(gap) for gap in gaps]).sum(0).mean()


# --- the method ------------------------------------------------------------------------------------------------------


class SNR(PlainMethod):
    """The plain baseline's step on a network that normalises and restores behind its stages, and (S6) at each."""

    title = "SNR"
    reference = (
        "Jin, Lan, Zeng, Chen and Zhang, Style Normalization and Restitution for Generalizable Person "
        "Re-identification, CVPR 2020"
    )
    searched = ("snr_weight3", "snr_weight4", "snr_pool")
    Settings = SNRSettings
    settings: SNRSettings

    def __init__(self, settings: SNRSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.switch: Switch[list[Pooled]] = Switch()
        stages = self.backbone.stages
        for stage in settings.snr_sites:
            channels = self.backbone.stage_channels(stages[stage - 1])
            site = Restitution(channels, settings.snr_reduction, settings.snr_pool, self.switch)
            self.backbone.insert_after(stages[stage - 1], f"snr{stage}", site)

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """(S7): the plain baseline's losses, and (S6) of every site, unweighted as `loss/snr1` and so on."""
        seen: list[Pooled] = []
        with self.switch.on(seen):
            losses = super().training_losses(batch, step)
        labels = self.joint_labels(batch)
        for stage, pooled in zip(self.settings.snr_sites, seen, strict=True):
            term = restitution_loss(pooled, labels, self.settings.snr_distance)
            losses[f"loss/snr{stage}"] = term
            losses["loss/total"] = losses["loss/total"] + self.settings.weight(stage) * term
        return losses
