"""MDA's autoencoder, its meta step by finite differences, what reaches what, and its three ways of inference."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_batches import build, mixed_batch
from tasks import make_task
from torch import Tensor, nn
from torch.func import functional_call

from lda.batch import Batch
from lda.config import preset
from lda.errors import UsageError
from lda.methods.base import Losses, TargetImages
from lda.methods.mda import MDA, LatentModel, MDASettings, MomentumSGD, Reconstruction, held_out_loss, latent_loss
from lda.parts.batch_instance_norm import gate_step, gates_of
from lda.parts.episodes import draw_held_out, inner_gradient, inner_step
from lda.testing import Evaluator

RANDOM = torch.Generator().manual_seed(11)
FAST = {"metabin_warmup": 0, "metabin_gate_rate": 5.0, "metabin_inner_low": 0.1, "metabin_inner_high": 0.1}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=dtype)


def method_of(**changes: Any) -> MDA:
    method = build("mda", **{**FAST, **changes})
    assert isinstance(method, MDA)
    return method


def two_batches() -> Batch:
    return mixed_batch(0)._replace(extra=mixed_batch(1))


def no_update(losses: Losses, groups: tuple[str, ...] = ("main",), rule: str = "optimiser") -> None:
    pass


def changed(method: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}


@cache
def _settled() -> dict[str, Tensor]:
    method = method_of()
    for step in range(3):
        method.train_step(two_batches(), step, no_update)
    return method.state_dict()


def settled(**changes: Any) -> MDA:
    """Gates and running statistics that are not the initial ones, in evaluation mode; the same for all settings."""
    method = method_of(**changes)
    method.load_state_dict(_settled())
    return method.eval()


def target(images: Tensor, camera: int = 3) -> list[TargetImages]:
    return [TargetImages(images, torch.full((len(images),), camera), "query")]


# --- Eqs. (M4) to (M7) -----------------------------------------------------------------------------------------------


class TestAutoencoder:
    def test_divergence_equals_torch_distributions(self) -> None:
        mean, log_var, features = randn(5, 4), randn(5, 4), randn(5, 8)
        found = Reconstruction(features, mean, log_var)
        of_each = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (0.5 * log_var).exp()), torch.distributions.Normal(0.0, 1.0)
        )
        expected = 0.3 * of_each.sum(1).mean()
        torch.testing.assert_close(latent_loss(found, features, 0.3), expected)

    def test_error_is_the_mean_over_all_entries(self) -> None:
        features, wrong = randn(5, 8), randn(5, 8)
        found = Reconstruction(wrong, torch.zeros(5, 4), torch.zeros(5, 4))
        expected = sum(float((a - b) ** 2) for a, b in zip(features.flatten(), wrong.flatten(), strict=True)) / 40
        assert float(latent_loss(found, features, 7.0)) == pytest.approx(expected, rel=1e-5)

    def test_reconstruction_is_within_one(self) -> None:
        model = LatentModel(16, 4)
        assert float(model(100 * randn(6, 16), 50 * randn(6, 4)).features.detach().abs().max()) <= 1.0

    def test_latent_is_mean_plus_deviation_times_noise(self) -> None:
        """A decoder that repeats z; without noise it is the mean."""
        model = LatentModel(16, 4).eval()
        model.decoder = nn.Sequential(nn.Identity())
        features, noise = randn(6, 16), randn(6, 4)
        found, quiet = model(features, noise), model(features)
        torch.testing.assert_close(found.features, found.mean + found.log_var.exp().sqrt() * noise)
        assert torch.equal(quiet.features, quiet.mean)

    @pytest.mark.parametrize(("channels", "wide", "narrow"), [(2048, 512, 128), (192, 96, 48), (512, 256, 128)])
    def test_widths_follow_the_network(self, channels: int, wide: int, narrow: int) -> None:
        model = LatentModel(channels, 32)
        sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
        encoder, decoder = [(channels, wide), (wide, narrow)], [(32, narrow), (narrow, wide), (wide, channels)]
        assert sizes == [*encoder, (narrow, 32), (narrow, 32), *decoder]
        assert isinstance(model.decoder[-1], nn.Tanh)
        assert sum(isinstance(m, nn.BatchNorm1d) for m in model.modules()) == 3

    def test_size_of_the_published_one(self) -> None:
        assert sum(p.numel() for p in LatentModel(2048, 128).parameters()) == pytest.approx(2.3e6, rel=0.03)


def test_optimizer_equals_torch() -> None:
    model = LatentModel(12, 3)
    other = copy.deepcopy(model)
    ours = MomentumSGD(dict(model.named_parameters()))
    theirs = torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(5):
        x, noise = randn(6, 12), randn(6, 3)
        psi = dict(model.named_parameters())
        ours.step(psi, inner_gradient(latent_loss(model(x, noise), x, 0.1), psi))
        theirs.zero_grad()
        latent_loss(other(x, noise), x, 0.1).backward()
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)
    assert len(ours.state_dict()) == len(psi)


# --- Eqs. (M8) and (M9) ----------------------------------------------------------------------------------------------


class TestMetaStep:
    SETTINGS = MDASettings(mda_inner_rate=0.05, mda_beta=0.1)

    def losses(self, model: LatentModel, data: list[Tensor]) -> tuple[Tensor, Tensor]:
        first, noise_first, second, noise_second = data
        seen = latent_loss(model(first, noise_first), first, 0.1)
        return seen, held_out_loss(model, seen, second, noise_second, self.SETTINGS)

    @pytest.fixture
    def model(self) -> LatentModel:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return LatentModel(8, 3).double().train()

    @pytest.fixture
    def data(self) -> list[Tensor]:
        return [randn(*shape, dtype=torch.float64) for shape in ((6, 8), (6, 3), (5, 8), (5, 3))]

    def test_gradient_equals_finite_differences(self, model: LatentModel, data: list[Tensor]) -> None:
        """Of V(f_te; psi - alpha grad V(f_tr; psi)), with the inner gradient taken anew at every point."""
        psi = dict(model.named_parameters())
        found = inner_gradient(self.losses(model, data)[1], psi)

        def value() -> float:
            seen = latent_loss(model(data[0], data[1]), data[0], 0.1)
            stepped = inner_step(psi, inner_gradient(seen, psi), 0.05)
            return float(latent_loss(functional_call(model, stepped, (data[2], data[3])), data[2], 0.1).detach())

        for name, parameter in psi.items():
            for index in (0, parameter.numel() - 1):
                around = []
                for sign in (1, -1):
                    with torch.no_grad():
                        parameter.view(-1)[index] += sign * 1e-6
                    around.append(value())
                    with torch.no_grad():
                        parameter.view(-1)[index] -= sign * 1e-6
                expected = (around[0] - around[1]) / 2e-6
                assert float(found[name].view(-1)[index]) == pytest.approx(expected, rel=1e-4, abs=1e-8), name

    def test_second_term_is_neither_absent_nor_first_order(self, model: LatentModel, data: list[Tensor]) -> None:
        psi = dict(model.named_parameters())
        found = inner_gradient(self.losses(model, data)[1], psi)
        stepped = inner_step(psi, inner_gradient(latent_loss(model(*data[:2]), data[0], 0.1), psi), 0.05)
        first_order = inner_gradient(
            latent_loss(functional_call(model, stepped, (data[2], data[3])), data[2], 0.1), psi
        )
        assert found.keys() == psi.keys()
        assert any(float(g.abs().max()) > 1e-4 for g in found.values())
        assert any(not torch.allclose(g, first_order[name], rtol=1e-3) for name, g in found.items())

    def test_the_releases_parameter_trick_loses_the_second_term(self, model: LatentModel, data: list[Tensor]) -> None:
        """`Parameter(p - rate * g)` makes a leaf: nothing reaches psi. A regression test of why there is none here."""
        psi = dict(model.named_parameters())
        seen = latent_loss(model(*data[:2]), data[0], 0.1)
        slope = torch.autograd.grad(seen, list(psi.values()), create_graph=True)
        leaves = {name: nn.Parameter(p - 0.05 * g) for (name, p), g in zip(psi.items(), slope, strict=True)}
        lost = latent_loss(functional_call(model, leaves, (data[2], data[3])), data[2], 0.1)
        assert torch.autograd.grad(lost, list(psi.values()), allow_unused=True) == (None,) * len(psi)

    def test_running_statistics_are_those_of_meta_train(self, model: LatentModel, data: list[Tensor]) -> None:
        other = copy.deepcopy(model)
        self.losses(model, data)
        other(*data[:2])
        for (name, found), expected in zip(model.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(found, expected), name


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"mda_base": "bn"}, {"metabin_meta": "off"}])
def test_the_autoencoder_never_reaches_the_network(changes: dict[str, Any]) -> None:
    """Nor the trainer's optimiser the autoencoder. Without an update only gates, running statistics and psi move."""
    method = method_of(**changes)
    seen: list[Losses] = []
    before = copy.deepcopy(method.state_dict())
    losses = method.train_step(two_batches(), 0, lambda losses, groups=(), rule="": seen.append(dict(losses)))
    assert "loss/vae" in losses
    assert "loss/vae_held_out" in losses
    assert all(not losses[name].requires_grad for name in losses if "vae" in name)
    assert all(p.grad is None for p in method.parameters())
    moved = changed(method, before)
    for name in moved:
        kind = name.rpartition(".")[2]
        allowed = kind in ("gate", "running_mean", "running_var", "num_batches_tracked")
        assert allowed or name.startswith(("latent.", "latent_optimizer.")), name
    assert {f"latent.{name}" for name, _ in method.latent.named_parameters()} <= moved
    total = seen[0]["loss/total"]
    found = torch.autograd.grad(total, list(method.latent.parameters()), allow_unused=True)
    assert found == (None,) * len(found)
    listed = {id(p) for group in method.parameter_groups().values() for p in group.parameters}
    assert listed == {id(p) for n, p in method.named_parameters() if p.requires_grad and not n.startswith("latent.")}


