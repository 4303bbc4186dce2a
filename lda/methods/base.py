"""What a method is to the rest of the house: the seam between the trainer, the evaluation and one file of equations.

The smallest method is a class with `title`, `reference`, `Settings`, `training_losses` and `encode`; everything else
has a default. A file in `lda/methods/` holds one such class; the name of the file is the method's.

Who does what. The trainer owns the data, the optimiser, its rate, the backward pass, the check that losses are finite,
checkpoints and the count of updates. The method owns what happens within a step: `train_step` may do anything, and
calls `update` for every change of weights. What a method remembers is a buffer or extra state of the module, and
whatever is random in it is a function of (seed, step): so a run that goes on from a checkpoint equals one that never
stopped.

Shapes: B images of a batch, K source domains, D feature size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lda.batch import Batch, Layout
from lda.errors import UsageError
from lda.groups import Setup
from lda.kept import Kept
from lda.ranking import CosineScorer, Scorer
from lda.settings import Settings

Losses = dict[str, Tensor]
"""Named scalars of a step. `loss/total` is minimised; the other `loss/` terms are unweighted; the rest is watched."""


class Update(Protocol):
    """One change of weights, made by the trainer."""

    def __call__(
        self, losses: Losses, groups: tuple[str, ...] = ("main",), rule: Literal["optimiser", "plain_sgd"] = "optimiser"
    ) -> None:
        """Minimise `losses["loss/total"]` by one step on the named parameter groups, and on nothing else.

        Parameters of other groups get no gradient, so they keep weights and moments to the bit. `plain_sgd` steps by
        the rate times (gradient + weight decay), without momentum and without touching the optimiser's state.
        Raises TrainingError naming the term that is not finite.
        """


class ParameterGroup(NamedTuple):
    """Parameters that are updated together: their rate over the schedule's, and whether they are decayed."""

    parameters: list[nn.Parameter]
    rate: float = 1.0
    decay: bool = True


@dataclass(frozen=True)
class Cost:
    """What an image costs, in passes through the plain network, by the multiply-adds of its convolutions.

    A training pass is one forward and two backward: to the activations and to the weights. So a forward pass alone is a
    third of it, and one that is differentiated with respect to activations only two thirds.

    Attributes:
        train_passes: training passes per image of `Batch.images` and step, on average over the steps.
        test_forwards: forward passes per test image.
        test: how two images are compared: "vector" by cosine, or "pairs" by a matcher on both encodings.
    """

    train_passes: float = 1.0
    test_forwards: float = 1.0
    test: Literal["vector", "pairs"] = "vector"


Side = Literal["query", "gallery"]


class TargetImages(NamedTuple):
    """Unlabelled images of the target, as `adapt` sees them: normalised images (B, 3, H, W), their camera ids (B,),
    and the side they are on."""

    images: Tensor
    camids: Tensor
    side: Side


class Method(nn.Module):
    """A method of domain-generalizable re-identification: a module that maps images to encodings, and a training step.

    Args:
        settings: of the method's own `Settings`.
        setup: sources, network, schedule and seed.

    Raises UsageError for sources that it cannot train on.
    """

    title: ClassVar[str]
    """Name in print."""

    reference: ClassVar[str]
    """Paper: authors, title, venue, year."""

    reconstructed: ClassVar[str] = ""
    """What is our reading because nothing was published; printed wherever the method's name is."""

    searched: ClassVar[tuple[str, ...]] = ()
    """The settings that a study sweeps unless its file names others; their ranges stand on their lines."""

    min_domains: ClassVar[int] = 1
    """The fewest sources it can train on."""

    Settings: ClassVar[type[Settings]] = Settings
    """The method's own settings."""

    def __init__(self, settings: Any, setup: Setup) -> None:
        super().__init__()
        self.settings = settings
        self.setup = setup
        if self.num_domains < self.min_domains:
            raise UsageError(
                f"method: {self.title} trains on {self.min_domains} or more source domains, this protocol has "
                f"{self.num_domains}; set method to another, or choose another protocol"
            )

    @property
    def num_domains(self) -> int:
        """K."""
        return len(self.setup.num_ids)

    @property
    def layout(self) -> Layout:
        """Which images a step shows."""
        return Layout()

    @property
    def label(self) -> str:
        """Name in print with these settings."""
        return self.title

    @property
    def inference(self) -> str:
        """The method's own test settings, as tables print them; "" where it has none."""
        return ""

    @property
    def cost(self) -> Cost:
        """What an image costs with these settings; counted by a test."""
        return Cost()

    # --- training ----------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """Name -> what is trained. A parameter that is in no group is frozen."""
        return {"main": ParameterGroup([p for p in self.parameters() if p.requires_grad])}

    def looks_at_sources(self, step: int) -> bool:
        """Whether `prepare` is called before this step; a run that goes on from a checkpoint asks from there on."""
        return step == 0

    def prepare(self, sources: Iterable[Batch]) -> None:
        """Look at every source image once, not augmented, in a fixed order. Called in training mode, which it leaves
        on; a gradient is for it to turn off."""

    def identities(self, step: int) -> list[tuple[int, NDArray[np.int64]]]:
        """The P identities of a step, (domain, labels within it) for every domain: for a layout that the method
        deals. A function of the method's state, and asked after `prepare`, before the step's batch is made."""
        raise NotImplementedError(f"{type(self).__name__} says that it deals identities, and has no identities")

    def train_step(self, batch: Batch, step: int, update: Update) -> Losses:
        """One step: scalars to log. `update` is called at least once; the default minimises `training_losses`."""
        losses = self.training_losses(batch, step)
        update(losses)
        return losses

    def training_losses(self, batch: Batch, step: int) -> Losses:
        """The losses of a batch, for a method whose step is one update."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither train_step nor training_losses")

    # --- test --------------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> what the scorer compares, (B, D) features by default; each on its own."""
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def forward(self, images: Tensor) -> Tensor:
        """`encode`."""
        return self.encode(images)

    def scorer(self) -> Scorer:
        """How the encodings of two images compare: by cosine."""
        return CosineScorer()

    @property
    def looks_at_target(self) -> bool:
        """Whether `adapt` is used: it is flagged with every result."""
        return False

    def adapt(self, target: Iterable[TargetImages]) -> None:
        """Change the network by unlabelled images of the target; only called where `looks_at_target` says so.

        Called for every camera of every side, in evaluation mode, on a copy of the trained method, which encodes the
        images of this camera and side afterwards. `target`: these images, in batches and a fixed random order; take as
        many as you want.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it looks at the target, and has no adapt")

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Path through the network, in a letter or two -> (B, h, w): where it answers in test images, the sum of the
        squares over the channels of its last map. By default that of `backbone`, where the method has one; {}: none."""
        backbone = getattr(self, "backbone", None)
        return {} if backbone is None else {"": backbone(images).square().sum(1)}

    # --- what is left ------------------------------------------------------------------------------------------------

    def course(self, domains: list[str]) -> dict[str, float]:
        """Name -> number to log at the end of an epoch, of what the method remembers; `domains`: the K sources."""
        return {}

    def kept(self, domains: list[str]) -> dict[str, Kept]:
        """Name -> what the run folder keeps of a trained method; `domains`: names of the K sources."""
        return {}
