"""LDA: Latent Distribution Alignment (Nie, Ding, He, Zhou), re-implemented from its poster.

X is a layer's input (N images, C channels), k the batch's source domain, j != k the donor, K the number of sources, m
the bank momentum, lambda_c and lambda_a the weights of the latent losses; mu_b, v_b are moments of the batch over
(n, h, w), mu_i, v_i of image i over (h, w); row k of a bank holds mu_k, v_k; sigma = sqrt(v + eps).

    Network-E, the expert: batch normalisation on batches of one domain, and the Buffer Bank that remembers it
        (1)  E_k(X) = gamma (X - mu_b) / sigma_b + beta
        (2)  mu_b, v_b = mean and variance of X over (n, h, w)
        (3)  mu_k <- m mu_k + (1 - m) mu_b,   v_k <- m v_k + (1 - m) v_b
    Network-A, Anti-Normalization: an image as if it came from an unseen domain, given another domain's statistics
        (4)  AN(X_i) = sigma_j (X_i - mu_i) / sigma_i + mu_j
    The latent distribution, without gradient
        (5)  F_E, F_A = the last maps of both paths, after the ReLU
        (6)  M_k, V_k = bank of the mean and variance of F_E, kept as in (3)
        (7)  mu* = mean_k M_k,   v* = mean_k V_k
        (8)  D(p, q)^2 = (|mu_p - mu_q|^2 + |sigma_p - sigma_q|^2) / C
    The losses
        (9)  L_consis = D(batch statistics of F_E, latent)
        (10) L_align = mean_i D(statistics of F_A,i, latent)
        (11) L = [CE + Tri]_E + [CE + Tri]_A + lambda_c L_consis + lambda_a L_align

(1) to (4) are the layer of `lda/parts/anti_norm.py`, whose donors are drawn in `donors.py` and whose statistics are
found in `given.py`; (6) to (10) are in `latent.py`, and (11) is here.

Not on the poster, so our reading: the form of (7) to (10), the weights, the inference rule, the schedule. Every choice
that the poster leaves open is a setting below. `camera_statistics` is no part of LDA: the control for methods that look
at the target, on Network-E.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch, Layout
from lda.errors import UsageError
from lda.groups import Setup
from lda.kept import Kept
from lda.methods.base import Cost, Losses, Method, TargetImages
from lda.parts.anti_norm import (
    Affine,
    AntiNormalised,
    BufferBankNorm2d,
    Expert,
    InstanceNormalised,
    Route,
    Sites,
    Start,
    UnseenExpert,
    add_buffer_banks,
    named_banks,
)
from lda.parts.backbones import backbone_of
from lda.parts.bank import BufferBank, pair_distances
from lda.parts.bank_pictures import kept_banks
from lda.parts.camera_statistics import CameraSettings, images_of_camera, take_camera_statistics
from lda.parts.donors import by_distance, draw_donor, draw_donors
from lda.parts.given import (
    GaussianStatistics,
    Given,
    MeanRow,
    MeanRowAndOwn,
    NearestRow,
    OtherImages,
    Row,
    RowOfLayer,
    Rows,
    WeightedRows,
)
from lda.parts.heads import Head, gem, label_offsets
from lda.parts.latent import (
    Distance,
    Latent,
    alignment_loss,
    consistency_loss,
    gradient_ratio,
    image_statistics,
    latent_distribution,
)
from lda.parts.losses import (
    Gaussian,
    IdentitySettings,
    batch_hard_triplet_loss,
    batch_statistics,
    identity_loss,
    scale_of,
)
from lda.settings import Range, setting, settings_of

Donor = Literal[
    "uniform", "round_robin", "per_image", "per_layer", "nearest", "farthest", "all", "own", "gaussian", "other_images"
]
_NO_OTHER_DOMAIN: tuple[Donor, ...] = ("own", "gaussian", "other_images")


@dataclass(frozen=True, kw_only=True)
class LDASettings(IdentitySettings, CameraSettings):
    """Settings of LDA."""

    bank_momentum: float = setting(
        0.9, "m of Eq. (3): bank <- m * bank + (1 - m) * batch", "ReNorm, META", low=0.0, high=0.9999,
        search=Range(0.5, 0.99),
    )  # fmt: skip
    consistency_weight: float = setting(
        0.1, "lambda_c of Eq. (11), weight of L_consis", low=0.0, high=100.0, search=Range(0.01, 5.0, log=True)
    )
    alignment_weight: float = setting(
        0.1, "lambda_a of Eq. (11), weight of L_align", low=0.0, high=100.0, search=Range(0.01, 5.0, log=True)
    )
    bank_warmup_updates: int = setting(
        50, "bank updates every domain must have before Network-A starts (0: at once)", low=0, high=10**6, standin=5,
        search=Range(0, 100),
    )  # fmt: skip
    bank_start: Start = setting(
        "first_batch", "rows begin as their first batch, the pretrained statistics, or zeros", later=True
    )
    network_a: Literal["an", "in", "none"] = setting(
        "an", "second path: an = Anti-Normalization, in = instance norm without the bank, none", "poster"
    )
    an_affine: Affine = setting(
        "none", "after AN: none, Network-E's gamma and beta, or its way with an unseen domain (renormalised)", "poster"
    )
    donor: Donor = setting(
        "uniform",
        "donor j != k of Eq. (4): one per step, image or layer, nearest, farthest, all; or a control",
        "poster (another domain)",
    )
    norm_sites: Sites = setting("all", "layers that hold a Buffer Bank, the others stay plain", "poster (every layer)")
    latent: Latent = setting("mean", "latent distribution of Eq. (7)")
    latent_gradient: Literal["stopped", "flows"] = setting(
        "stopped", "through the latent distribution into the batch's own statistics", later=True
    )
    latent_maps: Literal["last", "stages"] = setting(
        "last", "Eqs. (5) to (10) on the last map, or averaged over those after every stage", later=True
    )
    distance: Distance = setting("w2", "D of Eq. (8)", "META's 2-Wasserstein helper")
    alignment: Literal["image", "batch", "within"] = setting(
        "image", "L_align of Eq. (10) per image, on the batch average, or per image with variances within images"
    )
    margin_ratio: float = setting(
        1.0, "triplet margin of Network-A over that of Network-E", "META; ReNorm 2", low=0.0, high=100.0,
        search=Range(0.5, 4.0, log=True), later=True,
    )  # fmt: skip
    heads: Literal["separate", "shared"] = setting("separate", "BNNeck and classifier of the two paths", "ReNorm")
    classifier: Literal["per_domain", "joint"] = setting(
        "per_domain", "one BNNeck and classifier per source, or one over all sources", "ReNorm, ACL"
    )
    inference: Literal["fused", "aligned", "expert", "concatenated"] = setting(
        "fused", "fused = expert + aligned, or one behind the other; aligned = Network-A; expert = Network-E", "ReNorm",
        test=True,
    )  # fmt: skip
    test_donors: Literal["all", "nearest", "weighted", "mixed"] = setting(
        "all", "Network-A's rows for a test image: all in turn, the nearest, by relevance, or their mean", "ReNorm",
        test=True, later=True,
    )  # fmt: skip
    unseen_expert: Literal["mean", "nearest", "weighted", "mixed_with_own"] = setting(
        "mean", "Network-E's statistics for a test image: mean of the rows, its nearest, by relevance, half its own",
        "ReNorm", test=True, later=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network_a == "none" and self.inference != "expert":
            raise UsageError(
                f"inference: {self.inference!r} needs Network-A, but network_a is none; set inference=expert"
            )
        if self.inference == "aligned" and self.camera_statistics == "on":
            raise UsageError(
                "camera_statistics: Network-A normalises by the image alone, so it has none to replace; "
                "set camera_statistics=off, or inference=fused"
            )
        self._refuse_without("Network-A", self.network_a != "none", "network_a", ("alignment", "margin_ratio"))
        self._refuse_without("Anti-Normalization", self.network_a == "an", "network_a", ("an_affine", "donor"))
        tested = self.network_a == "an" and self.inference != "expert"
        self._refuse_without("Anti-Normalization in the test", tested, "inference", ("test_donors",))
        self._refuse_without("Network-E in the test", self.inference != "aligned", "inference", ("unseen_expert",))
        replaced = self.camera_statistics == "on"
        self._refuse_without("statistics of the bank", not replaced, "camera_statistics", ("unseen_expert",))

    def _refuse_without(self, what: str, there: bool, cause: str, names: Sequence[str]) -> None:
        """Raises UsageError for a setting that would change nothing."""
        for name in names:
            default = settings_of(LDASettings)[name].default
            if not there and getattr(self, name) != default:
                raise UsageError(
                    f"{name}: {getattr(self, name)!r} needs {what}, but {cause} is {getattr(self, cause)}; "
                    f"leave {name} at {default}"
                )


class LDA(Method):
    """Network-E and Network-A are two passes of one backbone with Buffer Banks, on batches of one domain k."""

    title = "LDA"
    reference = "Nie, Ding, He, Zhou: Latent Distribution Alignment (poster)"
    searched = ("consistency_weight", "alignment_weight", "bank_momentum")
    Settings = LDASettings
    settings: LDASettings

    def __init__(self, settings: LDASettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        if settings.network_a == "an" and self.num_domains < 2 and settings.donor not in _NO_OTHER_DOMAIN:
            raise UsageError(
                "network_a: Anti-Normalization borrows the statistics of another source domain, but this protocol "
                f"trains on {self.num_domains}; set network_a=in, or choose another method"
            )
        if settings.bank_start == "pretrained" and setup.network.pretrained == "none" and setup.fresh:
            raise UsageError(
                "bank_start: pretrained begins with the statistics of pretrained weights, and pretrained is none; set "
                "bank_start=first_batch, or set pretrained to weights"
            )
        self.backbone = backbone_of(setup)
        # The latent losses watch these maps, the last of which is the output.
        watched = self.backbone.stage_widths if settings.latent_maps == "stages" else [self.backbone.channels]
        self.switch = add_buffer_banks(
            self.backbone,
            self.num_domains,
            settings.bank_momentum,
            settings.an_affine,
            settings.norm_sites,
            settings.bank_start,
        )
        joint = settings.classifier == "joint"
        groups = [sum(setup.num_ids)] if joint else list(setup.num_ids)
        self.head_e = Head(self.backbone.channels, groups)
        separate = settings.network_a != "none" and settings.heads == "separate"
        self.head_a = Head(self.backbone.channels, groups) if separate else self.head_e
        self.output_bank = self._new_bank(self.backbone.channels)
        # Of the maps before the last one, and of variances within images; both empty by default.
        self.stage_banks = nn.ModuleList(map(self._new_bank, watched[:-1]))
        within = watched if settings.alignment == "within" else []
        self.within_banks = nn.ModuleList(map(self._new_bank, within))
        self.offsets = label_offsets(setup.num_ids).tolist() if joint else [0] * self.num_domains

    def _new_bank(self, channels: int) -> BufferBank:
        return BufferBank(self.num_domains, channels, self.settings.bank_momentum)

    @property
    def layout(self) -> Layout:
        return Layout(domains="one")

    @property
    def inference(self) -> str:
        settings = self.settings
        donors = "" if settings.test_donors == "all" else f", {settings.test_donors} donors"
        unseen = "" if settings.unseen_expert == "mean" else f", Network-E by {settings.unseen_expert} rows"
        return settings.inference + donors + unseen + (", camera statistics" if self.looks_at_target else "")

    @property
    def looks_at_target(self) -> bool:
        return self.settings.camera_statistics == "on"

    def adapt(self, target: Iterable[TargetImages]) -> None:
        """Let Network-E normalise by statistics of one camera's images instead of the mean bank's. Network-A takes
        every image by itself, so nothing changes there."""
        for layer in self.backbone.modules():
            if isinstance(layer, BufferBankNorm2d):
                layer.watch_camera()
        images = images_of_camera(target, self.settings.camera_images)
        take_camera_statistics(lambda shown: self._maps(shown, UnseenExpert())[-1], images, [self.backbone])

    @property
    def cost(self) -> Cost:
        passes = 0 if self.settings.network_a == "none" else 1
        if self.settings.donor == "all":
            passes = self.num_domains - 1
        return Cost(train_passes=1 + passes, test_forwards=len(self._test_routes()))

    # --- training ----------------------------------------------------------------------------------------------------

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """Eq. (11) for one batch of a single domain. Writes row k of every bank."""
        settings = self.settings
        domain = int(batch.domains[0])
        labels = batch.labels + self.offsets[domain]

        maps_e = self._maps(batch.images, Expert(domain))  # Eqs. (1)-(3), (5)
        features_e = gem(maps_e[-1], self.setup.network.gem_p)
        outputs = self._update_output_banks(domain, maps_e)  # Eq. (6)
        latents = self._latents(domain, maps_e, outputs)  # Eq. (7)
        losses = self._identity(self.head_e, features_e, labels, domain, "e")
        losses["loss/consistency"] = _mean(  # Eq. (9)
            [consistency_loss(maps, latent, settings.distance) for maps, latent in zip(maps_e, latents, strict=True)]
        )
        total = self._of_identity(losses, "e")
        losses["gradient/consistency"] = gradient_ratio(losses["loss/consistency"], total, maps_e[-1])
        ramp = self.latent_ramp(step)
        total = total + ramp * settings.consistency_weight * losses["loss/consistency"]

        if self.aligned_ready():
            routes = self.draw_routes(domain, step, len(batch.images))
            losses |= _averaged(
                [self._aligned_losses(batch.images, route, labels, domain, latents) for route in routes]
            )
            total = total + losses["loss/id_a"] + settings.triplet_weight * losses["loss/triplet_a"]
            total = total + ramp * settings.alignment_weight * losses["loss/alignment"]
        return {"loss/total": total, **losses, **scale_of(features_e, outputs[-1])}

    def _aligned_losses(
        self, images: Tensor, route: Route, labels: Tensor, domain: int, latents: Sequence[Gaussian]
    ) -> Losses:
        """The identity losses of Network-A, and Eq. (10)."""
        maps_a = self._maps(images, route)  # Eqs. (4), (5)
        losses = self._identity(self.head_a, gem(maps_a[-1], self.setup.network.gem_p), labels, domain, "a")
        aims = self._within(latents) if self.settings.alignment == "within" else latents
        per_image = self.settings.alignment != "batch"
        losses["loss/alignment"] = _mean(
            [
                alignment_loss(maps, aim, self.settings.distance, per_image)
                for maps, aim in zip(maps_a, aims, strict=True)
            ]
        )
        identity = self._of_identity(losses, "a")
        losses["gradient/alignment"] = gradient_ratio(losses["loss/alignment"], identity, maps_a[-1])
        return losses

    def _of_identity(self, losses: Losses, path: str) -> Tensor:
        """CE + Tri of Eq. (11) on one path."""
        return losses[f"loss/id_{path}"] + self.settings.triplet_weight * losses[f"loss/triplet_{path}"]

    def _maps(self, images: Tensor, route: Route) -> list[Tensor]:
        """The maps that the latent losses watch, the last of them the network's output."""
        with self.switch.on(route):
            return self.backbone.stage_maps(images) if len(self.stage_banks) else [self.backbone(images)]

    def _identity(self, head: Head, features: Tensor, labels: Tensor, domain: int, path: str) -> Losses:
        group = domain if self.settings.classifier == "per_domain" else 0
        margin = self.settings.triplet_margin * (self.settings.margin_ratio if path == "a" else 1.0)
        return {
            f"loss/id_{path}": identity_loss(head(features, group), labels, self.settings.label_smoothing),
            f"loss/triplet_{path}": batch_hard_triplet_loss(features, labels, margin),
        }

    # --- the latent distribution -------------------------------------------------------------------------------------

    def _output_banks(self) -> list[BufferBank]:
        """Of the maps that are watched, in their order."""
        return [*_banks(self.stage_banks), self.output_bank]

    def _update_output_banks(self, domain: int, maps_e: Sequence[Tensor]) -> list[Gaussian]:
        """Eq. (6), and the same of variances within images. Returns what entered the banks."""
        outputs = [batch_statistics(maps.detach()) for maps in maps_e]
        for bank, output in zip(self._output_banks(), outputs, strict=True):
            bank.update(domain, *output)
        within = _banks(self.within_banks)
        for bank, maps in zip(within, maps_e if within else (), strict=True):
            images = image_statistics(maps.detach())
            bank.update(domain, images.mean.mean(0), images.var.mean(0))
        return outputs

    def _latents(self, domain: int, maps_e: Sequence[Tensor], outputs: Sequence[Gaussian]) -> list[Gaussian]:
        """Eq. (7) for every map that is watched, over the domains seen so far; `outputs`: what entered the banks."""
        latents = []
        for bank, maps, output in zip(self._output_banks(), maps_e, outputs, strict=True):
            seen = bank.seen()
            rows = Gaussian(bank.mean[seen], bank.var[seen])
            if self.settings.latent_gradient == "flows":
                rows = _with_gradient(rows, batch_statistics(maps), bank, seen.index(domain))
            latents.append(latent_distribution(rows, self.settings.latent, output))
        return latents

    def _within(self, latents: Sequence[Gaussian]) -> list[Gaussian]:
        """The latents with the mean over domains of variances within images: like is compared with like, since the
        variance of a domain also holds that of its images' means, which no single image can have."""
        seen, banks = self.output_bank.seen(), _banks(self.within_banks)
        return [Gaussian(latent.mean, bank.var[seen].mean(0)) for latent, bank in zip(latents, banks, strict=True)]

    def latent_ramp(self, step: int) -> float:
        """Share of the latent losses' weights at a step: 0 to 1 over the learning rate's warm-up."""
        warmup = self.setup.schedule.warmup_steps
        return 1.0 if warmup == 0 else min(1.0, step / warmup)

    # --- Network-A ---------------------------------------------------------------------------------------------------

    def aligned_ready(self) -> bool:
        """Network-A starts when every domain's bank row is settled: before, AN would inject noise."""
        if self.settings.network_a == "none":
            return False
        return min(self.output_bank.counts) >= max(self.settings.bank_warmup_updates, 1)

    def draw_routes(self, domain: int, step: int, count: int) -> list[Route]:
        """The second path of a step with `count` images, or the second paths where every donor has one; a function of
        (seed, step) and the banks, so that a resumed run agrees."""
        if self.settings.network_a == "in":
            return [InstanceNormalised()]
        return [AntiNormalised(given) for given in self._donors(domain, step, count)]

    def _donors(self, domain: int, step: int, count: int) -> list[Given]:
        seed, others = self.setup.seed, self.num_domains
        match self.settings.donor:
            case "uniform" | "round_robin" as rule:
                return [Row(draw_donor(rule, domain, others, seed, step))]
            case "per_image":
                return [Rows(draw_donors(count, domain, others, seed, step))]
            case "per_layer":
                return [RowOfLayer(domain, seed, step)]
            case "nearest" | "farthest" as rule:
                return [Row(by_distance(rule, domain, self.output_bank))]
            case "all":
                return [Row(other) for other in range(others) if other != domain]
            case "own":
                return [Row(domain)]
            case "gaussian":
                return [GaussianStatistics(seed, step)]
            case "other_images":
                return [OtherImages(seed, step)]

    # --- test --------------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, D) before the BNNeck in the configured inference mode; every image on its own.

        expert: E by the statistics of `unseen_expert`. aligned: mean of A over `test_donors`. fused: their sum;
        concatenated: one behind the other, 2 D numbers. Every part is L2-normalised first.
        """
        features = {route: self._feature(images, route) for route in self._test_routes()}
        parts = [feature for route, feature in features.items() if isinstance(route, UnseenExpert)]
        if aligned := [feature for route, feature in features.items() if not isinstance(route, UnseenExpert)]:
            parts.append(torch.stack(aligned).mean(0))
        return torch.cat(parts, 1) if self.settings.inference == "concatenated" else torch.stack(parts).sum(0)

    def _test_routes(self) -> list[Route]:
        """The passes of a test image. Network-A borrows rows of the bank, whatever was given to it in training."""
        routes: list[Route] = []
        if self.settings.inference != "aligned":
            unseen: dict[str, Given] = {
                "mean": MeanRow(),
                "nearest": NearestRow(),
                "weighted": WeightedRows(),
                "mixed_with_own": MeanRowAndOwn(),
            }
            routes.append(UnseenExpert(unseen[self.settings.unseen_expert]))
        if self.settings.inference != "expert":
            routes += [InstanceNormalised()] if self.settings.network_a == "in" else self._test_donors()
        return routes

    def _test_donors(self) -> list[Route]:
        donors: dict[str, list[Given]] = {
            "all": [Row(domain) for domain in range(self.num_domains)],
            "nearest": [NearestRow()],
            "weighted": [WeightedRows()],
            "mixed": [MeanRow()],
        }
        return [AntiNormalised(given) for given in donors[self.settings.test_donors]]

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Of Network-E, and of Network-A the mean over its donors, as far as the inference passes through them."""
        found: dict[str, list[Tensor]] = {}
        for route in self._test_routes():
            path = "E" if isinstance(route, UnseenExpert) else "A"
            found.setdefault(path, []).append(self._maps(images, route)[-1].square().sum(1))
        return {path: torch.stack(maps).mean(0) for path, maps in found.items()}

    def _feature(self, images: Tensor, route: Route) -> Tensor:
        return F.normalize(gem(self._maps(images, route)[-1], self.setup.network.gem_p))

    # --- what is left ------------------------------------------------------------------------------------------------

    def banks(self) -> Iterator[tuple[str, BufferBank]]:
        """(layer name, bank) of every layer, then the bank of output statistics."""
        yield from named_banks(self.backbone)
        yield "output", self.output_bank

    def kept(self, domains: list[str]) -> dict[str, Kept]:
        return kept_banks(domains, dict(self.banks()))

    def course(self, domains: list[str]) -> dict[str, float]:
        return pair_distances(domains, dict(self.banks()))


def _banks(modules: nn.ModuleList) -> list[BufferBank]:
    return cast(list[BufferBank], list(modules))


def _with_gradient(rows: Gaussian, live: Gaussian, bank: BufferBank, own: int) -> Gaussian:
    """The rows (K, C) as they are, with the gradient of row `own` through the batch's statistics, of which Eq. (3) put
    1 - m into it; all of them into a row that the batch began."""
    share = 1.0 if bank.counts[bank.seen()[own]] == 1 else 1.0 - bank.momentum
    zero = Gaussian(*(share * (of - of.detach()) for of in live))
    mask = torch.arange(len(rows.mean), device=rows.mean.device)[:, None] == own
    return Gaussian(*(torch.where(mask, row + of, row) for row, of in zip(rows, zero, strict=True)))


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Of scalars; of one it is that one, to the bit."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean()


def _averaged(losses: Sequence[Losses]) -> Losses:
    """Every loss averaged over the passes."""
    return {name: _mean([each[name] for each in losses]) for name in losses[0]}