def test_network_trains_as_metabin_does() -> None:
    """Base step and gates, to the bit."""
    method, other = method_of(), build("metabin", **FAST)
    for step in range(2):
        ours = method.train_step(two_batches(), step, no_update)
        theirs = other.train_step(two_batches(), step, no_update)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert all(torch.equal(method.state_dict()[name], value) for name, value in other.state_dict().items())
    assert method.layout == other.layout
    assert method.cost == other.cost
    assert method_of(metabin_batch="same").layout.batches == 1


def features_of(method: MDA, features: Tensor) -> Tensor:
    """f: behind the neck, by its own statistics of the batch."""
    neck = method.head.necks[0]
    return F.batch_norm(features, None, None, neck.weight, neck.bias, training=True, eps=neck.eps).detach()


def test_gate_step_gives_the_autoencoder_its_features() -> None:
    """V of the features that meta-train's pass saw, whatever the noise: with L = 2 and beta = 0 the error tells."""
    method = method_of(mda_meta="off")
    oracle = copy.deepcopy(method)
    losses = method.train_step(two_batches(), 0, no_update)
    oracle.training_losses(mixed_batch(0), 0)
    seen = gate_step(oracle.backbone, mixed_batch(1), oracle.settings, oracle.setup, 0)
    shown: list[Tensor] = []
    oracle.latent.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    expected = oracle._latent_step(seen.train.features, seen.test.features, 0)
    assert torch.equal(losses["loss/vae"], expected["loss/vae"])
    torch.testing.assert_close(shown[0], features_of(method, seen.train.features), rtol=1e-4, atol=1e-5)
    assert "loss/vae_held_out" not in losses


