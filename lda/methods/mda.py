"""MDA: Meta Distribution Alignment for Generalizable Person Re-Identification (Ni, Song, Luo, Zheng, Li, Shen), CVPR
2022: its release.

A network of MetaBIN, and a small variational autoencoder psi that ties its features to a standard normal prior. Images
(B, 3, H, W); f = n(GeM(F)) (B, D) behind the BNNeck n, detached in all that follows, so the autoencoder never reaches
the network; L latents; S(x) = LeakyReLU_0.01(BN(linear(x))).

    (M2), (M3): the base step and the gate step of MetaBIN, as in `lda/methods/metabin.py`
    (M4) encoder: u = S_H2(S_H1(f)),  mu = linear(u), l = linear(u), (B, L) each; H1 = min(512, D/2), H2 = min(128, D/4)
    (M5) z = mu + exp(l / 2) eps,  eps ~ N(0, I) drawn from (seed, step);  test: z = mu
    (M6) decoder: fhat = tanh(linear(S_H1(linear_H2(z))))
    (M7) V(f; psi) = mean_{n,d} (fhat - f)^2 + beta mean_n 1/2 sum_l (mu^2 + e^l - 1 - l)
    (M8) psi' = psi - alpha grad V(f_tr; psi),  alpha = `mda_inner_rate`, exact: the gradient keeps its graph
    (M9) psi is learnt by V(f_tr; psi) + V(f_te; psi');   `mda_meta=off`, as released: by V(f_tr; psi)
    (M10) test: f_test = l2((1 - mix) f + mix fhat)

f_tr and f_te are what the passes of the gate step saw, of meta-train and meta-test sources; where no gate step is made
(`mda_base=bn`, `metabin_meta=off`, warm-up) the base step's features, split in the same way. psi has an optimiser of
its own, SGD with rate 0.01, momentum 0.9 and decay 5e-4 whatever the schedule: the trainer's has one rule and one
schedule for all groups. Its momentum is in buffers, so that checkpoints hold it. In (M9) only V(f_tr; psi) enters the
running statistics of psi.

`mda_inference`, of which the first alone looks at nothing but the image:
    source   (M10) with what was learnt
    camera   (M11) before: every batch normalisation of network and neck takes the statistics of up to
             `mda_camera_images` images of the camera, queries and gallery apart (`lda/parts/camera_statistics.py`)
    latent   (M11), then `mda_steps` steps (M8) of psi on the features of the same images
A camera with one image keeps what was learnt. The published rows are transductive: the release tests by (M11) and
(M10), with z drawn and an autoencoder that, without training, is new; its log without meta-learning reaches the row.
Control for `camera`: any method under it.

Confidence: 90 % for training, from the release (haoni0812/MDA, the commits 108ce0d and 57faa14); `latent` is the
paper's stated intent in our reading (the release's own code for it never runs). Departures: what the release writes as
the second term of (M9) is commented out there, and would not reach psi; it takes meta-test features before the neck;
batches, optimiser and losses of the network are those of all methods here. tanh cannot reach |f| > 1, and a mean over D
against a sum over L weighs the prior by beta D / 2: few latents stay active, `vae/active` counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from lda.batch import Batch, Layout
from lda.groups import Setup
from lda.methods.base import Cost, Losses, ParameterGroup, TargetImages, Update
from lda.methods.plain import PlainMethod
from lda.parts.batch_instance_norm import (
    GateSettings,
    check_gates,
    check_split,
    clamp_gates,
    gate_step,
    mean_gate,
    undecayed,
    use_batch_instance_norm,
)
from lda.parts.camera_statistics import images_of_camera, take_camera_statistics
from lda.parts.episodes import draw_held_out, inner_gradient, inner_step
from lda.parts.routes import statistics_held
from lda.settings import Range, setting

_NOISE, _TEST_NOISE = 20, 21  # what a random stream is for
_ACTIVE = 0.01  # variance of mu above which a latent says something


@dataclass(frozen=True, kw_only=True)
class MDASettings(GateSettings):
    """Settings of MDA; those of the gates are MetaBIN's."""

    mda_base: Literal["metabin", "bn"] = setting("metabin", "network and its step: MetaBIN's, or the plain one", "MDA")
    mda_meta: Literal["on", "off"] = setting("on", "Eq. (M9); off: its first term alone, as released", "MDA")
    mda_latent: int = setting(
        128, "L of Eq. (M4)", "MDA", low=2, high=1024, standin=32, search=Range(16, 256, log=True)
    )
    mda_beta: float = setting(
        0.02147, "beta of Eq. (M7)", "MDA: 48 / 2236", low=0.0, high=10.0, search=Range(1e-4, 0.1, log=True)
    )
    mda_inner_rate: float = setting(
        0.01, "alpha of Eq. (M8)", "MDA", low=1e-6, high=1.0, search=Range(1e-3, 0.1, log=True)
    )
    mda_mix: float = setting(
        0.4, "share of the reconstruction in Eq. (M10)", "MDA", low=0.0, high=1.0, search=Range(0.0, 1.0), test=True
    )
    mda_inference: Literal["source", "camera", "latent"] = setting(
        "source", "camera, latent: adapts to the target's cameras first, by Eq. (M11), and by Eq. (M8)", test=True
    )
    mda_camera_images: int = setting(
        200, "images of a camera, at most, that inference adapts to", "MDA", low=2, high=10**4,
        search=Range(10, 1000, log=True), test=True,
    )  # fmt: skip
    mda_steps: int = setting(
        1,
        "steps of Eq. (M8) for a camera in the inference mode latent",
        low=0,
        high=100,
        search=Range(0, 20),
        test=True,
    )


