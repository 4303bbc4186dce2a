"""Settings of a run: flat keys over groups, whose key it is, the two hashes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lda import methods
from lda.config import (
    COMMON,
    GROUPS,
    PRESETS,
    Config,
    check_keys,
    from_mapping,
    known_settings,
    parse_overrides,
    preset,
)
from lda.errors import UsageError
from lda.groups import Machine
from lda.protocols import PROTOCOLS, get_protocol
from lda.settings import settings_of

SOURCES = {"msmt17": "a", "cuhk_sysu": "b", "cuhk03": "c"}

# Names and default values that study files, dashboards, checkpoints and results speak of. A change is a decision.
DEFAULTS = {
    "protocol": "protocol3", "target": "market1501", "seed": 0,
    "cuhk03_boxes": "labeled", "cuhk03_protocol": "new", "msmt17_train": "train",
    "backbone": "resnet50", "pretrained": "imagenet", "gem_p": 3.0,
    "image_height": 256, "image_width": 128, "ids_per_batch": 16, "images_per_id": 4, "flip_probability": 0.5,
    "pad": 10, "jitter_probability": 0.5, "auto_augment_probability": 0.1,
    "optimizer": "adam", "learning_rate": 3.5e-4, "weight_decay": 5e-4, "epochs": 120, "steps_per_epoch": 2000,
    "warmup_epochs": 10, "warmup_factor": 0.01, "milestones": (30, 60, 100), "gamma": 0.1,
    "selection": "source_validation", "validation_fraction": 0.1,
    "flip_test": False, "test_split": -1, "average_precision": "step",
    "reranking": "none", "reranking_k1": 20, "reranking_k2": 6, "reranking_lambda": 0.3,
    "device": "auto", "threads": 0, "activation_checkpointing": False, "loader_workers": 0, "evaluation_batch": 256,
    "evaluate_every": 10, "checkpoint_every": 1, "log_every": 50, "wandb": "auto",
    "held_out": "none", "proxy_domain": "none",
}  # fmt: skip
LDA_DEFAULTS = {
    "label_smoothing": 0.1, "triplet_margin": 0.3, "triplet_weight": 1.0,
    "bank_momentum": 0.9, "consistency_weight": 0.1, "alignment_weight": 0.1, "bank_warmup_updates": 50,
    "network_a": "an", "an_affine": "none", "donor": "uniform", "norm_sites": "all", "latent": "mean",
    "distance": "w2", "alignment": "image", "heads": "separate", "classifier": "per_domain", "inference": "fused",
    "camera_statistics": "off", "camera_images": 200,
    "bank_start": "first_batch", "latent_gradient": "stopped", "latent_maps": "last", "margin_ratio": 1.0,
    "test_donors": "all", "unseen_expert": "mean",
}  # fmt: skip
STANDIN = {
    "backbone": "small", "pretrained": "none", "image_height": 64, "image_width": 32, "ids_per_batch": 8,
    "images_per_id": 4, "pad": 3, "auto_augment_probability": 0.0, "learning_rate": 2e-3, "epochs": 8,
    "steps_per_epoch": 20, "warmup_epochs": 1, "milestones": [6], "evaluate_every": 4, "log_every": 5,
}  # fmt: skip


def test_names_and_default_values_are_pinned() -> None:
    assert {name: known.default for name, known in COMMON.items()} == DEFAULTS
    assert {name: s.default for name, s in settings_of(methods.find("lda").Settings).items()} == LDA_DEFAULTS
    changed = {key: value for key, value in preset("standin").to_dict().items() if value != preset("real").value(key)}
    changed.pop("milestones")
    assert changed == {**{k: v for k, v in STANDIN.items() if k not in ("images_per_id", "milestones")},
                       "bank_warmup_updates": 5}  # fmt: skip
    assert preset("standin").schedule.milestones == (6,)


def test_no_two_groups_share_a_key() -> None:
    names = [name for group in GROUPS.values() for name in settings_of(group)]
    assert len(names) == len(set(names)) == len(COMMON)


def test_every_setting_says_what_it_is() -> None:
    for name, known in COMMON.items():
        assert known.help, name
        assert known.search is None or known.kind in (int, float), name


def test_round_trip_through_json() -> None:
    config = preset("standin", bank_momentum=0.95, milestones=(3, 4))
    assert from_mapping(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("bank_momentun=0.9", "did you mean 'bank_momentum'"),
        ("bank_momentum", r"--set 'bank_momentum': expected KEY=VALUE"),
        ("bank_momentum=1.5", r"bank_momentum: 1.5 is out of range, expected 0.0 to 0.9999"),
        ("epochs=2.5", "epochs: expected a whole number, got '2.5'"),
    ],
)
def test_bad_overrides_are_one_clear_line(pair: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_overrides([pair])
    assert "\n" not in str(caught.value)


def test_overrides_are_typed() -> None:
    pairs = ["bank_momentum=.95", "epochs=3", "flip_test=yes", "milestones=2,3", "latent=mixture"]
    expected = {"bank_momentum": 0.95, "epochs": 3, "flip_test": True, "milestones": (2, 3), "latent": "mixture"}
    assert parse_overrides(pairs) == expected
    assert parse_overrides(["milestones=(4 5)"]) == {"milestones": (4, 5)}
    with pytest.raises(UsageError, match="epochs is given twice"):
        parse_overrides(["epochs=3", "epochs=3"])
    with pytest.raises(UsageError, match="device: expected a text, got an empty one"):
        parse_overrides(["device="])


def test_a_key_of_another_method_is_refused_by_the_name_of_its_method() -> None:
    with pytest.raises(UsageError, match="baseline_norm: is a setting of method baseline; this run's method is lda"):
        preset("standin", baseline_norm="instance")
    with pytest.raises(UsageError, match=r"bank_momentum: is a setting of method.* lda.*; this run's method is "):
        check_keys(["bank_momentum"], "baseline")
    with pytest.raises(UsageError, match=r"method: unknown method 'ldaa' \(did you mean 'lda'"):
        preset("standin", method="ldaa")


def test_contradictions_are_told_wherever_they_are_made() -> None:
    with pytest.raises(UsageError, match="rising epochs"):
        preset("real", milestones=(5, 5))
    with pytest.raises(UsageError, match="validation_fraction: source_validation needs"):
        preset("real", validation_fraction=0.0)
    with pytest.raises(UsageError, match="inference: 'fused' needs Network-A, but network_a is none"):
        preset("real", network_a="none")
    assert preset("real", learning_rate=1).schedule.learning_rate == 1.0


def test_value_and_replace_go_by_flat_names() -> None:
    config = preset("standin")
    assert config.value("method") == "lda"
    assert config.value("bank_momentum") == config.method.settings.bank_momentum == 0.9  # type: ignore[attr-defined]
    assert config.replace(seed=3).run.seed == 3
    with pytest.raises(UsageError, match="did you mean 'bank_momentum'"):
        config.value("bank_momentun")


# --- hashes ----------------------------------------------------------------------------------------------------------

PINNED = {
    "lda": ("b3208974f4a6", "298fec8d8d41"),
    "baseline": ("9c37f68f287b", "5f1c52fc10d1"),
    "real lda": ("c39af837d6e6", "95ff024a4faf"),
}
"""Training and unit hash of three configurations. Runs are named by them: a change orphans every finished run."""


def known_configurations() -> dict[str, Config]:
    return {"lda": preset("standin"), "baseline": preset("standin", method="baseline"), "real lda": preset("real")}


@pytest.mark.parametrize("name", PINNED)
def test_hashes_of_known_configurations(name: str) -> None:
    config = known_configurations()[name]
    assert (config.training_hash(SOURCES), config.unit_hash(SOURCES, "d")) == PINNED[name]


def test_a_new_method_or_setting_renames_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method from a folder of its own, then the same with one more setting: the others keep their names."""
    source = """
from dataclasses import dataclass
from lda.methods.base import Method
from lda.settings import Settings, setting

@dataclass(frozen=True, kw_only=True)
class MySettings(Settings):
    my_weight: float = setting(1.0, "a weight", low=0.0, high=9.0)
    {more}

class Mine(Method):
    title = "mine"
    reference = "nobody"
    Settings = MySettings
"""
    before = {name: c.unit_hash(SOURCES, "d") for name, c in known_configurations().items()}
    own = []
    for folder, more in (("first", ""), ("second", 'my_other: int = setting(1, "another", low=0, high=9)')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(source.format(more=more))
        monkeypatch.setenv("LDA_METHODS", str(tmp_path / folder))
        known_settings.cache_clear()
        own.append(preset("standin", method="mine").training_hash(SOURCES))
        assert {name: c.unit_hash(SOURCES, "d") for name, c in known_configurations().items()} == before
    assert own[0] != own[1]
    known_settings.cache_clear()


def test_training_hash_follows_what_is_learnt_and_unit_hash_what_is_measured() -> None:
    config = preset("standin")

    def hashes(changed: Config, sources: dict[str, str] = SOURCES, target: str = "d") -> tuple[str, str]:
        return changed.training_hash(sources), changed.unit_hash(sources, target)

    training, unit = hashes(config)
    trains = {"seed": 1, "bank_momentum": 0.5, "gem_p": 2.0, "pad": 1, "epochs": 3, "validation_fraction": 0.2,
              "cuhk03_boxes": "detected", "protocol": "protocol2", "method": "lda"}  # fmt: skip
    for key, value in trains.items():
        changed = hashes(config.replace(**{key: value}))
        assert (changed[0] != training) == (key != "method"), key
        assert (changed[1] != unit) == (key != "method"), key
    tests = {"inference": "expert", "flip_test": True, "average_precision": "trapezoid", "test_split": 0,
             "cuhk03_protocol": "classic", "target": "cuhk03", "selection": "oracle"}  # fmt: skip
    for key, value in tests.items():
        changed = hashes(config.replace(**{key: value}))
        assert changed[0] == training, key
        assert changed[1] != unit, key
    for key, known in settings_of(Machine).items():
        other = {bool: not known.default, int: 7}.get(known.kind, "cpu" if key == "device" else "disabled")
        assert hashes(config.replace(**{key: other})) == (training, unit), key
    assert hashes(config, {**SOURCES, "cuhk03": "other"})[0] != training
    assert hashes(config, dict(reversed(SOURCES.items())))[0] != training, "the order of domains is theirs"
    assert hashes(config, target="other")[0] == training
    assert hashes(config, target="other")[1] != unit


def test_a_weights_file_counts_by_its_bytes_wherever_it_lies(tmp_path: Path) -> None:
    def hashes(path: Path) -> tuple[str, str]:
        config = preset("standin", backbone="mobilenet_v2", pretrained=str(path))
        return config.training_hash(SOURCES), config.unit_hash(SOURCES, "d")

    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    for path in (first, second):
        path.write_bytes(b"weights")
    before = hashes(first)
    assert hashes(second) == before
    first.write_bytes(b"others")
    changed = hashes(first)
    assert changed[0] != before[0]
    assert changed[1] != before[1]
    first.unlink()
    with pytest.raises(UsageError, match=r"pretrained: .*first\.pt: there is no such file"):
        hashes(first)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", methods.names())
def test_presets_are_valid_for_every_method(name: str, method: str) -> None:
    assert preset(name, method=method).method.name == method


def test_unknown_preset_and_frozen() -> None:
    with pytest.raises(UsageError, match="did you mean 'standin'"):
        preset("stand-in")
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("real").schedule.epochs = 3  # type: ignore[misc]


def test_rate_warms_up_and_falls_at_milestones() -> None:
    schedule = preset("real", epochs=4, steps_per_epoch=10, warmup_epochs=1, warmup_factor=0.1, learning_rate=1.0,
                      milestones=(2, 3), gamma=0.5).schedule  # fmt: skip
    assert [schedule.rate(step) for step in (0, 5, 10, 19, 20, 30)] == pytest.approx([0.1, 0.55, 1.0, 1.0, 0.5, 0.25])


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
