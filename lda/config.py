"""Everything one run can be told: one frozen dataclass, one line per setting.

A setting's line holds its default (the ResNet-50 recipe for real data), its bounds or choices, and where the value
comes from. Marks: `poster` = printed on the LDA poster; `ReNorm` = the released settings of the authors' follow-up
(ECCV 2024); `field` = what most re-identification code uses; `assumed` = our reading, nothing published.
`PRESETS` changes what the small stand-in runs need; `Config.unit_hash` names a run by its content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lda.errors import UsageError, unknown


def setting(
    default: Any,
    help: str,
    source: str = "assumed",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    identity: bool = True,
) -> Any:
    """A config field with what is needed to check and explain it.

    `low` and `high` are inclusive bounds. `identity=False` marks settings that cannot change a result (where it runs,
    what it prints): they stay out of the unit hash.
    """
    meta = {"help": help, "source": source, "low": low, "high": high, "choices": choices, "identity": identity}
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run. Raises UsageError naming the key when a value has a wrong type or is out of range."""

    # --- what is learnt and tested -----------------------------------------------------------------------------------
    protocol: str = setting("protocol3", "evaluation protocol, see lda/protocols.py", "poster")
    target: str = setting("market1501", "the unseen target domain", "poster")
    seed: int = setting(0, "seed of weights, batches and augmentation", low=0, high=2**31 - 1)

    # --- method ------------------------------------------------------------------------------------------------------
    method: str = setting("lda", "lda, or baseline: plain joint normalisation", "poster", choices=("lda", "baseline"))
    baseline_norm: str = setting("batch", "normalisation of the baseline", choices=("batch", "instance"))
    bank_momentum: float = setting(
        0.9, "m of Eq. (3): bank <- m * bank + (1 - m) * batch", "ReNorm, META", low=0.0, high=0.9999
    )
    consistency_weight: float = setting(0.1, "lambda_c of Eq. (11), weight of L_consis", low=0.0, high=100.0)
    alignment_weight: float = setting(0.1, "lambda_a of Eq. (11), weight of L_align", low=0.0, high=100.0)
    bank_warmup_updates: int = setting(
        50, "bank updates every domain must have before Network-A starts (0: at once)", low=0, high=10**6
    )
    network_a: str = setting(
        "an", "second path: an = Anti-Normalization, in = instance norm without the bank, none", "poster",
        choices=("an", "in", "none"),
    )  # fmt: skip
    an_affine: str = setting(
        "none", "after AN: none, or the shared gamma and beta of Network-E", "poster", choices=("none", "shared")
    )
    donor: str = setting(
        "uniform", "choice of the donor j != k of Eq. (4), one per step", "poster (another domain)",
        choices=("uniform", "round_robin"),
    )  # fmt: skip
    norm_sites: str = setting(
        "all", "layers that hold a Buffer Bank; no_stem leaves the first one plain", "poster (every layer)",
        choices=("all", "no_stem"),
    )  # fmt: skip
    latent: str = setting("mean", "latent distribution of Eq. (7)", choices=("mean", "barycentre", "mixture"))
    distance: str = setting(
        "w2", "D of Eq. (8)", "META's 2-Wasserstein helper", choices=("w2", "w2_squared", "symmetric_kl")
    )
    alignment: str = setting(
        "image", "L_align of Eq. (10) per image, or on the batch average", choices=("image", "batch")
    )
    heads: str = setting("separate", "BNNeck and classifier of the two paths", "ReNorm", choices=("separate", "shared"))
    classifier: str = setting(
        "per_domain", "one BNNeck and classifier per source, or one over all sources", "ReNorm, ACL",
        choices=("per_domain", "joint"),
    )  # fmt: skip

    # --- identity losses ---------------------------------------------------------------------------------------------
    label_smoothing: float = setting(0.1, "of the cross-entropy", "ReNorm, META", low=0.0, high=0.99)
    triplet_margin: float = setting(0.3, "batch-hard margin of both paths", "META; ReNorm 0.5 / 1.0", low=0.0, high=10)
    triplet_weight: float = setting(1.0, "weight of the triplet loss", "ReNorm, META", low=0.0, high=100.0)

    # --- network -----------------------------------------------------------------------------------------------------
    backbone: str = setting("resnet50", "feature extractor", "ReNorm, META", choices=("resnet50", "resnet18", "small"))
    pretrained: str = setting("imagenet", "imagenet (torchvision's weights), none, or a weights file", "ReNorm, META")
    gem_p: float = setting(3.0, "exponent of generalised-mean pooling, fixed", "ReNorm", low=1.0, high=100.0)
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass (less memory, same result)", identity=False
    )

    # --- images and batches ------------------------------------------------------------------------------------------
    image_height: int = setting(256, "pixels", "field", low=16, high=1024)
    image_width: int = setting(128, "pixels", "field", low=8, high=1024)
    ids_per_batch: int = setting(16, "P: identities in a batch", "ReNorm, META", low=2, high=1024)
    images_per_id: int = setting(4, "K: images of an identity in a batch", "ReNorm, META", low=2, high=64)
    flip_probability: float = setting(0.5, "horizontal flip", "field", low=0.0, high=1.0)
    pad: int = setting(10, "pixels of padding before the random crop", "field", low=0, high=128)
    jitter_probability: float = setting(
        0.5, "colour jitter: brightness 0.15, contrast 0.1", "ReNorm, META", low=0.0, high=1.0
    )
    auto_augment_probability: float = setting(0.1, "ImageNet AutoAugment", "ReNorm, META", low=0.0, high=1.0)

    # --- schedule ----------------------------------------------------------------------------------------------------
    optimizer: str = setting("adam", "adam, or sgd (Nesterov 0.9)", "ReNorm", choices=("adam", "sgd"))
    learning_rate: float = setting(3.5e-4, "peak", "ReNorm, fast-reid", low=1e-8, high=10.0)
    weight_decay: float = setting(5e-4, "on every parameter", "ReNorm", low=0.0, high=1.0)
    epochs: int = setting(120, "passes of steps_per_epoch", "ReNorm", low=1, high=10**5)
    steps_per_epoch: int = setting(2000, "2000; ReNorm takes 1000 for target MSMT17", "ReNorm", low=1, high=10**6)
    warmup_epochs: int = setting(
        10, "linear warm-up of the rate; latent weights ramp with it", "ReNorm", low=0, high=1000
    )
    warmup_factor: float = setting(0.01, "rate at step 0 over the peak", "ReNorm", low=0.0, high=1.0)
    milestones: tuple[int, ...] = setting((30, 60, 100), "epochs at which the rate is multiplied by gamma", "ReNorm")
    gamma: float = setting(0.1, "factor at a milestone", "ReNorm", low=0.0, high=1.0)

    # --- selection and test ------------------------------------------------------------------------------------------
    selection: str = setting(
        "source_validation",
        "score that ranks runs; oracle looks at the target",
        choices=("source_validation", "oracle"),
    )
    validation_fraction: float = setting(
        0.1, "share of each source's identities held out of training for source_validation", low=0.0, high=0.5
    )
    inference: str = setting(
        "fused", "fused = expert + aligned; aligned = mean of Network-A over donors; expert = Network-E, mean bank",
        "ReNorm", choices=("fused", "aligned", "expert"),
    )  # fmt: skip
    flip_test: bool = setting(False, "average the features of image and mirror image", "field; ReNorm on")
    test_split: int = setting(-1, "one split of a Protocol-1 target, from 0; -1 = all, averaged", low=-1, high=1000)
    average_precision: str = setting("step", "AP formula", "field", choices=("step", "trapezoid"))

    # --- data sets ---------------------------------------------------------------------------------------------------
    cuhk03_boxes: str = setting(
        "labeled", "CUHK03 crops; papers differ, so it is printed with every result", "META, ACL, ReNorm",
        choices=("labeled", "detected"),
    )  # fmt: skip
    cuhk03_protocol: str = setting(
        "new", "of CUHK03 as the target; classic: 20 splits, CMC on one gallery image per person", "field",
        choices=("new", "classic"),
    )  # fmt: skip
    msmt17_train: str = setting(
        "train", "MSMT17 training list; train+val joins both", "META, ACL", choices=("train", "train+val")
    )

    # --- where and how it runs: cannot change what is learnt (beyond rounding) ---------------------------------------
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", identity=False)
    threads: int = setting(0, "CPU threads, 0 = all cores", low=0, high=1024, identity=False)
    loader_workers: int = setting(0, "processes that prepare batches, 0 = none", low=0, high=256, identity=False)
    evaluation_batch: int = setting(256, "images per forward pass in evaluation", low=1, high=65536, identity=False)
    evaluate_every: int = setting(
        10, "epochs between source validations (0: only at the end); never looks at the target", low=0, high=10**5,
        identity=False,
    )  # fmt: skip
    checkpoint_every: int = setting(1, "epochs between checkpoints", low=1, high=10**5, identity=False)
    log_every: int = setting(50, "steps between lines of metrics.jsonl", low=1, high=10**6, identity=False)
    wandb: str = setting(
        "auto", "auto = online if logged in, else offline", choices=("auto", "online", "offline", "disabled"),
        identity=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        if any(b <= a for a, b in zip(self.milestones, self.milestones[1:], strict=False)) or any(
            m < 1 for m in self.milestones
        ):
            raise UsageError(f"milestones: expected rising epochs >= 1, got {list(self.milestones)}")
        if self.selection == "source_validation" and self.validation_fraction == 0:
            raise UsageError("validation_fraction: source_validation needs held-out identities, got 0.0; try 0.1")

    @property
    def total_steps(self) -> int:
        """Gradient steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, one entry per setting."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    def replace(self, **changes: Any) -> Config:
        """A copy with some settings changed. Raises UsageError for a key that does not exist."""
        return from_mapping({**self.to_dict(), **changes})

    def unit_hash(self, data_hash: str = "") -> str:
        """12 hex digits that name a unit: every setting that can change its result, and the data it ran on."""
        identity = {f.name: self.to_dict()[f.name] for f in dataclasses.fields(self) if f.metadata["identity"]}
        text = json.dumps([identity, data_hash], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config)}

PRESETS: dict[str, dict[str, Any]] = {
    # The ResNet-50 recipe for real data: the defaults above.
    "real": {},
    # A small network and budget for the stand-in, about 40 s a unit on one CPU core. Augmentation as above.
    "standin": {
        "backbone": "small",
        "pretrained": "none",
        "image_height": 64,
        "image_width": 32,
        "ids_per_batch": 8,
        "images_per_id": 4,
        "pad": 3,
        "auto_augment_probability": 0.0,
        "learning_rate": 2e-3,
        "epochs": 8,
        "steps_per_epoch": 20,
        "warmup_epochs": 1,
        "milestones": (6,),
        "bank_warmup_updates": 5,
        "evaluate_every": 4,
        "log_every": 5,
    },
}
"""Named starting points: changes to the defaults above."""


def preset(name: str, **changes: Any) -> Config:
    """The configuration of a preset, with changes. Raises UsageError for an unknown preset or key."""
    if name not in PRESETS:
        raise UsageError(unknown("preset", name, PRESETS))
    return from_mapping({**PRESETS[name], **changes})


def from_mapping(values: Mapping[str, Any]) -> Config:
    """A Config from plain values (a JSON file, a study file). Raises UsageError for an unknown key or a bad value."""
    for key in values:
        check_key(key)
    return Config(**values)


def check_key(key: str) -> None:
    """Raises UsageError with the nearest valid key when `key` is not a setting."""
    if key not in FIELDS:
        raise UsageError(unknown("setting", key, FIELDS))


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["bank_momentum=0.95", ...]` from the command line -> typed values. Raises UsageError naming the pair."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair!r}: expected KEY=VALUE, for example bank_momentum=0.95")
        check_key(key)
        values[key] = _checked(FIELDS[key], text)
    return values


def _checked(spec: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the type of the field's default, within its bounds. Text (from a command line) is converted."""
    value = _converted(spec, value)
    low, high, choices = spec.metadata["low"], spec.metadata["high"], spec.metadata["choices"]
    if choices and value not in choices:
        raise UsageError(f"{spec.name}: {unknown('value', value, choices)}")
    too_low, too_high = low is not None and not value >= low, high is not None and not value <= high
    if too_low or too_high:  # "not >=" also catches nan
        raise UsageError(f"{spec.name}: {value!r} is out of range, expected {low} to {high}")
    return value


def _converted(spec: dataclasses.Field[Any], value: Any) -> Any:
    kind: type[Any] = type(spec.default)
    try:
        if kind is bool:
            return _boolean(value)
        if kind is tuple:
            parts = value.strip("()[] ").replace(",", " ").split() if isinstance(value, str) else value
            return tuple(int(part) for part in parts)
        if kind is int and isinstance(value, (bool, float)):
            raise ValueError
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError
        if kind is str and not isinstance(value, str):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        name = {
            tuple: "list of whole numbers",
            int: "whole number",
            float: "number",
            bool: "true or false",
            str: "text",
        }
        raise UsageError(f"{spec.name}: expected a {name[kind]}, got {value!r}") from None


def _boolean(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(value)