@pytest.mark.parametrize(
    "changes",
    [
        {"mda_base": "bn"},
        {"metabin_meta": "off"},
        {"metabin_warmup": 9},
        {"mda_base": "bn", "metabin_train_domains": 1},
    ],
)
def test_without_a_gate_step_the_base_features_are_split(changes: dict[str, Any]) -> None:
    method = method_of(**changes)
    shown: list[Tensor] = []
    method.latent.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    plain = build("baseline")
    batch = mixed_batch()
    features = plain.pooled(plain.backbone(batch.images))
    for step in range(4):
        shown.clear()
        method.train_step(batch, step, no_update)
        number = 2 if "metabin_train_domains" in changes else 1
        out = torch.isin(batch.domains, torch.tensor(draw_held_out(batch.domains, method.setup.seed, step, number)))
        for part, rows in zip(shown, (~out, out), strict=True):
            torch.testing.assert_close(part, features_of(method, features[rows]), rtol=1e-3, atol=1e-4)


def test_a_plain_network_has_no_gates() -> None:
    method = method_of(mda_base="bn")
    assert gates_of(method.backbone) == {}
    assert method.label == "MDA on plain BN"
    assert method.cost.train_passes == 1
    assert method.layout.batches == 1
    assert set(method.parameter_groups()) == {"main"}
    before = copy.deepcopy(method.state_dict())
    method.train_step(mixed_batch(), 0, no_update)
    assert any("running_mean" in name for name in changed(method, before))


