"""Settings: types, bounds, messages, identity."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lda import config as configs
from lda.config import FIELDS, PRESETS, Config, from_mapping, parse_overrides, preset
from lda.errors import UsageError
from lda.protocols import PROTOCOLS, get_protocol

# The settings a study file, a dashboard and a checkpoint speak of. Adding or renaming one is a decision: change this.
SETTINGS = """
activation_checkpointing alignment alignment_weight an_affine auto_augment_probability average_precision backbone
bank_momentum bank_warmup_updates baseline_norm checkpoint_every classifier consistency_weight cuhk03_boxes
cuhk03_protocol device distance donor epochs evaluate_every evaluation_batch flip_probability flip_test gamma gem_p
heads ids_per_batch image_height image_width images_per_id inference jitter_probability label_smoothing latent
learning_rate loader_workers log_every method milestones msmt17_train network_a norm_sites optimizer pad pretrained
protocol seed selection steps_per_epoch target test_split threads triplet_margin triplet_weight validation_fraction
wandb warmup_epochs warmup_factor weight_decay
"""


def test_the_list_of_settings_is_frozen() -> None:
    assert sorted(FIELDS) == sorted(SETTINGS.split())


def test_every_setting_says_what_it_is_and_where_it_comes_from() -> None:
    for name, spec in FIELDS.items():
        assert spec.metadata["help"], name
        assert spec.metadata["source"], name


def test_round_trip_through_json() -> None:
    config = preset("standin", bank_momentum=0.95, milestones=(3, 4))
    assert from_mapping(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("bank_momentun=0.9", "did you mean 'bank_momentum'"),
        ("bank_momentum", r"--set 'bank_momentum': expected KEY=VALUE"),
        ("bank_momentum=1.5", r"bank_momentum: 1.5 is out of range, expected 0.0 to 0.9999"),
        ("bank_momentum=nan", r"bank_momentum: nan is out of range"),
        ("bank_momentum=high", "bank_momentum: expected a number, got 'high'"),
        ("epochs=2.5", "epochs: expected a whole number, got '2.5'"),
        ("flip_test=maybe", "flip_test: expected a true or false, got 'maybe'"),
        ("milestones=3,x", "milestones: expected a list of whole numbers"),
        ("inference=fusd", "inference: unknown value 'fusd' .did you mean 'fused'"),
    ],
)
def test_bad_overrides_are_one_clear_line(pair: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_overrides([pair])
    assert "\n" not in str(caught.value)


def test_overrides_are_typed() -> None:
    pairs = ["bank_momentum=.95", "epochs=3", "flip_test=yes", "milestones=2,3", "latent=mixture", "milestones=(4 5)"]
    expected = {"bank_momentum": 0.95, "epochs": 3, "flip_test": True, "milestones": (4, 5), "latent": "mixture"}
    assert parse_overrides(pairs) == expected


def test_python_values_are_checked_too() -> None:
    for key, value in (("epochs", True), ("epochs", 2.0), ("learning_rate", "fast"), ("method", 3)):
        with pytest.raises(UsageError, match=f"^{key}: expected a"):
            Config(**{key: value})
    with pytest.raises(UsageError, match="rising epochs"):
        Config(milestones=(5, 5))
    with pytest.raises(UsageError, match="validation_fraction: source_validation needs"):
        Config(validation_fraction=0.0)
    assert Config(learning_rate=1).learning_rate == 1.0


def test_unit_hash_follows_what_can_change_a_result() -> None:
    config = preset("standin")
    assert config.unit_hash() == preset("standin").unit_hash()
    assert config.unit_hash() != config.unit_hash("other data")
    for name, spec in FIELDS.items():
        if isinstance(spec.default, float) and spec.metadata["identity"]:
            other = config.replace(**{name: config.to_dict()[name] * 0.5 + 0.01 if name != "gem_p" else 2.0})
            assert other.unit_hash() != config.unit_hash(), name
    for name in ("device", "threads", "wandb", "log_every", "evaluate_every", "evaluation_batch"):
        assert not FIELDS[name].metadata["identity"]
    assert config.replace(threads=1, wandb="disabled").unit_hash() == config.unit_hash()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    assert isinstance(preset(name), Config)


def test_unknown_preset_and_frozen() -> None:
    with pytest.raises(UsageError, match="did you mean 'standin'"):
        preset("stand-in")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3  # type: ignore[misc]


def test_protocols_are_the_posters() -> None:
    for name in ("protocol2", "protocol3"):
        protocol = get_protocol(name)
        assert protocol.targets == ("cuhk03", "msmt17", "market1501")
        for target in protocol.targets:
            assert target not in protocol.sources(target)
            assert "cuhk_sysu" in protocol.sources(target)
    assert get_protocol("protocol2").source_part == "train"
    assert get_protocol("protocol3").source_part == "all"
    first = get_protocol("protocol1")
    assert first.num_splits == 10
    assert set(first.targets) == {"prid", "grid", "viper", "ilids"}
    assert all(first.sources(t) == ("market1501", "cuhk02", "cuhk03", "cuhk_sysu") for t in first.targets)
    assert "dukemtmcreid" not in {s for p in PROTOCOLS.values() for t in p.targets for s in (*p.sources(t), t)}


def test_unknown_protocol_and_target() -> None:
    with pytest.raises(UsageError, match="did you mean 'protocol3'"):
        get_protocol("protokol3")
    with pytest.raises(UsageError, match=r"unknown target of Protocol-3 'market'.*did you mean 'market1501'"):
        get_protocol("protocol3").sources("market")
    assert configs.check_key("seed") is None
