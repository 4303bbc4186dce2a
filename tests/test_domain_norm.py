"""Batch normalisation with a set per domain: the row-wise route against passes of one domain each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lda.errors import UsageError
from lda.parts.backbones import Backbone, build_backbone
from lda.parts.domain_norm import (
    DomainBatchNorm2d,
    DomainRoute,
    MeanSet,
    OneSet,
    RowWise,
    site_distances,
    use_domain_norm,
)
from lda.parts.routes import Switch, statistics_held

MIXED = torch.tensor([2, 0, 0, 2, 1, 2, 0, 1, 2])


def images(count: int, seed: int = 0, size: tuple[int, int] = (32, 16)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def layer_of(num_domains: int, shared_affine: bool = False) -> tuple[DomainBatchNorm2d, Switch[DomainRoute]]:
    """A layer whose sets all differ."""
    switch: Switch[DomainRoute] = Switch()
    like = nn.BatchNorm2d(5)
    with torch.no_grad():
        for values in (like.weight, like.bias, like.running_mean):
            values.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
    layer = DomainBatchNorm2d(like, num_domains, switch, shared_affine)
    with torch.no_grad():
        for domain in range(1, num_domains):
            norm = layer.norm(domain)
            norm.running_mean.add_(0.3 * domain)
            norm.running_var.mul_(1 + domain)
            if not shared_affine:
                norm.weight.mul_(1 + domain)
                norm.bias.sub_(domain)
    return layer, switch


def network_of(num_domains: int = 3, recompute: bool = False) -> tuple[Backbone, Switch[DomainRoute]]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        backbone = build_backbone("small", recompute=recompute)
    return backbone, use_domain_norm(backbone, num_domains)


@pytest.mark.parametrize("training", [True, False])
def test_one_domain_is_batch_normalisation(training: bool) -> None:
    layer, switch = layer_of(1)
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(layer.norm(0).state_dict())
    layer.train(training)
    plain.train(training)
    x = torch.randn(6, 5, 4, 3)
    for route in (OneSet(0), RowWise(torch.zeros(6, dtype=torch.long))):
        with switch.on(route):
            assert torch.equal(layer(x), plain(x))
        assert torch.equal(layer.norm(0).running_var, plain.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared_affine", [True, False])
def test_mixed_rows_equal_passes_of_one_domain_each(training: bool, shared_affine: bool) -> None:
    mixed, mixed_switch = layer_of(3, shared_affine)
    pure, pure_switch = layer_of(3, shared_affine)
    mixed.train(training)
    pure.train(training)
    x = torch.randn(len(MIXED), 5, 4, 3)
    slope = torch.randn(len(MIXED), 5, 4, 3)
    x_mixed, x_pure = x.clone().requires_grad_(), x.clone().requires_grad_()
    with mixed_switch.on(RowWise(MIXED)):
        y = mixed(x_mixed)
    (y * slope).sum().backward()
    for domain in range(3):
        with pure_switch.on(OneSet(domain)):
            alone = pure(x_pure[domain == MIXED])
        assert torch.equal(alone, y[domain == MIXED])
        (alone * slope[domain == MIXED]).sum().backward()
    torch.testing.assert_close(x_mixed.grad, x_pure.grad, rtol=1e-6, atol=1e-6)
    for (name, one), (_, other) in zip(mixed.named_parameters(), pure.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for key, value in mixed.state_dict().items():
        assert torch.equal(value, pure.state_dict()[key]), key


def test_mixed_pass_of_a_network_equals_passes_of_one_domain_each() -> None:
    (mixed, mixed_switch), (pure, pure_switch) = network_of(), network_of()
    x = images(len(MIXED))
    with mixed_switch.on(RowWise(MIXED)):
        maps = mixed(x)
    maps.square().sum().backward()
    for domain in range(3):
        with pure_switch.on(OneSet(domain)):
            alone = pure(x[domain == MIXED])
        torch.testing.assert_close(alone, maps[domain == MIXED], rtol=1e-5, atol=1e-6)
        alone.square().sum().backward()
    for (name, one), (_, other) in zip(mixed.named_parameters(), pure.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3, msg=name)
    for key, value in mixed.state_dict().items():
        torch.testing.assert_close(value, pure.state_dict()[key], rtol=1e-5, atol=1e-6, msg=key)


def test_foreign_sets_keep_weights_statistics_and_moments_to_the_bit() -> None:
    network, switch = network_of()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, weight_decay=0.1)

    def step(domains: Tensor, seed: int) -> None:
        with switch.on(RowWise(domains)):
            loss = network(images(len(domains), seed)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def foreign() -> dict[str, Tensor]:
        found = {key: value.clone() for key, value in network.state_dict().items() if ".sets.1." in key}
        for name, parameter in network.named_parameters():
            if ".sets.1." in name:
                moments = optimizer.state[parameter]
                found |= {f"{name}/{key}": value.clone() for key, value in moments.items()}
        return found

    step(MIXED, 0)
    before, whole = foreign(), copy.deepcopy(network.state_dict())
    step(torch.tensor([0, 2, 2, 0]), 1)
    assert [key for key, value in foreign().items() if not torch.equal(value, before[key])] == []
    assert len(before) > 12 * 5
    for own in (".sets.0.", ".sets.2."):
        moved = [
            key for key, value in network.state_dict().items() if own in key and not torch.equal(value, whole[key])
        ]
        assert len(moved) == 12 * 5, own  # weight, bias, mean, variance and count of every layer


def test_held_statistics_stay_and_the_output_is_the_same() -> None:
    (held, held_switch), (free, free_switch) = network_of(), network_of()
    before = copy.deepcopy(held.state_dict())
    x = images(len(MIXED))
    with held_switch.on(RowWise(MIXED)), statistics_held(held):
        y = held(x)
    with free_switch.on(RowWise(MIXED)):
        assert torch.equal(y, free(x))
    for key, value in held.state_dict().items():
        assert torch.equal(value, before[key]), key
    with held_switch.on(RowWise(MIXED)):
        held(x)
    for key, value in held.state_dict().items():
        assert torch.equal(value, free.state_dict()[key]), key


def test_recomputation_takes_the_same_rows_and_counts_once() -> None:
    results = []
    for recompute in (False, True):
        network, switch = network_of(recompute=recompute)
        with switch.on(RowWise(MIXED)):
            loss = network(images(len(MIXED))).square().mean()
        with switch.on(OneSet(1)):  # where the switch stands in the backward pass
            loss.backward()
        results.append((network.state_dict(), [p.grad for p in network.parameters()]))
    (plain, plain_grads), (again, again_grads) = results
    assert [key for key in plain if not torch.equal(plain[key], again[key])] == []
    for one, other in zip(plain_grads, again_grads, strict=True):
        assert torch.equal(one, other)


def test_shared_affine_is_one_parameter() -> None:
    layer, _ = layer_of(3, shared_affine=True)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 5
    layer, _ = layer_of(3)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 2 * 5
    copied = copy.deepcopy(layer_of(2, shared_affine=True)[0])
    assert copied.norm(0).weight is copied.norm(1).weight


def test_average_of_sets() -> None:
    layer, switch = layer_of(3)
    layer.eval()
    x = torch.randn(2, 5, 4, 3)
    norms = [layer.norm(k) for k in range(3)]
    mean, var = (sum(getattr(n, key) for n in norms) / 3 for key in ("running_mean", "running_var"))
    weight, bias = (sum(getattr(n, key) for n in norms) / 3 for key in ("weight", "bias"))
    expected = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * weight[:, None, None]
    with switch.on(MeanSet()):
        torch.testing.assert_close(layer(x), expected + bias[:, None, None])
        layer.train()
        with pytest.raises(RuntimeError, match="evaluation only"):
            layer(x)


def test_distances_equal_a_loop_and_are_zero_at_the_sets_own_statistics() -> None:
    layer, switch = layer_of(2)
    layer.eval()
    x = torch.randn(3, 5, 4, 3)
    norm = layer.norm(1)
    with torch.no_grad():  # image 2 has exactly the statistics of set 1
        var, mean = torch.var_mean(x[2], dim=(1, 2), keepdim=True)
        x[2] = (x[2] - mean) / var.sqrt() * norm.running_var.sqrt()[:, None, None] + norm.running_mean[:, None, None]
    with switch.on(OneSet(1)), site_distances(layer) as found:
        layer(x)
    expected = []
    for image in x:
        total = 0.0
        for c in range(5):
            total += float(image[c].mean() - norm.running_mean[c]) ** 2
            total += float(image[c].var().sqrt() - norm.running_var[c].sqrt()) ** 2
        expected.append((total / 5) ** 0.5)
    assert len(found) == 1
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert found[0][2] < 1e-6 < found[0][0]
    with switch.on(OneSet(0)):
        layer(x)
    assert len(found) == 1, "the watch ends with its block"
    with (
        switch.on(RowWise(torch.tensor([0, 0, 1]))),
        site_distances(layer),
        pytest.raises(RuntimeError, match="OneSet"),
    ):
        layer(x)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_in_training_write_nothing(training: bool) -> None:
    layer, switch = layer_of(3)
    layer.train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(1))
    plain = nn.BatchNorm2d(5).eval()
    plain.load_state_dict(layer.norm(1).state_dict())
    with switch.on(OneSet(1, running=True)):
        assert torch.equal(layer(x), plain(x))
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    assert [key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])] == []
    if training:
        with switch.on(OneSet(1)):
            assert not torch.allclose(layer(x), plain(x), atol=1e-2)


def test_a_set_beside_the_domains() -> None:
    """Set K is there where it is asked for, begins as the others, is chosen like them and is no part of the average."""
    backbone = build_backbone("small")
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        backbone.get_submodule("layer1.0.bn1").running_mean.add_(0.5)
    parts = [backbone.get_submodule("bn1"), backbone.get_submodule("layer1.0")]
    switch = use_domain_norm(backbone, 2, one_beside=parts)
    layers = {name: backbone.get_submodule(name) for name in names}
    beside = {name for name, layer in layers.items() if len(layer.sets) == 3}
    assert beside == {"bn1", "layer1.0.bn1", "layer1.0.bn2"}
    assert all(len(layer.sets) == 2 for name, layer in layers.items() if name not in beside)
    layer = layers["layer1.0.bn1"]
    assert layer.num_domains == 2
    assert all(torch.equal(norm.running_mean, torch.full((24,), 0.5)) for norm in layer.sets)

    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 24, 3, 3, generator=torch.Generator().manual_seed(2))
    with switch.on(OneSet(2)):
        layer(x)
    moved = {key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"sets.2.running_mean", "sets.2.running_var", "sets.2.num_batches_tracked"}
    layer.eval()
    with switch.on(MeanSet()):
        mean = layer(x)
        layer.norm(2).running_mean.add_(5)
        assert torch.equal(layer(x), mean)


def test_raw_distances_are_not_over_the_channels() -> None:
    layer, switch = layer_of(2)
    x = torch.randn(3, 5, 4, 3, generator=torch.Generator().manual_seed(4))
    norm = layer.norm(1)
    with torch.no_grad():  # image 0 has exactly the statistics of set 1
        var, mean = torch.var_mean(x[0], dim=(1, 2), keepdim=True)
        x[0] = (x[0] - mean) / var.sqrt() * norm.running_var.sqrt()[:, None, None] + norm.running_mean[:, None, None]
    with switch.on(OneSet(1, running=True)), site_distances(layer, raw=True) as raw, site_distances(layer) as scaled:
        layer(x)
    for image, found in zip(x[1:], raw[0][1:], strict=True):
        gaps = [float(image[c].mean() - norm.running_mean[c]) ** 2 for c in range(5)]
        gaps += [float(image[c].std() - norm.running_var[c].sqrt()) ** 2 for c in range(5)]
        assert float(found) == pytest.approx(sum(gaps) ** 0.5, rel=1e-5)
    torch.testing.assert_close(raw[0], scaled[0] * 5**0.5)
    assert raw[0][0] < 1e-5 < raw[0][1]
    assert not raw[0].requires_grad


def test_distances_need_a_map() -> None:
    layer, switch = layer_of(2)
    layer.eval()
    with switch.on(OneSet(0)), site_distances(layer), pytest.raises(UsageError, match=r"image_height.* 1 x 1"):
        layer(torch.randn(2, 5, 1, 1))
    with switch.on(OneSet(0)):
        layer(torch.randn(2, 5, 1, 1))  # the watch ended, by an error too
    with switch.on(OneSet(0)), site_distances(layer) as found:
        layer(torch.randn(2, 5, 2, 1))
    assert found[0].isfinite().all()
