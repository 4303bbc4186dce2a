"""The training step and inference of LDA and the baseline."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lda import methods
from lda.batch import Batch
from lda.config import Config, preset
from lda.errors import UsageError
from lda.methods.base import Method
from lda.methods.baseline import Baseline
from lda.methods.lda import LDA
from lda.parts.anti_norm import AntiNormalised, Expert, UnseenExpert
from lda.parts.given import Row
from lda.parts.heads import gem
from lda.parts.latent import alignment_loss, consistency_loss
from lda.parts.losses import Gaussian, batch_hard_triplet_loss, batch_statistics, identity_loss

NUM_IDS = (5, 7, 6)


def small(**changes: Any) -> Config:
    own = {"bank_warmup_updates": 1} if changes.get("method", "lda") == "lda" else {}
    return preset("standin", **{**own, **changes})


def build_method(config: Config, num_ids: Sequence[int]) -> Method:
    return methods.build(config.method, config.setup(num_ids))


def batch(domain: int, seed: int = 0) -> Batch:
    images = torch.randn(8, 3, 64, 32, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1, 2, 3]).repeat_interleave(2)
    return Batch(images, labels, torch.full((8,), domain))


def warmed(config: Config) -> LDA:
    """A method that has seen every domain once."""
    method = build_method(config, NUM_IDS)
    assert isinstance(method, LDA)
    for domain in range(3):
        method.training_losses(batch(domain, seed=domain), step=0)
    return method


def test_step_equals_the_equations() -> None:
    """Eq. (11) assembled by hand from a copy of the method."""
    config = small(consistency_weight=0.7, alignment_weight=0.4, warmup_epochs=0)
    method = warmed(config)
    reference = copy.deepcopy(method)
    data = batch(1, seed=9)
    losses = method.training_losses(data, step=40)

    (route,) = reference.draw_routes(1, 40, 8)
    with reference.switch.on(Expert(1)):
        maps_e = reference.backbone(data.images)
    with reference.switch.on(route):
        maps_a = reference.backbone(data.images)
    mean, var = maps_e.detach().mean((0, 2, 3)), maps_e.detach().var((0, 2, 3))
    bank = reference.output_bank
    means, variances = bank.mean.clone(), bank.var.clone()
    means[1], variances[1] = 0.9 * means[1] + 0.1 * mean, 0.9 * variances[1] + 0.1 * var
    latent = Gaussian(means.mean(0), variances.mean(0))
    expected = 0.7 * consistency_loss(maps_e, latent) + 0.4 * alignment_loss(maps_a, latent)
    for maps, head in ((maps_e, reference.head_e), (maps_a, reference.head_a)):
        features = gem(maps, 3.0)
        expected = expected + identity_loss(head(features, 1), data.labels, 0.1)
        expected = expected + batch_hard_triplet_loss(features, data.labels, 0.3)
    torch.testing.assert_close(losses["loss/total"], expected)


def test_only_the_batchs_row_moves_and_network_a_never_writes() -> None:
    method = warmed(small())
    before = {name: bank.mean.clone() for name, bank in method.banks()}
    losses = method.training_losses(batch(2, seed=5), step=3)
    losses["loss/total"].backward()
    assert "loss/id_a" in losses
    for name, bank in method.banks():
        assert torch.equal(bank.mean[:2], before[name][:2]), name
        assert not torch.equal(bank.mean[2], before[name][2]), name
        assert bank.counts == [1, 1, 2]


def test_evaluation_writes_nothing() -> None:
    method = warmed(small()).eval()
    before = copy.deepcopy(method.state_dict())
    method(batch(0).images)
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("rule", ["uniform", "round_robin"])
def test_donor_is_never_the_own_domain_and_uses_all_others(rule: str) -> None:
    method = build_method(small(donor=rule), NUM_IDS)
    assert isinstance(method, LDA)
    for domain in range(3):
        drawn = [donor(method, domain, step) for step in range(300)]
        assert set(drawn) == {0, 1, 2} - {domain}
        assert 100 < drawn.count(drawn[0]) < 200
        assert drawn == [donor(method, domain, step) for step in range(300)]


def test_network_a_waits_for_every_domain() -> None:
    method = build_method(small(bank_warmup_updates=2), NUM_IDS)
    assert isinstance(method, LDA)
    for step, domain in enumerate([0, 0, 0, 1, 1, 2]):
        assert "loss/id_a" not in method.training_losses(batch(domain), step)
    assert "loss/id_a" in method.training_losses(batch(2), 6)


def latent_of(method: LDA, domain: int) -> Gaussian:
    """Eq. (7) as a step on maps of that domain would find it."""
    maps = torch.rand(4, method.backbone.channels, 4, 2, requires_grad=True)
    (latent,) = method._latents(domain, [maps], [batch_statistics(maps.detach())])
    return latent


def donor(method: LDA, domain: int, step: int) -> int:
    """j of Eq. (4) in a step."""
    (route,) = method.draw_routes(domain, step, 8)
    assert isinstance(route, AntiNormalised)
    assert isinstance(route.given, Row)
    return int(route.given.index)


def test_latent_is_the_mean_over_seen_domains_without_gradient() -> None:
    method = build_method(small(), NUM_IDS)
    assert isinstance(method, LDA)
    bank = method.output_bank
    method.training_losses(batch(2), 0)
    assert torch.equal(latent_of(method, 2).mean, bank.mean[2])
    method.training_losses(batch(0), 1)
    torch.testing.assert_close(latent_of(method, 0).var, (bank.var[0] + bank.var[2]) / 2)
    assert not latent_of(method, 0).mean.requires_grad


def test_latent_losses_ramp_over_the_warm_up() -> None:
    method = build_method(small(warmup_epochs=2, steps_per_epoch=10), NUM_IDS)
    assert isinstance(method, LDA)
    assert [method.latent_ramp(step) for step in (0, 5, 20, 1000)] == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize("inference", ["fused", "aligned", "expert"])
def test_features_do_not_depend_on_batch_size_or_order(inference: str) -> None:
    method = warmed(small(inference=inference)).eval()
    images = batch(0, seed=4).images
    together = method(images)
    torch.testing.assert_close(torch.cat([method(image[None]) for image in images]), together, rtol=1e-4, atol=1e-5)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(method(images[order]), together[order], rtol=1e-4, atol=1e-5)


def test_fused_is_expert_plus_mean_of_donors() -> None:
    method = warmed(small()).eval()
    images = batch(0).images
    normalise = torch.nn.functional.normalize
    aligned = []
    for donor in range(3):
        with method.switch.on(AntiNormalised(Row(donor))):
            aligned.append(normalise(gem(method.backbone(images), 3.0)))
    with method.switch.on(UnseenExpert()):
        expert = normalise(gem(method.backbone(images), 3.0))
    expected = expert + sum(aligned) / 3
    torch.testing.assert_close(method(images), expected)


def test_backbone_has_the_plain_networks_parameters() -> None:
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(build_method(small(), NUM_IDS).backbone) == count(
        build_method(small(method="baseline"), NUM_IDS).backbone
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"network_a": "in"},
        {"network_a": "none", "inference": "expert"},
        {"an_affine": "shared"},
        {"norm_sites": "no_stem"},
        {"latent": "barycentre"},
        {"latent": "mixture"},
        {"distance": "w2_squared"},
        {"distance": "symmetric_kl"},
        {"alignment": "batch"},
        {"heads": "shared"},
        {"classifier": "joint"},
        {"activation_checkpointing": True},
        {"bank_momentum": 0.0},
        {"method": "baseline"},
        {"method": "baseline", "baseline_norm": "instance"},
    ],
    ids=str,
)
def test_every_switch_trains_and_embeds(changes: dict[str, Any]) -> None:
    """Two steps per domain: finite losses, every parameter of the backbone gets a gradient.

    Heads are looked at, over more steps, in tests/test_methods.py.
    """
    method = build_method(small(**changes), NUM_IDS)
    for step in range(6):
        losses = method.training_losses(batch(step % 3, seed=step), step)
    losses["loss/total"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    grads = [p.grad for p in method.backbone.parameters()]
    missing = sum(g is None for g in grads)
    assert missing == 0
    assert all(torch.isfinite(g).all() for g in grads)
    features = method.eval()(batch(0).images)
    assert features.shape == (8, 192)
    assert torch.isfinite(features).all()


def test_switches_change_the_result() -> None:
    """No dead switch: each of these gives another total loss than the default on the same weights and batch."""

    def total(**changes: Any) -> float:
        method = warmed(small(warmup_epochs=0, **changes))
        with torch.no_grad():
            for parameter in method.backbone.parameters():
                parameter.mul_(1.1)  # gamma = 1 would hide a missing affine
        return method.training_losses(batch(1, seed=9), step=41)["loss/total"].item()

    default = total()
    for changes in (
        {"network_a": "in"},
        {"an_affine": "shared"},
        {"norm_sites": "no_stem"},
        {"latent": "barycentre"},
        {"latent": "mixture"},
        {"distance": "w2_squared"},
        {"distance": "symmetric_kl"},
        {"alignment": "batch"},
        {"classifier": "joint"},
        {"consistency_weight": 0.5},
        {"alignment_weight": 0.5},
        {"bank_momentum": 0.5},
        {"label_smoothing": 0.0},
        {"triplet_margin": 0.5},
        {"triplet_weight": 0.5},
        {"gem_p": 1.0},
    ):
        assert total(**changes) != pytest.approx(default, rel=1e-7), changes


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (build_method(small(seed=s), NUM_IDS).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])


def test_baseline_offsets_labels_of_mixed_batches() -> None:
    method = build_method(small(method="baseline"), NUM_IDS)
    assert isinstance(method, Baseline)
    data = batch(0)
    data = data._replace(domains=torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]))
    reference = copy.deepcopy(method)
    features = gem(reference.backbone(data.images), 3.0)
    labels = data.labels + torch.tensor([0, 0, 5, 5, 12, 12, 12, 12])
    expected = identity_loss(reference.head(features, 0), labels, 0.1)
    torch.testing.assert_close(method.training_losses(data, 0)["loss/id"], expected)


def test_contradictions_are_told() -> None:
    with pytest.raises(UsageError, match="another source domain"):
        build_method(small(protocol="in_domain"), [5])
    with pytest.raises(UsageError, match="set inference=expert"):
        small(network_a="none")
    build_method(small(network_a="in"), [5])


# Total losses of five Adam steps on random images, seed 0, CPU. What should not alter numbers must not alter these.
GOLDEN = {"lda": [2.1767, 2.5890, 4.9103, 4.5100, 5.1874], "baseline": [3.4576, 3.5343, 3.7388, 3.7544, 3.5817]}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name: str) -> None:
    method = build_method(small(method=name, warmup_epochs=0), NUM_IDS)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    totals = []
    for step in range(5):
        loss = method.training_losses(batch(step % 3, seed=step), step)["loss/total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals == pytest.approx(GOLDEN[name], rel=1e-3)
