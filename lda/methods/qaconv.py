"""QAConv: Interpretable and Generalizable Person Re-Identification with Query-Adaptive Convolution and Temporal Lifting
(Liao, Shao), ECCV 2020; GS: Graph Sampling Based Deep Metric Learning for Generalizable Person Re-Identification (Liao,
Shao), CVPR 2022.

An encoding is a map, and two images are compared by a small learnt matcher: every position of one looks for its best
match in the other. There is no pooled feature, no classifier, and no use of domain labels: the identities of all
sources are pooled. Symbols: a, b images; n an identity, N of them, y_a that of image a; s, t positions.

    (Q1)  X = BN(conv3x3(F)), F the map behind `qaconv_layer`        (B, C, h, w), C = qaconv_neck
    (Q2)  x_s = X_s / max(|X_s|, 1e-12) at every position s          (B, C, r), r = h w
    (Q3)  E_st(a, b) = <a_s, b_t>
    (Q4)  p_s = max_t E_st,   q_t = max_s E_st
    (Q5)  m = BN1([p; q])
    (Q6)  z = w_p . m_p + w_q . m_q + bias
    (Q7)  S(a, b) = BN2(z)                                            (Q3) to (Q7): lda/parts/matching.py
    (Q8)  M_n <- x of an image of n in the batch, after the step      memory (N, C, r), without gradient
    (Q9)  l_an = BCE(S(a, M_n), [y_a = n]) (1 - P_an)^2               P: probability given to the truth, not detached
    (Q10) memory:   L = mean_a sum_{n seen} l_an
    (Q11) pairwise: L = mean_a sum_b BCE(S(a, b), [y_a = y_b])        in the batch, an image with itself included
    (Q12) triplet:  L = mean_a [max_{b: y_b != y_a} S(a, b) - min_{b != a: y_b = y_a} S(a, b) + margin]_+
    (Q13) test: score = S up to a rising affine function, in [-1, 1]

`qaconv_loss`: memory = release 1.0, the ECCV paper; pairwise = release 2.0; triplet = release 2.1, the CVPR paper. With
triplet, `of_loss` gives one w for both directions and a neck of a convolution alone, with a bias and no BN, as in 2.1;
else two and a BN, as in 1.0. The memory holds one image of an identity, as augmented when it was shown last, by the
network of then. (Q9) is masked to identities that were seen, and so are the statistics of (Q5) and (Q7): step 0 has
nothing to match, and its loss is 0. Of the K images of an identity the one in place (step mod K) is remembered. BN1 and
BN2 take their statistics of all pairs of a step. Losses are in fp32, outside autocast.

An image has N - 1 negatives in the memory and one positive, so BN2's shift has to fall to about -ln N before positives
count. The release's SGD goes there in a few steps, since the loss is a sum over n; Adam moves it by the rate a step.
So `qaconv_shift=prior` (ours) begins there, `zero` is the release. On the stand-in (N = 589, 24 x 2 images, 160 steps)
mAP is 0.9 from zero and 17.5 from the prior; by SGD from zero, 18.7. In the first pass over the identities nobody has
a positive, and a row of the memory is up to N / P steps old: the stand-in's 160 steps of 8 x 4 images are two passes,
too few, so there the pairwise loss is the default.

`qaconv_sampler=graph` (GS): every epoch one clean image of each identity, drawn from (seed, epoch), is encoded in
evaluation mode, all N^2 pairs are scored by (Q13), and every identity keeps its P - 1 nearest. A step shows an anchor
with these; anchors in an order drawn from (seed, epoch). An epoch is N steps, or `qaconv_graph_steps`. In a run of
fewer steps than that the only graph is that of the weights before step 0, and some identities are never anchors; then a
smaller `qaconv_graph_steps` is wanted. The table is a buffer, so a resumed run does not need the old weights. Batches
are made in the training process, and (N^2 r^2 C multiply-adds) this is for a GPU where N is in the thousands: N =
17,000 at 256 x 128 is 0.6e15. The cost below leaves out the forward passes of one image an identity and epoch.

Confidence 90 %: read in the releases (github.com/ShengcaiLiao/QAConv, a3db278, tags v1.0-eccv, v2.0, v2.1); which
release stands behind the rows that later papers print is not known. Departures: P x K batches, our augmentation, sizes,
optimiser and schedule; plain ResNets without IBN-b; no temporal lifting, no pre-training, no stopping rule. The release
1.0 has no mask of what was seen; 1.2 and 2.0 take BN statistics per 16 identities. New layers learn at
`qaconv_new_layer_rate` times the schedule's rate: 10 in the releases. `qaconv_freeze_bn` (2.1) keeps the backbone's BN
statistics as pretrained; gamma and beta learn.

Shapes: B images of a batch, K sources, C channels of the matched map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lda.batch import Batch, Layout
from lda.errors import UsageError
from lda.groups import Setup
from lda.methods.base import Cost, Losses, Method, ParameterGroup, Update
from lda.parts.backbones import Backbone, backbone_of, forward_shares, map_size
from lda.parts.graph_sampling import anchor, by_domain, nearest, one_of_each
from lda.parts.heads import label_offsets
from lda.parts.losses import batch_statistics, scale_of
from lda.parts.matching import Matcher, elements_on, focal_losses, hard_score_loss, pairwise_loss
from lda.ranking import Scorer
from lda.settings import Range, Settings, setting


@dataclass(frozen=True, kw_only=True)
class QAConvSettings(Settings):
    """Settings of QAConv."""

    qaconv_loss: Literal["memory", "pairwise", "triplet"] = setting(
        "memory", "Eq. (Q10), (Q11) or (Q12)", "QAConv; GS pairwise, triplet", standin="pairwise"
    )
    qaconv_layer: Literal["layer3", "layer4"] = setting("layer3", "stage whose map is matched", "QAConv")
    qaconv_neck: int = setting(
        128, "C, channels of the matched map", "QAConv", low=8, high=2048, standin=64, search=Range(32, 256, log=True)
    )
    qaconv_neck_norm: Literal["of_loss", "batch", "none"] = setting(
        "of_loss", "BN behind the neck's convolution; of_loss: none with triplet", "QAConv; GS none"
    )
    qaconv_shared_weights: Literal["of_loss", "yes", "no"] = setting(
        "of_loss", "w_p = w_q in Eq. (Q6); of_loss: yes with triplet", "QAConv no; GS yes"
    )
    qaconv_shift: Literal["prior", "zero"] = setting(
        "prior", "BN2's shift at the start, with memory: -ln(N - 1), the log odds of a positive, or 0", "QAConv zero"
    )
    qaconv_margin: float = setting(16.0, "of Eq. (Q12)", "GS", low=0.0, high=100.0, search=Range(1.0, 32.0, log=True))
    qaconv_new_layer_rate: float = setting(
        1.0, "rate of neck and matcher over the schedule's", "neutral; QAConv 10", low=0.1, high=100.0,
        search=Range(0.3, 30.0, log=True),
    )  # fmt: skip
    qaconv_freeze_bn: Literal["no", "yes"] = setting(
        "no", "backbone's BN with its pretrained statistics in training", "QAConv; GS yes"
    )
    qaconv_sampler: Literal["identity", "graph"] = setting(
        "identity", "whose images a step shows: the trainer's choice, or an anchor's look-alikes", "QAConv; GS graph"
    )
    qaconv_graph_steps: int = setting(
        0, "steps between graphs; 0: as many as there are identities", "GS", low=0, high=10**7, standin=40,
        search=Range(10, 1000, log=True),
    )  # fmt: skip
    qaconv_pairs_per_block: int = setting(
        16384, "pairs of images compared at a time; bounds memory only", low=1, high=10**7, standin=1024,
        search=Range(256, 65536, log=True), test=True,
    )  # fmt: skip


class QAConv(Method):
    """A truncated network, a neck, and a matcher of maps, trained on pairs of images."""

    title = "QAConv"
    reference = (
        "Liao, Shao: Interpretable and Generalizable Person Re-Identification with Query-Adaptive Convolution and "
        "Temporal Lifting, ECCV 2020"
    )
    searched = ("qaconv_loss", "qaconv_neck", "qaconv_new_layer_rate")
    Settings = QAConvSettings
    settings: QAConvSettings
    offsets: Tensor  # (K,)
    memory: Tensor  # (N, C, r)
    seen: Tensor  # (N,) bool
    neighbours: Tensor  # (N, P - 1)
    graphs: Tensor  # how many were drawn

    def __init__(self, settings: QAConvSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.num_identities = sum(setup.num_ids)
        self._refuse()
        triplet = settings.qaconv_loss == "triplet"
        self.backbone = backbone_of(setup)
        shares, stem = forward_shares(self.backbone), _multiply_adds_of_stem(self.backbone, setup.image_size)
        self.backbone.cut_after(settings.qaconv_layer)
        self.map_size = map_size(self.backbone, setup.image_size)
        positions = self.map_size[0] * self.map_size[1]
        with_norm = settings.qaconv_neck_norm == "batch" or (settings.qaconv_neck_norm == "of_loss" and not triplet)
        shared = settings.qaconv_shared_weights == "yes" or (settings.qaconv_shared_weights == "of_loss" and triplet)
        self.neck = _neck(self.backbone.channels, settings.qaconv_neck, with_norm)
        self.matcher = Matcher(positions, shared)
        neck_share = shares["conv1"] * 9 * self.backbone.channels * settings.qaconv_neck * positions / stem
        self.passes = neck_share + sum(share for part, share in shares.items() if hasattr(self.backbone, part))

        self.register_buffer("offsets", label_offsets(setup.num_ids), persistent=False)
        if settings.qaconv_loss == "memory":
            self.register_buffer("memory", torch.zeros(self.num_identities, settings.qaconv_neck, positions))
            self.register_buffer("seen", torch.zeros(self.num_identities, dtype=torch.bool))
            if settings.qaconv_shift == "prior":
                nn.init.constant_(self.matcher.norm_scores.bias, -math.log(max(self.num_identities - 1, 1)))
        if self.deals:
            rows = torch.zeros(self.num_identities, setup.ids_per_batch - 1, dtype=torch.int64)
            self.register_buffer("neighbours", rows)
            self.register_buffer("graphs", torch.zeros((), dtype=torch.int64))

    def _refuse(self) -> None:
        settings, network = self.settings, self.setup.network
        if settings.qaconv_freeze_bn == "yes" and network.pretrained == "none" and self.setup.fresh:
            raise UsageError(
                "qaconv_freeze_bn: yes keeps the statistics of pretrained weights, and pretrained is none; set "
                "qaconv_freeze_bn=no, or set pretrained to weights"
            )
        if self.deals and self.num_identities < self.setup.ids_per_batch:
            raise UsageError(
                f"qaconv_sampler: graph deals {self.setup.ids_per_batch} identities a step, and the sources have "
                f"{self.num_identities}; set ids_per_batch to fewer, or set qaconv_sampler=identity"
            )

    @property
    def deals(self) -> bool:
        """Whether a step's identities are those of the graph."""
        return self.settings.qaconv_sampler == "graph"

    @property
    def layout(self) -> Layout:
        return Layout(dealt="method" if self.deals else "trainer")

    @property
    def label(self) -> str:
        loss = self.settings.qaconv_loss  # the releases are different methods, and a table has to say which
        parts = [f"{loss} loss"] * (loss != "memory") + ["graph sampling"] * self.deals
        return f"{self.title} ({', '.join(parts)})" if parts else self.title

    @property
    def cost(self) -> Cost:
        return Cost(self.passes, self.passes, "pairs")

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """main: the backbone; new: neck and matcher, which begin at random."""
        new = [*self.neck.parameters(), *self.matcher.parameters()]
        return {
            "main": ParameterGroup(list(self.backbone.parameters())),
            "new": ParameterGroup(new, self.settings.qaconv_new_layer_rate),
        }

    def train(self, mode: bool = True) -> QAConv:
        """As of any module; frozen BN layers stay in evaluation mode."""
        super().train(mode)
        if self.settings.qaconv_freeze_bn == "yes":
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    # --- Eqs. (Q1) and (Q2) ------------------------------------------------------------------------------------------

    def maps(self, images: Tensor) -> Tensor:
        """X: images (B, 3, H, W) -> (B, C, h, w). Raises UsageError for images of another size than in training."""
        maps: Tensor = self.neck(self.backbone(images))
        if tuple(maps.shape[2:]) != self.map_size:
            raise UsageError(
                f"image_height, image_width: the matcher has weights for maps of {self.map_size}, an image of "
                f"{tuple(images.shape[2:])} gives {tuple(maps.shape[2:])}; use {self.setup.image_size}"
            )
        return maps

    def encode(self, images: Tensor) -> Tensor:
        """Maps (B, C, h, w) of unit length at every position; compared by `scorer`, not by cosine."""
        return F.normalize(self.maps(images).float(), dim=1)

    def scorer(self) -> Scorer:
        """Eq. (Q13)."""
        shape = (self.settings.qaconv_neck, *self.map_size)
        return self.matcher.scorer(shape, self.settings.qaconv_pairs_per_block)

    # --- Eqs. (Q8) to (Q12) ------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        """One update, and then Eq. (Q8)."""
        labels = self.joint_labels(batch)
        losses, codes = self._losses(batch.images, labels)
        update(losses, groups=("main", "new"))
        if self.settings.qaconv_loss == "memory":
            self._remember(codes.detach(), labels, step)
        return losses

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """The losses of a batch; remembers nothing."""
        return self._losses(batch.images, self.joint_labels(batch))[0]

    def joint_labels(self, batch: Batch) -> Tensor:
        """y: (B,) identities among those of all sources."""
        return batch.labels + self.offsets[batch.domains.to(self.offsets.device)]

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Losses, Tensor]:
        """The losses, and the codes x (B, C, r) of the images."""
        maps = self.maps(images)
        with torch.autocast(images.device.type, enabled=False):
            maps = maps.float()
            codes = F.normalize(maps.flatten(2), dim=1)
            loss, watched = self._matching_loss(codes, labels)
            scale = scale_of(maps.mean((2, 3)), batch_statistics(maps.detach()))
        return {"loss/total": loss, f"loss/{self.settings.qaconv_loss}": loss, **watched, **scale}, codes

    def _matching_loss(self, codes: Tensor, labels: Tensor) -> tuple[Tensor, Losses]:
        settings = self.settings
        if settings.qaconv_loss == "memory":
            rows = self.seen.nonzero()[:, 0]
            if len(rows) == 0:
                return 0.0 * codes.sum(), {}
            same = labels[:, None] == rows
            logits = self.matcher(codes, self.memory, rows)
            return focal_losses(logits, same).sum(1).mean(), self._watched(logits, same)
        same = labels[:, None] == labels
        logits = self.matcher(codes, codes)
        watched = self._watched(logits, same)
        if settings.qaconv_loss == "pairwise":
            return pairwise_loss(logits, same), watched
        return hard_score_loss(logits, same, settings.qaconv_margin), watched

    @torch.no_grad()
    def _watched(self, logits: Tensor, same: Tensor) -> Losses:
        """Mean scores (0 where there is no such pair), |w|, and BN2's gain, which has to grow to reach the margin."""
        return {
            "match/positive": (logits * same).sum() / same.sum().clamp_min(1),
            "match/negative": (logits * ~same).sum() / (~same).sum().clamp_min(1),
            "match/weights": self.matcher.weight.norm(),
            "match/gain": self.matcher.norm_scores.weight[0],
        }

    @torch.no_grad()
    def _remember(self, codes: Tensor, labels: Tensor, step: int) -> None:
        """Eq. (Q8). An identity's K images lie side by side; one is written, or the order would not be fixed."""
        identities, counts = torch.unique_consecutive(labels, return_counts=True)
        rows = counts.cumsum(0) - counts + step % counts
        self.memory[identities] = codes[rows]
        self.seen[identities] = True

    # --- graph sampling ----------------------------------------------------------------------------------------------

    @property
    def graph_steps(self) -> int:
        """Steps between graphs."""
        return self.settings.qaconv_graph_steps or self.num_identities

    def looks_at_sources(self, step: int) -> bool:
        return self.deals and step % self.graph_steps == 0

    @torch.no_grad()
    def prepare(self, sources: Iterable[Batch]) -> None:
        """Draw the graph of an epoch: everybody's P - 1 nearest identities, by one clean image of each."""
        if not self.deals:
            return
        scorer, epoch = self.scorer(), int(self.graphs)
        self.eval()
        offsets, seed = self.offsets.cpu(), self.setup.seed
        codes = scorer.prepare(one_of_each(sources, offsets, self.num_identities, self.encode, seed, epoch))

        def scores(rows: slice, columns: slice) -> Tensor:
            return scorer.scores(codes[rows], codes[columns])

        with torch.autocast(codes.device.type, enabled=False):
            number, pairs = self.setup.ids_per_batch - 1, max(1, elements_on(codes.device) // self.matcher.positions**2)
            self.neighbours.copy_(nearest(scores, self.num_identities, number, pairs))
        self.graphs += 1
        self.train()

    def identities(self, step: int) -> list[tuple[int, NDArray[np.int64]]]:
        """The anchor whose turn it is, and its P - 1 nearest."""
        epoch = int(self.graphs) - 1
        if epoch < 0:
            raise RuntimeError("the graph is drawn by `prepare`, before the first step")
        chosen = anchor(step % self.graph_steps, self.num_identities, self.setup.seed, epoch)
        return by_domain(np.array([chosen, *self.neighbours[chosen].tolist()], dtype=np.int64), self.setup.num_ids)


def _neck(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers)


def _multiply_adds_of_stem(backbone: Backbone, image_size: tuple[int, int]) -> int:
    """Of the first convolution, for one image: the unit in which the neck is measured."""
    stem = backbone.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d), "the stem begins with a convolution"
    output: Tensor = copy.deepcopy(stem).to("meta")(torch.empty(1, 3, *image_size, device="meta"))
    return output[0, 0].numel() * stem.weight.numel()
