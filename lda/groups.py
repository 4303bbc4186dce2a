"""The settings that every method shares, in groups: each is handed whole to the part that owns it. No torch.

The images have theirs in `lda/data/options.py`, a method in its own file; `lda/config.py` joins them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lda.errors import UsageError
from lda.settings import Range, Settings, setting, settings_of

Rule = Literal["source_validation", "leave_one_source_out", "proxy_domain", "oracle"]
LEFT_OUT: Rule = "leave_one_source_out"
_NO_DOMAIN = "none"


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """What is learnt and tested."""

    protocol: str = setting("protocol3", "evaluation protocol, see lda/protocols.py", "poster")
    target: str = setting("market1501", "the unseen target domain", "poster")
    seed: int = setting(0, "seed of weights, batches and augmentation", low=0, high=2**31 - 1)
    held_out: str = setting(
        _NO_DOMAIN,
        "a source that does not train and is tested in the target's place (leave_one_source_out)",
        later=True,
    )

    @property
    def without(self) -> str:
        """The source that is held out, "" for none."""
        return "" if self.held_out == _NO_DOMAIN else self.held_out


NO_FILES = ("imagenet", "none")
"""Values of `pretrained` that are no files."""


@dataclass(frozen=True, kw_only=True)
class Network(Settings):
    """The feature extractor."""

    backbone: Literal["resnet50", "resnet18", "mobilenet_v2", "small"] = setting(
        "resnet50", "feature extractor", "ReNorm, META", standin="small"
    )
    pretrained: str = setting(
        "imagenet", "imagenet (torchvision's weights), none, or a weights file", "ReNorm, META", standin="none"
    )
    gem_p: float = setting(
        3.0, "exponent of generalised-mean pooling, fixed", "ReNorm", low=1.0, high=100.0, search=Range(1.0, 8.0)
    )


@dataclass(frozen=True, kw_only=True)
class Schedule(Settings):
    """The optimiser and its rate over the steps of a run."""

    optimizer: Literal["adam", "sgd"] = setting("adam", "adam, or sgd (Nesterov 0.9)", "ReNorm")
    learning_rate: float = setting(
        3.5e-4, "peak", "ReNorm, fast-reid", low=1e-8, high=10.0, standin=2e-3, search=Range(1e-4, 1e-2, log=True)
    )
    weight_decay: float = setting(
        5e-4, "on every parameter", "ReNorm", low=0.0, high=1.0, search=Range(1e-5, 1e-2, log=True)
    )
    epochs: int = setting(120, "passes of steps_per_epoch", "ReNorm", low=1, high=10**5, standin=8)
    steps_per_epoch: int = setting(
        2000, "2000; ReNorm takes 1000 for target MSMT17", "ReNorm", low=1, high=10**6, standin=20
    )
    warmup_epochs: int = setting(
        10, "linear warm-up of the rate; latent weights ramp with it", "ReNorm", low=0, high=1000, standin=1
    )
    warmup_factor: float = setting(
        0.01, "rate at step 0 over the peak", "ReNorm", low=0.0, high=1.0, search=Range(0.001, 1.0, log=True)
    )
    milestones: tuple[int, ...] = setting(
        (30, 60, 100), "epochs at which the rate is multiplied by gamma", "ReNorm", standin=(6,)
    )
    gamma: float = setting(0.1, "factor at a milestone", "ReNorm", low=0.0, high=1.0, search=Range(0.05, 0.5, log=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not rising or any(milestone < 1 for milestone in self.milestones):
            raise UsageError(f"milestones: expected rising epochs >= 1, got {list(self.milestones)}")

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return self.warmup_epochs * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """The rate of a step: linear warm-up from warmup_factor, then times gamma at every milestone (in epochs)."""
        factor = 1.0
        if step < self.warmup_steps:
            factor = self.warmup_factor + (1.0 - self.warmup_factor) * step / self.warmup_steps
        passed = sum(step >= milestone * self.steps_per_epoch for milestone in self.milestones)
        return self.learning_rate * factor * self.gamma**passed


@dataclass(frozen=True, kw_only=True)
class Selection(Settings):
    """What ranks runs. Held-out identities do not train, so `validation_fraction` is part of a training's identity."""

    selection: Rule = setting("source_validation", "score that ranks runs; oracle looks at the target")
    proxy_domain: str = setting(
        _NO_DOMAIN, "a data set, no source and no target, that is tested too; its mAP is the rule's score", later=True
    )
    validation_fraction: float = setting(
        0.1, "share of each source's identities held out of training for source_validation", low=0.0, high=0.5
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection == "source_validation" and self.validation_fraction == 0:
            raise UsageError("validation_fraction: source_validation needs held-out identities, got 0.0; try 0.1")
        if self.selection == "proxy_domain" and not self.proxy:
            raise UsageError(
                "proxy_domain: the rule of this name needs a data set that is no source and no target, got none; "
                "try viper"
            )

    @property
    def proxy(self) -> str:
        """The proxy domain, "" for none."""
        return "" if self.proxy_domain == _NO_DOMAIN else self.proxy_domain


@dataclass(frozen=True, kw_only=True)
class Test(Settings):
    """How a trained network is tested, whatever its method; a method's own test settings lie in its file."""

    flip_test: bool = setting(False, "add the features of image and mirror image", "field; ReNorm on", test=True)
    test_split: int = setting(
        -1, "one split of a Protocol-1 target, from 0; -1 = all, averaged", low=-1, high=1000, test=True
    )
    average_precision: Literal["step", "trapezoid"] = setting("step", "AP formula", "field", test=True)
    reranking: Literal["none", "k_reciprocal"] = setting(
        "none", "rank again by k-reciprocal neighbours (Zhong et al., CVPR 2017)", "field", test=True, later=True
    )
    reranking_k1: int = setting(
        20, "k1: neighbours that describe an image", "Zhong et al.", low=1, high=100, test=True, later=True
    )
    reranking_k2: int = setting(
        6, "k2: images, itself among them, whose descriptions are averaged", "Zhong et al.", low=1, high=100, test=True,
        later=True,
    )  # fmt: skip
    reranking_lambda: float = setting(
        0.3, "lambda: share of the plain distance", "Zhong et al.", low=0.0, high=1.0, test=True, later=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in settings_of(Test).items():
            if name.startswith("reranking_") and self.reranking == "none" and getattr(self, name) != known.default:
                raise UsageError(
                    f"{name}: {getattr(self, name)} needs re-ranking, but reranking is none; leave {name} at "
                    f"{known.default}, or set reranking=k_reciprocal"
                )

    @property
    def reranked(self) -> str:
        """The re-ranking in print, "none" where there is none."""
        if self.reranking == "none":
            return self.reranking
        return f"k-reciprocal re-ranking ({self.reranking_k1}, {self.reranking_k2}, {self.reranking_lambda:g})"


@dataclass(frozen=True, kw_only=True)
class Machine(Settings):
    """Where and how it runs and how often it looks: cannot change what is learnt, beyond rounding. In no hash."""

    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    threads: int = setting(0, "CPU threads, 0 = all cores", low=0, high=1024)
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass (less memory, same result)"
    )
    loader_workers: int = setting(0, "processes that prepare batches, 0 = none", low=0, high=256)
    evaluation_batch: int = setting(256, "images per forward pass in evaluation", low=1, high=65536)
    evaluate_every: int = setting(
        10, "epochs between source validations (0: only at the end); never looks at the target", low=0, high=10**5,
        standin=4,
    )  # fmt: skip
    checkpoint_every: int = setting(1, "epochs between checkpoints", low=1, high=10**5)
    log_every: int = setting(50, "steps between lines of metrics.jsonl", low=1, high=10**6, standin=5)
    wandb: Literal["auto", "online", "offline", "disabled"] = setting(
        "auto", "auto = online if logged in, else offline"
    )


@dataclass(frozen=True)
class Chosen:
    """A method by name, with its own settings."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Setup:
    """What a method is built from, beside its own settings.

    Attributes:
        num_ids: identities of each source domain; their number is K.
        seed: of everything random in the method; draws of a step are a function of (seed, step).
        recompute: the network recomputes its activations in the backward pass.
        image_size: (height, width) in pixels.
        ids_per_batch: P, identities of a step.
        fresh: False where a trained state is loaded afterwards: what the network begins with does not matter.
    """

    num_ids: tuple[int, ...]
    network: Network
    schedule: Schedule
    seed: int
    recompute: bool = False
    image_size: tuple[int, int] = (256, 128)
    ids_per_batch: int = 16
    fresh: bool = True
