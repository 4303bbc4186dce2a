"""BIN layers and the gate step: limits, finite differences, loops, the release's clamp, a step worked by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lda.batch import Batch
from lda.config import preset
from lda.errors import UsageError
from lda.groups import Setup
from lda.parts.backbones import Backbone
from lda.parts.batch_instance_norm import (
    BatchInstanceNorm2d,
    GateSettings,
    check_gates,
    clamp_gates,
    gate_step,
    gates_of,
    inner_factor,
    scatter_loss,
    shuffle_loss,
    undecayed,
    use_batch_instance_norm,
)
from lda.parts.episodes import draw_held_out, split_by_domain
from lda.parts.heads import gem
from lda.parts.losses import batch_hard_triplet_loss

RANDOM = torch.Generator().manual_seed(5)


def shaken_norm(channels: int = 5) -> nn.BatchNorm2d:
    """A batch normalisation with nothing at its initial value."""
    norm = nn.BatchNorm2d(channels, eps=1e-4, momentum=0.2)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            values.copy_(torch.rand(channels, generator=RANDOM) + 0.5)
    return norm


def setup_of(num_ids: tuple[int, ...], gem_p: float = 3.0, recompute: bool = False, ids_per_batch: int = 16) -> Setup:
    setup = preset("standin").setup(num_ids)
    network = replace(setup.network, gem_p=gem_p)
    return replace(setup, network=network, recompute=recompute, ids_per_batch=ids_per_batch)


def settings_of(**changes: Any) -> GateSettings:
    return GateSettings(**{f"metabin_{key}": value for key, value in changes.items()})


class TestLayer:
    @pytest.mark.parametrize("training", [True, False])
    def test_gates_at_one_are_batch_normalisation_to_the_bit(self, training: bool) -> None:
        norm = shaken_norm()
        layer = BatchInstanceNorm2d(norm).train(training)
        norm.train(training)
        with torch.no_grad():
            layer.instance.weight.uniform_(2.0, 3.0)
        x = torch.randn(6, 5, 4, 3, generator=RANDOM)
        assert torch.equal(layer(x), norm(x))
        assert torch.equal(layer.batch.running_mean, norm.running_mean)
        assert torch.equal(layer.batch.running_var, norm.running_var)
        assert torch.equal(layer.batch.num_batches_tracked, norm.num_batches_tracked)

    @pytest.mark.parametrize("training", [True, False])
    def test_gates_at_zero_are_instance_normalisation_to_the_bit(self, training: bool) -> None:
        layer = BatchInstanceNorm2d(shaken_norm()).train(training)
        other = nn.InstanceNorm2d(5, eps=1e-4, affine=True)
        assert torch.equal(layer.instance.weight, torch.ones(5))
        assert torch.equal(layer.instance.bias, torch.zeros(5))
        with torch.no_grad():
            layer.gate.zero_()
            for name in ("weight", "bias"):
                values = torch.rand(5, generator=RANDOM)
                getattr(layer.instance, name).copy_(values)
                getattr(other, name).copy_(values)
        x = torch.randn(6, 5, 4, 3, generator=RANDOM)
        assert torch.equal(layer(x), other(x))

    def test_between_them_channel_by_channel(self) -> None:
        layer = BatchInstanceNorm2d(shaken_norm(2)).double()
        with torch.no_grad():
            layer.gate.copy_(torch.tensor([0.3, 0.8]))
            layer.instance.weight.copy_(torch.tensor([1.5, 0.5]))
            layer.instance.bias.copy_(torch.tensor([0.1, -0.2]))
        x = torch.randn(4, 2, 3, 2, generator=RANDOM, dtype=torch.float64)
        found = layer(x)
        for n in range(4):
            for c in range(2):
                channel, image = x[:, c], x[n, c]
                batch = (image - channel.mean()) / (channel.var(correction=0) + 1e-4).sqrt()
                own = (image - image.mean()) / (image.var(correction=0) + 1e-4).sqrt()
                batch = layer.batch.weight[c] * batch + layer.batch.bias[c]
                own = layer.instance.weight[c] * own + layer.instance.bias[c]
                torch.testing.assert_close(found[n, c], layer.gate[c] * batch + (1 - layer.gate[c]) * own)

    def test_gradient_of_the_gates(self) -> None:
        """sum(gradient of y * (BN - IN)), and finite differences."""
        layer = BatchInstanceNorm2d(shaken_norm(3), trained_gates=True).double()
        with torch.no_grad():
            layer.gate.copy_(torch.tensor([0.2, 0.5, 0.9]))
        x, weight = (torch.randn(4, 3, 3, 2, generator=RANDOM, dtype=torch.float64) for _ in range(2))
        (gradient,) = torch.autograd.grad((weight * layer(x) ** 2).sum(), layer.gate)
        with torch.no_grad():
            slope = 2 * weight * layer(x)
            expected = (slope * (layer.batch(x) - layer.instance(x))).sum((0, 2, 3))
            torch.testing.assert_close(gradient, expected)
            for c in range(3):
                values = []
                for sign in (1, -1):
                    layer.gate[c] += sign * 1e-5
                    values.append(float((weight * layer(x) ** 2).sum()))
                    layer.gate[c] -= sign * 1e-5
                assert float(gradient[c]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)

    def test_maps_of_one_pixel_are_refused(self) -> None:
        with pytest.raises(UsageError, match="image_height, image_width"):
            BatchInstanceNorm2d(shaken_norm())(torch.zeros(2, 5, 1, 1))

    def test_keeps_the_type_of_the_map(self) -> None:
        layer = BatchInstanceNorm2d(shaken_norm()).eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.zeros(2, 5, 3, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


class TestLosses:
    LABELS = torch.tensor([0, 0, 1, 1, 5, 5, 6, 6, 9, 9])
    DOMAINS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])  # a single identity of domain 2

    def test_scatter_equals_a_loop(self) -> None:
        features = torch.randn(10, 4, generator=RANDOM, dtype=torch.float64)
        of_domains = []
        for domain in range(3):
            own = [f / f.norm() for f, d in zip(features, self.DOMAINS.tolist(), strict=True) if d == domain]
            centre = torch.stack(own).mean(0)
            of_domains.append(sum(float(n @ centre / centre.norm()) for n in own) / len(own))
        assert float(scatter_loss(features, self.DOMAINS)) == pytest.approx(sum(of_domains) / 3, rel=1e-9)

    def test_scatter_of_a_point_and_of_an_antipodal_pair(self) -> None:
        same = torch.tensor([[1.0, 2.0]]).repeat(4, 1)
        assert float(scatter_loss(same, torch.tensor([0, 0, 1, 1]))) == pytest.approx(1.0)
        pair = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], requires_grad=True)
        loss = scatter_loss(pair, torch.tensor([0, 0]))
        loss.backward()
        assert loss.detach() == 0.0
        assert pair.grad.isfinite().all()

    def test_gradient_of_scatter(self) -> None:
        features = torch.randn(4, 3, generator=RANDOM, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda f: scatter_loss(f, torch.tensor([0, 0, 1, 1])), features)

    def test_shuffle_equals_a_loop(self) -> None:
        features = torch.randn(10, 4, generator=RANDOM, dtype=torch.float64)
        total = 0.0
        for i in range(10):
            others = [j for j in range(10) if self.DOMAINS[j] != self.DOMAINS[i]]
            same = [j for j in range(10) if self.DOMAINS[j] == self.DOMAINS[i] and self.LABELS[j] != self.LABELS[i]]
            if same:  # the identity of domain 2 is alone
                far = max(float((features[i] - features[j]).norm()) for j in others)
                near = min(float((features[i] - features[j]).norm()) for j in same)
                total += float(F.softplus(torch.tensor(far - near, dtype=torch.float64)))
        assert float(shuffle_loss(features, self.LABELS, self.DOMAINS)) == pytest.approx(total / 10, rel=1e-6)

    def test_shuffle_never_crosses_its_rule(self) -> None:
        """Only an image of another domain can be far, only another identity of the own domain near: from each anchor
        every forbidden image moves and the anchor's term does not."""
        labels, domains = torch.tensor([0, 0, 1, 5, 5, 6]), torch.tensor([0, 0, 0, 1, 1, 1])
        features = torch.tensor([[0.0], [0.1], [3.0], [20.0], [21.0], [25.0]], requires_grad=True)
        # anchors 0, 1, 2 against 25 and 3, 3, 0.1; anchors 3, 4, 5 against 0 and 25, 25, 21
        gaps = [25 - 3, 24.9 - 2.9, 22 - 2.9, 20 - 5, 21 - 4, 25 - 4]
        expected = F.softplus(torch.tensor(gaps)).mean()
        torch.testing.assert_close(shuffle_loss(features, labels, domains), expected, rtol=1e-3, atol=1e-3)

    def test_anchors_without_others_add_nothing_and_have_finite_gradients(self) -> None:
        features = torch.randn(4, 3, generator=RANDOM, requires_grad=True)
        loss = shuffle_loss(features, torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64))
        loss.backward()
        assert loss.detach() == 0.0
        assert torch.equal(features.grad, torch.zeros(4, 3))


