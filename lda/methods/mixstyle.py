"""MixStyle: an image takes on a mixture of its own style and that of another image of the batch.

    (X1)  mu_i, sigma_i = mean and sqrt(v_i + 1e-6) of x_i over (h, w), v_i unbiased, both without gradient
    (X2)  lambda_i ~ Beta(alpha, alpha),   pi(i) the partner of image i
    (X3)  y_i = (lambda_i sigma_i + (1 - lambda_i) sigma_pi(i)) (x_i - mu_i) / sigma_i
                + lambda_i mu_i + (1 - lambda_i) mu_pi(i)

after stages 1 and 2, in training only. At every site of every step one coin is thrown for the whole batch: with
probability p it is mixed, else it passes as it is. The partner: "random" = a permutation of the batch; "cross_domain" =
any image of another source domain. With alpha = 0.1 lambda is mostly near 0 or 1: half of the images keep their style.
Without gradient through (X1), the derivative of (X3) is the ratio of the mixed deviation to the image's own.

Step, losses and test feature are the plain baseline's (`PlainMethod`), at its cost. Draws are a function of (seed,
step, stage), from a generator of their own on the CPU, so that a resumed run agrees.

Paper: Zhou, Yang, Qiao and Xiang, "Domain Generalization with MixStyle", ICLR 2021 (longer, the same layer: "MixStyle
Neural Networks for Domain Generalization and Adaptation", IJCV 2024); read in its release
(KaiyangZhou/mixstyle-release, 16f7cf1; reid/models/mixstyle.py, resnet_ms.py): confidence 98 %.

Where we depart: the release's cross-domain partner takes a batch of two domains, one in each half; here a partner is
drawn from all images of the other K - 1 domains. Batches are mixed: in batches of one domain only the styles within a
domain could be exchanged, which is a weaker method. The release's re-identification runs (one source, SGD 0.05, a
512-d layer behind the network) are not our protocols; schedule and losses are those of all methods here.

Shapes: x (B, C, h, w) the map of a stage, B images; lambda (B,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lda.batch import Batch
from lda.errors import UsageError
from lda.groups import Setup
from lda.methods.base import Losses
from lda.methods.plain import PlainMethod
from lda.parts.instance_sites import need_a_map
from lda.parts.losses import IdentitySettings
from lda.parts.routes import Switch
from lda.settings import Range, setting

_STREAM = 7001  # keeps these draws apart from others of the same seed and step
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MixStyleSettings(IdentitySettings):
    """Settings of MixStyle."""

    mixstyle_p: float = setting(
        0.5, "probability that a site mixes a batch", "MixStyle", low=0.0, high=1.0, search=Range(0.1, 1.0)
    )
    mixstyle_alpha: float = setting(
        0.1, "alpha of Beta(alpha, alpha), which draws the share of the own style", "MixStyle", low=1e-3, high=10.0,
        search=Range(0.05, 1.0, log=True),
    )  # fmt: skip
    mixstyle_partner: Literal["cross_domain", "random"] = setting(
        "cross_domain", "whose style: any image of another source domain, or any of the batch", "MixStyle"
    )
    mixstyle_stages: tuple[int, ...] = setting((1, 2), "stages whose map is mixed, counted from 1", "MixStyle")

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = self.mixstyle_stages
        if not stages or sorted(set(stages)) != list(stages) or not set(stages) <= {1, 2, 3, 4}:
            raise UsageError(f"mixstyle_stages: expected rising stages from 1 to 4, at least one, got {list(stages)}")


class Draws(NamedTuple):
    """(X2) for one site and step: lambda (B,) float64 and the partner of every image (B,) int64."""

    share: np.ndarray[tuple[int], np.dtype[np.float64]]
    partner: np.ndarray[tuple[int], np.dtype[np.int64]]


class MixedStep(NamedTuple):
    """What a site has to know of the step under way: its number, and the domain of every image, (B,) on the CPU."""

    step: int
    domains: Tensor


def draw(settings: MixStyleSettings, seed: int, stage: int, of: MixedStep) -> Draws | None:
    """(X2): what is mixed behind `stage` in a step; None when the coin leaves the batch as it is.

    Raises ValueError when an image has no image of another domain beside it and the partner has to be one.
    """
    random = np.random.default_rng([seed, of.step, stage, _STREAM])
    if random.random() >= settings.mixstyle_p:
        return None
    domains = of.domains.numpy()
    share = random.beta(settings.mixstyle_alpha, settings.mixstyle_alpha, len(domains))
    if settings.mixstyle_partner == "random":
        return Draws(share, random.permutation(len(domains)))
    others = [np.flatnonzero(domains != domain) for domain in domains]
    if any(len(other) == 0 for other in others):
        raise ValueError("cross-domain partners need two source domains in every batch")
    return Draws(share, np.array([random.choice(other) for other in others]))


def mix_styles(x: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """(X1) and (X3): x (B, C, h, w), lambda (B,), partners (B,) -> (B, C, h, w), moments in fp32."""
    with torch.no_grad():
        var, mean = torch.var_mean(x.float(), dim=(2, 3), correction=1, keepdim=True)
        deviation = (var + _EPS).sqrt()
        own = share.float()[:, None, None, None]
        mixed_mean = own * mean + (1 - own) * mean[partner]
        mixed_deviation = own * deviation + (1 - own) * deviation[partner]
    return ((x.float() - mean) * (mixed_deviation / deviation) + mixed_mean).to(x.dtype)


class StyleMixing(nn.Module):
    """One site: mixes the maps of `stage` in training, and lets them pass in evaluation.

    Args:
        switch: shared by the sites; says which step is under way.
    """

    def __init__(self, stage: int, settings: MixStyleSettings, seed: int, switch: Switch[MixedStep]) -> None:
        super().__init__()
        self.stage, self.settings, self.seed, self.switch = stage, settings, seed, switch

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w). Raises RuntimeError in training outside `with switch.on(step)`, and UsageError
        on maps of 1 x 1."""
        if not self.training:
            return x
        draws = draw(self.settings, self.seed, self.stage, self.switch.route)
        if draws is None:
            return x
        need_a_map(x)
        return mix_styles(x, torch.from_numpy(draws.share).to(x.device), torch.from_numpy(draws.partner).to(x.device))


class MixStyle(PlainMethod):
    """The plain baseline's step on a network that mixes the styles of a batch behind some stages."""

    title = "MixStyle"
    reference = "Zhou, Yang, Qiao and Xiang, Domain Generalization with MixStyle, ICLR 2021"
    searched = ("mixstyle_p", "mixstyle_alpha")
    Settings = MixStyleSettings
    settings: MixStyleSettings

    def __init__(self, settings: MixStyleSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        if settings.mixstyle_partner == "cross_domain" and self.num_domains < 2:
            raise UsageError(
                "mixstyle_partner: cross_domain takes the style of another source domain, but this protocol trains on "
                f"{self.num_domains}; set mixstyle_partner=random, or choose another method"
            )
        self.switch: Switch[MixedStep] = Switch()
        # Behind whole stages, where nothing is recomputed: a second pass would find no step under way.
        stages = self.backbone.stages
        for stage in settings.mixstyle_stages:
            site = StyleMixing(stage, settings, setup.seed, self.switch)
            self.backbone.insert_after(stages[stage - 1], f"mixstyle{stage}", site)

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """The plain baseline's losses, with styles mixed on the way."""
        with self.switch.on(MixedStep(step, batch.domains)):
            return super().training_losses(batch, step)
