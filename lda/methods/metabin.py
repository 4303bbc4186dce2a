"""MetaBIN: Meta Batch-Instance Normalization for Generalizable Person Re-Identification (Choi, Kim, Jeong, Park, Kim),
CVPR 2021.

Every batch normalisation of the backbone is mixed with an instance normalisation, channel by channel, by gates rho in
[0, 1]. The network learns by the usual losses with the gates fixed; the gates alone are learnt by episodes: a virtual
step that normalises too much or too little on some sources, judged by a triplet loss on the others. Images (B, 3, H,
W), f = GeM(F) (B, D), n the BNNeck (without shift), h one classifier over the identities of all sources.

    (B1), (B3) to (B8): layer, losses and step of the gates, in `lda/parts/batch_instance_norm.py`
    (B2) L_base = CE(h(n(f)), y) + w Tri(f, y)       theta <- optimiser(theta), rho stays
    (B9) test: f_test = n(f) / |n(f)|: BN by its running statistics, IN by the image's own

Who updates what: the main optimiser and its schedule all weights theta, on a mixed batch (B2); plain steps of the
absolute rate eta the gates, on a second batch (`metabin_batch=second`, the release) or on the same images again. The
second batch doubles the images that a run sees: compare with the plain baseline at twice its steps. The first
`metabin_warmup` steps have no gate step. `metabin_meta=off` is the control: gates learn with theta by (B2), clamped
after every step; then there is one batch, and the other settings of the gates have no use.

Adds to the plain network 3 numbers a channel of every layer (ResNet-50: 79,680), of which IN's gain and shift have no
weight decay: while rho = 1 they have no gradient, and Adam's decay alone would shrink them to 0.41 in 2,000 steps. A
gate step is a forward pass of its images, and a backward pass to the activations only: 1.67 times a plain step in all.

Confidence 95 %, from the release (bismex/MetaBIN aa81471). Departures: all losses are those of all methods here
(optimiser, GeM, classifier, smoothing by eps / N); base batches are balanced over sources, the release's over
identities; theta is learnt by Adam, the release's by SGD 0.01. The number of meta-train sources, half of all, rounded
up, is read from three recipes. The author says of the release that its results lie below the paper's (issue 8).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lda.batch import Batch, Layout
from lda.groups import Setup
from lda.methods.base import Cost, Losses, ParameterGroup, Update
from lda.methods.plain import PlainMethod
from lda.parts.batch_instance_norm import (
    GateSettings,
    check_gates,
    clamp_gates,
    gate_step,
    mean_gate,
    undecayed,
    use_batch_instance_norm,
)


class MetaBIN(PlainMethod):
    """The plain step for the weights, and a step of episodes for the gates."""

    title = "MetaBIN"
    reference = (
        "Choi, Kim, Jeong, Park, Kim: Meta Batch-Instance Normalization for Generalizable Person Re-Identification, "
        "CVPR 2021"
    )
    searched = ("metabin_gate_rate", "metabin_inner_high", "metabin_losses")
    min_domains = 2
    Settings = GateSettings
    settings: GateSettings

    def __init__(self, settings: GateSettings, setup: Setup) -> None:
        super().__init__(settings, setup)
        check_gates(settings, setup, self.title)
        self.learns_gates = settings.metabin_meta == "on"
        use_batch_instance_norm(self.backbone, trained_gates=not self.learns_gates)

    @property
    def label(self) -> str:
        return self.title if self.learns_gates else "BIN"

    @property
    def layout(self) -> Layout:
        return Layout(batches=2 if self.learns_gates and self.settings.metabin_batch == "second" else 1)

    @property
    def cost(self) -> Cost:
        return Cost(train_passes=5 / 3 if self.learns_gates else 1)

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """ "undecayed": gain and shift of IN, and the gates where the optimiser learns them. "main": the rest."""
        apart = undecayed(self.backbone)
        rest = {id(parameter) for parameter in apart}
        main = [p for p in self.parameters() if p.requires_grad and id(p) not in rest]
        return {"main": ParameterGroup(main), "undecayed": ParameterGroup(apart, decay=False)}

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        """Eq. (B2) on the batch, then Eqs. (B5) to (B7) on the second batch or the same."""
        losses = self.training_losses(batch, step)
        update(losses, groups=("main", "undecayed"))
        if not self.learns_gates:
            clamp_gates(self.backbone)
            return {**losses, "gate/mean": mean_gate(self.backbone)}
        if step < self.settings.metabin_warmup:
            return losses
        shown = batch if batch.extra is None else batch.extra
        return losses | gate_step(self.backbone, shown, self.settings, self.setup, step).losses

    def encode(self, images: Tensor) -> Tensor:
        """(B9): features (B, D) behind the BNNeck, L2-normalised."""
        return F.normalize(self.head.necks[0](self.pooled(self.backbone(images))))