# --- Eqs. (M4) to (M7) -----------------------------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """fhat (n, D), and mean and logarithm of the variance of the latents, (n, L) each."""

    features: Tensor
    mean: Tensor
    log_var: Tensor


class LatentModel(nn.Module):
    """The variational autoencoder psi of features (n, D)."""

    def __init__(self, num_features: int, num_latents: int) -> None:
        super().__init__()
        wide, narrow = min(512, num_features // 2), min(128, num_features // 4)
        self.num_latents = num_latents
        self.encoder = nn.Sequential(*_site(num_features, wide), *_site(wide, narrow))
        self.mean = nn.Linear(narrow, num_latents)
        self.log_var = nn.Linear(narrow, num_latents)
        self.decoder = nn.Sequential(
            nn.Linear(num_latents, narrow), *_site(narrow, wide), nn.Linear(wide, num_features), nn.Tanh()
        )

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """noise: eps (n, L) of Eq. (M5); None: z = mu."""
        hidden = self.encoder(features)
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        latent = mean if noise is None else mean + (0.5 * log_var).exp() * noise
        return Reconstruction(self.decoder(latent), mean, log_var)


def _site(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(0.01)


def latent_loss(found: Reconstruction, features: Tensor, beta: float) -> Tensor:
    """V of Eq. (M7), a scalar; features (n, D)."""
    divergence = 0.5 * (found.mean.square() + found.log_var.exp() - 1.0 - found.log_var).sum(1)
    return F.mse_loss(found.features, features) + beta * divergence.mean()


def held_out_loss(model: LatentModel, seen: Tensor, features: Tensor, noise: Tensor, settings: MDASettings) -> Tensor:
    """V(f_te; psi') of Eq. (M9), differentiable through Eq. (M8), where `seen` is V(f_tr; psi) with its graph.

    features (n, D), noise (n, L) of meta-test. Writes no running statistics.
    """
    psi = dict(model.named_parameters())
    slope = torch.autograd.grad(seen, list(psi.values()), create_graph=True)
    virtual = inner_step(psi, dict(zip(psi, slope, strict=True)), settings.mda_inner_rate)
    with statistics_held(model):
        found = functional_call(model, virtual, (features, noise))
    return latent_loss(found, features, settings.mda_beta)


class MomentumSGD(nn.Module):
    """torch's SGD with momentum and coupled weight decay, at a constant rate; what it remembers are its buffers."""

    def __init__(
        self, parameters: Mapping[str, Tensor], rate: float = 0.01, momentum: float = 0.9, decay: float = 5e-4
    ) -> None:
        super().__init__()
        self.rate, self.momentum, self.decay = rate, momentum, decay
        for name, parameter in parameters.items():
            self.register_buffer(name.replace(".", "/"), torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> None:
        """Move the parameters, in place, against their gradients."""
        for name, parameter in parameters.items():
            memory = self.get_buffer(name.replace(".", "/"))
            memory.mul_(self.momentum).add_(gradient[name] + self.decay * parameter)
            parameter.sub_(self.rate * memory)


# --- the method ------------------------------------------------------------------------------------------------------


class MDA(PlainMethod):
    """MetaBIN's steps, and a step of an autoencoder on the features that they saw."""

    title = "MDA"
    reference = (
        "Ni, Song, Luo, Zheng, Li, Shen: Meta Distribution Alignment for Generalizable Person Re-Identification, "
        "CVPR 2022"
    )
    searched = ("mda_beta", "mda_latent", "mda_inner_rate", "metabin_gate_rate")
    min_domains = 2
    Settings = MDASettings
    settings: MDASettings

    def __init__(self, settings: MDASettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.gated = settings.mda_base == "metabin"
        self.learns_gates = self.gated and settings.metabin_meta == "on"
        check_split(settings, setup)
        if self.gated:
            check_gates(settings, setup, self.title)
            use_batch_instance_norm(self.backbone, trained_gates=not self.learns_gates)
        self.latent = LatentModel(self.backbone.channels, settings.mda_latent)
        self.latent_optimizer = MomentumSGD(dict(self.latent.named_parameters()))

    @property
    def label(self) -> str:
        if self.learns_gates:
            return self.title
        return f"{self.title} on {'BIN' if self.gated else 'plain BN'}"

    @property
    def layout(self) -> Layout:
        return Layout(batches=2 if self.learns_gates and self.settings.metabin_batch == "second" else 1)

    @property
    def cost(self) -> Cost:
        return Cost(train_passes=5 / 3 if self.learns_gates else 1)

    @property
    def inference(self) -> str:
        return self.settings.mda_inference

    @property
    def looks_at_target(self) -> bool:
        return self.settings.mda_inference != "source"

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """As MetaBIN's: "main" and, with gates, "undecayed". The autoencoder is in none."""
        apart = undecayed(self.backbone)
        rest = {id(parameter) for parameter in (*apart, *self.latent.parameters())}
        groups = {"main": ParameterGroup([p for p in self.parameters() if p.requires_grad and id(p) not in rest])}
        return groups | ({"undecayed": ParameterGroup(apart, decay=False)} if self.gated else {})

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        """Eqs. (M2), (M3) and (M9)."""
        features, losses = self.passed(batch)
        update(losses, groups=tuple(self.parameter_groups()))
        if self.learns_gates and step >= self.settings.metabin_warmup:
            shown = batch if batch.extra is None else batch.extra
            gates = gate_step(self.backbone, shown, self.settings, self.setup, step)
            return losses | gates.losses | self._latent_step(gates.train.features, gates.test.features, step)
        if self.gated and not self.learns_gates:
            clamp_gates(self.backbone)
            losses["gate/mean"] = mean_gate(self.backbone)
        return losses | self._latent_step(*self._split(features.detach(), batch.domains, step), step)

    def _split(self, features: Tensor, domains: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Features of meta-train and meta-test sources, drawn as in a gate step."""
        number = self.num_domains - self.settings.train_domains(self.num_domains)
        held_out = torch.tensor(draw_held_out(domains, self.setup.seed, step, number))
        tested = torch.isin(domains, held_out)
        first, second = ((chosen.nonzero()[:, 0]).to(features.device) for chosen in (~tested, tested))
        return features[first], features[second]

    def _latent_step(self, train: Tensor, test: Tensor, step: int) -> Losses:
        """Eqs. (M8) and (M9): features (n, D) before the neck of both parts. Writes psi and its momentum."""
        random = _generator(self.setup.seed, step, _NOISE)
        with torch.autocast(train.device.type, enabled=False):
            with torch.no_grad(), statistics_held(self.head):
                behind = [self.head.necks[0](part.float()) for part in (train, test)]
            seen, unseen = ((part, self._noise(part, random)) for part in behind)
            found = self.latent(*seen)
            losses = {"loss/vae": latent_loss(found, seen[0], self.settings.mda_beta)}
            if self.settings.mda_meta == "on":
                losses["loss/vae_held_out"] = held_out_loss(self.latent, losses["loss/vae"], *unseen, self.settings)
            psi = dict(self.latent.named_parameters())
            gradient = inner_gradient(torch.stack(list(losses.values())).sum(), psi)  # Eq. (M9)
        self.latent_optimizer.step(psi, gradient)
        active = (found.mean.detach().var(0) > _ACTIVE).sum().float()
        return {name: loss.detach() for name, loss in losses.items()} | {"vae/active": active}

    def _noise(self, features: Tensor, random: Generator) -> Tensor:
        return torch.randn(len(features), self.settings.mda_latent, generator=random).to(features.device)

    # --- test --------------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """Eq. (M10): features (B, D), L2-normalised."""
        features = self._behind_neck(images).float()
        with torch.autocast(features.device.type, enabled=False):
            reconstruction = self.latent(features).features
        return F.normalize((1.0 - self.settings.mda_mix) * features + self.settings.mda_mix * reconstruction)

    def _behind_neck(self, images: Tensor) -> Tensor:
        features: Tensor = self.head.necks[0](self.pooled(self.backbone(images)))
        return features

    def adapt(self, target: Iterable[TargetImages]) -> None:
        """Eq. (M11) for one camera of one side, and in the mode `latent` steps (M8) of the autoencoder."""
        images = images_of_camera(target, self.settings.mda_camera_images)
        taken = take_camera_statistics(self._behind_neck, images, (self.backbone, self.head))
        if not taken or self.settings.mda_inference != "latent":
            return
        with torch.no_grad():
            features = self._behind_neck(images).float()
        self.latent.train()  # a step as in training: its own statistics of the batch
        for step in range(self.settings.mda_steps):
            noise = self._noise(features, _generator(self.setup.seed, step, _TEST_NOISE))
            psi = dict(self.latent.named_parameters())
            with torch.enable_grad(), statistics_held(self.latent):
                loss = latent_loss(self.latent(features, noise), features, self.settings.mda_beta)
                stepped = inner_step(psi, inner_gradient(loss, psi), self.settings.mda_inner_rate)
            with torch.no_grad():
                for name, parameter in psi.items():
                    parameter.copy_(stepped[name])
        self.latent.eval()


def _generator(seed: int, step: int, purpose: int) -> Generator:
    return Generator().manual_seed(int(np.random.default_rng([seed, step, purpose]).integers(2**63)))