def test_trained_gates_are_clamped() -> None:
    method = method_of(metabin_meta="off")
    assert method.label == "MDA on BIN"

    def away(losses: Losses, groups: tuple[str, ...] = (), rule: str = "") -> None:
        assert groups == ("main", "undecayed")
        with torch.no_grad():
            for number, gate in enumerate(gates_of(method.backbone).values()):
                gate.fill_(1.5 if number % 2 else -0.5)

    method.train_step(mixed_batch(), 0, away)
    assert {float(gate[0].detach()) for gate in gates_of(method.backbone).values()} == {0.0, 1.0}


def test_noise_is_a_function_of_seed_and_step() -> None:
    method = method_of(mda_base="bn")
    features = randn(12, 192)

    def after(step: int, seed: int = 0) -> Tensor:
        copied = copy.deepcopy(method)
        copied.setup = copy.copy(method.setup)
        object.__setattr__(copied.setup, "seed", seed)
        return copied._latent_step(features[:8], features[8:], step)["loss/vae"]

    assert torch.equal(after(3), after(3))
    assert not torch.equal(after(3), after(4))
    assert not torch.equal(after(3), after(3, seed=1))


def test_momentum_is_in_the_checkpoint() -> None:
    method = settled()
    names = [name for name in method.state_dict() if name.startswith("latent_optimizer.")]
    assert len(names) == len(list(method.latent.parameters()))
    assert any(bool((method.state_dict()[name] != 0).any()) for name in names)


def test_active_latents_are_counted() -> None:
    method = method_of(mda_base="bn")
    with torch.no_grad():
        method.latent.mean.weight.zero_()
        method.latent.mean.weight[:3] = 10.0
    assert float(method.train_step(mixed_batch(), 0, no_update)["vae/active"]) == 3


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match=r"metabin_train_domains: 3 of 3 sources.*; set "):
        method_of(mda_base="bn", metabin_train_domains=3)


# --- inference -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_feature(method: MDA, images: Tensor) -> Tensor:
    return method.head.necks[0](method.pooled(method.backbone(images)))  # type: ignore[no-any-return]


def test_source_inference_looks_at_the_image_alone_and_draws_nothing() -> None:
    method = settled()
    assert not method.looks_at_target
    assert method.inference == "source"
    images = randn(6, 3, 64, 32)
    with torch.no_grad():
        together = method.encode(images)
        assert torch.equal(method.encode(images), together)
        torch.testing.assert_close(method.encode(images[2:3]), together[2:3], rtol=1e-4, atol=1e-5)
        features = plain_feature(method, images)
        mixed = 0.6 * features + 0.4 * method.latent(features).features
    torch.testing.assert_close(together, F.normalize(mixed))


def test_mix_ranks_by_the_feature_or_by_its_reconstruction() -> None:
    images, zero, one = randn(6, 3, 64, 32), settled(mda_mix=0.0), settled(mda_mix=1.0)
    with torch.no_grad():
        torch.testing.assert_close(zero.encode(images), F.normalize(plain_feature(zero, images)))
        torch.testing.assert_close(one.encode(images), F.normalize(one.latent(plain_feature(one, images)).features))