@pytest.mark.parametrize(("total", "cycles"), [(160, 20), (2000, 20), (70, 10), (10, 20), (100, 1)])
def test_inner_factor_equals_cyclic_lr_stepped_before_it_is_read(total: int, cycles: int) -> None:
    """Over three periods; odd ones too."""
    settings = settings_of(cycles=cycles)
    period = max(2, total // cycles)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.001, 0.1, step_size_up=period / 2, step_size_down=period / 2, cycle_momentum=False
    )
    optimizer.step()
    for number in range(1, 3 * period + 1):
        schedule.step()
        assert inner_factor(settings, number, total) == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)


def test_equal_bounds_are_a_constant() -> None:
    settings = settings_of(inner_low=0.03, inner_high=0.03)
    assert {inner_factor(settings, number, 160) for number in range(1, 20)} == {0.03}


# --- the step --------------------------------------------------------------------------------------------------------

NUM_IDS = (3, 4, 3)
SETUP = setup_of(NUM_IDS)


def network_of(trained_gates: bool = False, seed: int = 3) -> Backbone:
    """conv - BIN - relu - conv - BIN with gates anywhere in [0, 1], every third at a bound."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = [
            ("conv1", nn.Conv2d(3, 6, 3, bias=False)),
            ("bn1", nn.BatchNorm2d(6)),
            ("relu", nn.ReLU()),
            ("conv2", nn.Conv2d(6, 5, 3, bias=False)),
            ("bn2", nn.BatchNorm2d(5)),
        ]
    network = Backbone(parts, 5)
    use_batch_instance_norm(network, trained_gates)
    with torch.no_grad():
        for layer in (network.bn1, network.bn2):
            layer.batch.bias.copy_(torch.rand(len(layer.gate), generator=random))
            layer.instance.weight.copy_(1 + torch.rand(len(layer.gate), generator=random))
            layer.gate.copy_(torch.rand(len(layer.gate), generator=random))
            layer.gate[::3] = 1.0
    return network.train()


def batch_of(seed: int = 0) -> Batch:
    """Three domains of two identities of two images."""
    images = torch.randn(12, 3, 8, 6, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 0, 2, 2, 1, 1, 3, 3, 0, 0, 1, 1])
    return Batch(images, labels, torch.tensor([0, 1, 2]).repeat_interleave(4))


def losses_of(network: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """(features, joint labels)."""
    labels = batch.labels + torch.tensor([0, 3, 7])[batch.domains]
    return gem(network(batch.images), 3.0), labels


@pytest.mark.parametrize("rate", [0.5, 10.0])
def test_step_equals_the_releases_clamp_by_data(rate: float) -> None:
    """Gates as parameters that are stepped and clamped through `.data`, as the release does: equal to the bit."""
    settings = settings_of(gate_rate=rate, inner_low=0.5, inner_high=0.9, warmup=0)
    network, oracle = network_of(), network_of(trained_gates=True)
    step = 3
    train, test = split_by_domain(batch_of(), draw_held_out(batch_of().domains, SETUP.seed, step, 1))
    before = {name: gate.clone() for name, gate in gates_of(network).items()}
    gates = gates_of(oracle)
    size = rate * inner_factor(settings, step + 1, SETUP.schedule.total_steps)

    features, labels = losses_of(oracle, train)
    loss = torch.stack(
        [
            shuffle_loss(features, labels, train.domains),
            batch_hard_triplet_loss(features, labels, 0.3),
            scatter_loss(features, train.domains),
        ]
    ).sum()
    for gate, gradient in zip(gates.values(), torch.autograd.grad(loss, list(gates.values())), strict=True):
        gate.data.sub_(size * gradient).clamp_(0, 1)
    clamped = torch.cat([(gate == 0) | (gate == 1) for gate in gates.values()])
    assert clamped.any()
    features, labels = losses_of(oracle, test)
    judged = batch_hard_triplet_loss(features, labels, 0.3)
    outer = dict(zip(gates, torch.autograd.grad(judged, list(gates.values())), strict=True))

    found = gate_step(network, batch_of(), settings, SETUP, step)
    for name, gate in gates_of(network).items():
        assert torch.equal(gate, (before[name] - rate * outer[name]).clamp(0, 1))
        assert 0 <= float(gate.min()) <= float(gate.max()) <= 1
    assert any(not torch.equal(gate, before[name]) for name, gate in gates_of(network).items())
    assert torch.equal(found.losses["loss/gate_held_out"], judged.detach())
    assert torch.equal(found.test.features, features.detach())


def test_step_worked_by_hand() -> None:
    """Two gates a, b and f = 10 + (a z1, b z2): meta-train has L = [2 b - 2 a + 0.3]_+, meta-test [2 a - 2 b + 0.3]_+.

    (0.5, 0.9) has the gradients (-2, 2) of 1.1; at s = 0.1 it becomes (0.7, 0.7), where meta-test has the gradients
    (2, -2) of 0.3, so eta = 0.1 makes it (0.3, 1.1), clamped to (0.3, 1). Without the virtual step meta-test is 0.
    """
    network = Backbone([("norm", nn.BatchNorm2d(2))], 2)
    use_batch_instance_norm(network)
    with torch.no_grad():
        network.norm.batch.bias.fill_(10.0)
        network.norm.instance.bias.fill_(10.0)
        network.norm.gate.copy_(torch.tensor([0.5, 0.9]))
    setup = setup_of((2, 2), gem_p=1.0)
    step = next(t for t in range(20) if draw_held_out(torch.tensor([0, 1]), setup.seed, t) == [1])
    by_identity, within = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    train, test = torch.stack([by_identity, within], 1), torch.stack([within, by_identity], 1)
    images = torch.cat([train, test])[:, :, None, None].repeat(1, 1, 2, 2)
    batch = Batch(images, torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]), torch.tensor([0, 1]).repeat_interleave(4))
    settings = settings_of(losses="triplet", inner_low=1.0, inner_high=1.0, warmup=0)
    found = gate_step(network.train(), batch, settings, setup, step)
    torch.testing.assert_close(network.norm.gate, torch.tensor([0.3, 1.0]), rtol=1e-4, atol=1e-4)
    assert float(found.losses["loss/gate_triplet"]) == pytest.approx(1.1, abs=1e-4)
    assert float(found.losses["loss/gate_held_out"]) == pytest.approx(0.3, abs=1e-4)
    assert float(found.losses["gate/mean"]) == pytest.approx(0.65, abs=1e-4)


def test_step_writes_gates_and_nothing_else() -> None:
    network = network_of()
    before = copy.deepcopy(network.state_dict())
    momentum = network.bn1.batch.momentum
    gate_step(network, batch_of(), settings_of(gate_rate=1.0, warmup=0), SETUP, 0)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"bn1.gate", "bn2.gate"}
    assert [name for name, p in network.named_parameters() if p.grad is not None] == []
    assert network.bn1.batch.momentum == momentum


def test_step_is_a_function_of_seed_and_step() -> None:
    settings = settings_of(gate_rate=1.0, inner_low=0.1, inner_high=0.1, warmup=0)

    def after(seed: int, step: int) -> Tensor:
        network = network_of()
        gate_step(network, batch_of(), settings, replace(SETUP, seed=seed), step)
        return torch.cat(list(gates_of(network).values()))

    assert torch.equal(after(0, 4), after(0, 4))
    assert len({tuple(after(0, step).tolist()) for step in range(12)}) == 3  # one for each source that is held out
    assert len({tuple(after(seed, 4).tolist()) for seed in range(40)}) == 3


def test_step_is_in_single_precision_under_autocast() -> None:
    plain, mixed = network_of(), network_of()
    settings = settings_of(gate_rate=1.0, warmup=0)
    gate_step(plain, batch_of(), settings, SETUP, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate_step(mixed, batch_of(), settings, SETUP, 0)
    assert torch.equal(plain.bn2.gate, mixed.bn2.gate)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ("shuffle+triplet+scatter", {"shuffle", "triplet", "scatter"}),
        ("triplet+scatter", {"triplet", "scatter"}),
        ("shuffle", {"shuffle"}),
    ],
)
def test_losses_of_meta_train(losses: str, expected: set[str]) -> None:
    """The chosen ones; the number of meta-train sources is half of all, rounded up, or what is set."""
    found = gate_step(network_of(), batch_of(), settings_of(losses=losses, warmup=0), SETUP, 0)
    assert {name.removeprefix("loss/gate_") for name in found.losses if name.startswith("loss/")} == {
        *expected,
        "held_out",
    }
    assert len(set(found.train.domains.tolist())) == 2
    alone = gate_step(network_of(), batch_of(), settings_of(train_domains=1, warmup=0), SETUP, 0)
    assert len(set(alone.train.domains.tolist())) == 1
    assert "loss/gate_shuffle" not in alone.losses  # nobody to compare with


def test_virtual_step_follows_the_cycle() -> None:
    """c is high in the middle of a period: meta-test sees gates further away, and says so."""
    settings = settings_of(gate_rate=10.0, inner_low=0.0, inner_high=1.0, warmup=5)
    period = SETUP.schedule.total_steps // 20
    steps = [5 + period - 1, 5 + period // 2 - 1]  # c = 0 and c = 1
    still, moved = (gate_step(network_of(), batch_of(), settings, SETUP, step) for step in steps)
    network = network_of()
    with torch.no_grad():
        for found, same in ((still, True), (moved, False)):
            _, test = split_by_domain(batch_of(), set(found.test.domains.tolist()))
            assert torch.equal(found.test.features, losses_of(network, test)[0]) == same


@pytest.mark.parametrize(
    ("changes", "num_ids", "ids_per_batch", "recompute", "message"),
    [
        ({"train_domains": 3}, (4, 4, 4), 16, False, "metabin_train_domains: 3 of 3 sources.*; set "),
        ({"losses": "shuffle"}, (4, 4), 16, False, "metabin_losses: shuffle.*; set "),
        ({"losses": "shuffle", "train_domains": 1}, (4, 4, 4), 16, False, "metabin_losses: shuffle.*; set "),
        ({}, (4, 4), 3, False, "ids_per_batch: of 3.*; set "),
        ({"train_domains": 3}, (4, 4, 4, 4), 7, False, "ids_per_batch: of 7.*; set "),
        ({}, (4, 4), 16, True, "activation_checkpointing: .*; set "),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], num_ids: tuple[int, ...], ids_per_batch: int, recompute: bool, message: str
) -> None:
    setup = setup_of(num_ids, recompute=recompute, ids_per_batch=ids_per_batch)
    with pytest.raises(UsageError, match=message):
        check_gates(settings_of(**changes), setup, "MetaBIN")
    check_gates(settings_of(meta="off", **changes), setup, "MetaBIN")


def test_what_is_just_possible_is_not_refused() -> None:
    check_gates(settings_of(), setup_of((4,) * 5, ids_per_batch=6), "MetaBIN")
    check_gates(settings_of(), setup_of((4, 4), ids_per_batch=4), "MetaBIN")
    check_gates(settings_of(train_domains=3), setup_of((4,) * 4, ids_per_batch=8), "MetaBIN")


def test_bounds_of_the_inner_rate_are_in_order() -> None:
    with pytest.raises(UsageError, match=r"metabin_inner_low: 0\.2 is above metabin_inner_high = 0\.1; set "):
        settings_of(inner_low=0.2)


def test_undecayed_are_the_instance_affines_and_trained_gates() -> None:
    network = network_of()
    assert {id(p) for p in undecayed(network)} == {id(p) for n, p in network.named_parameters() if ".instance." in n}
    trained = network_of(trained_gates=True)
    assert len(undecayed(trained)) == len(undecayed(network)) + 2
    with torch.no_grad():
        trained.bn1.gate += 1.0
        trained.bn2.gate -= 1.0
    clamp_gates(trained)
    assert torch.equal(trained.bn1.gate, torch.ones(6))
    assert torch.equal(trained.bn2.gate, torch.zeros(5))