def test_camera_inference_depends_on_the_other_images_and_says_so() -> None:
    method = settled(mda_inference="camera", mda_camera_images=8)
    assert method.looks_at_target
    assert method.inference == "camera"
    images = randn(10, 3, 64, 32) + 1.0
    psi = copy.deepcopy(method.latent.state_dict())
    adapted, other = copy.deepcopy(method), copy.deepcopy(method)
    adapted.adapt(target(images))
    other.adapt(target(images[2:]))
    with torch.no_grad():
        assert not torch.allclose(adapted.encode(images), method.encode(images), atol=1e-3)
        assert not torch.allclose(adapted.encode(images), other.encode(images), atol=1e-3)
        offsets = [float(plain_feature(one, images[:8]).mean(0).abs().max()) for one in (method, adapted)]
    assert offsets[1] < 0.2 < 0.5 < offsets[0]  # the neck has no shift; 0 but for biased against unbiased variances
    assert changed(adapted.latent, psi) == set()
    assert not any(module.training for module in adapted.modules())
    again = copy.deepcopy(method)
    again.adapt(target(images[:8]))  # what is beyond mda_camera_images has no say
    assert changed(again, adapted.state_dict()) == set()


def test_latent_inference_steps_the_autoencoder_on_the_same_images() -> None:
    images = randn(10, 3, 64, 32) + 1.0
    method = settled(mda_inference="latent", mda_steps=3, mda_inner_rate=0.2)
    camera, none = settled(mda_inference="camera"), settled(mda_inference="latent", mda_steps=0)
    before = copy.deepcopy(method.latent)
    for one in (method, camera, none):
        with torch.no_grad():  # an evaluation's
            one.adapt(target(images))
    assert changed(none, camera.state_dict()) == set()
    moved = changed(method, camera.state_dict())
    assert moved <= {f"latent.{name}" for name, _ in method.latent.named_parameters()}  # a bias before BN has no slope
    assert {"latent.mean.weight", "latent.decoder.4.weight"} <= moved
    assert not any(module.training for module in method.modules())
    features, noise = plain_feature(method, images), randn(10, 32)
    with torch.no_grad():
        values = [latent_loss(m.train()(features, noise), features, 0.02147) for m in (before, method.latent)]
    assert values[1] < values[0]


def test_a_latent_step_is_eq_m8() -> None:
    images = randn(10, 3, 64, 32)
    method = settled(mda_inference="latent", mda_inner_rate=0.1)
    oracle = copy.deepcopy(method.latent).train()
    noises: list[Tensor] = []
    method.latent.register_forward_pre_hook(lambda module, inputs: noises.append(inputs[1]))
    method.adapt(target(images))
    features = plain_feature(method, images)
    latent_loss(oracle(features, noises[0]), features, 0.02147).backward()
    for (name, found), p in zip(method.latent.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(found, p - 0.1 * p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["camera", "latent"])
def test_a_camera_with_one_image_keeps_what_was_learnt(mode: str) -> None:
    method = settled(mda_inference=mode)
    before = copy.deepcopy(method.state_dict())
    method.adapt(target(randn(1, 3, 64, 32)))
    assert changed(method, before) == set()


@pytest.mark.parametrize("mode", ["camera", "latent"])
def test_evaluation_puts_everything_back(mode: str, tmp_path: Path) -> None:
    """To the bit, and gives the same features again."""
    small = {"image_height": 32, "image_width": 16, "threads": 1}
    config = preset("standin", method="mda", mda_inference=mode, **small)
    task = make_task(tmp_path, 3)
    method = settled(mda_inference=mode)
    evaluator = Evaluator(task.test_splits, config, torch.device("cpu"))
    before = copy.deepcopy(method.state_dict())
    first, second = evaluator(method), evaluator(method)
    assert changed(method, before) == set()
    assert first == second
    source = settled()
    assert evaluator(source).effective_rank != first.effective_rank
