"""Backbones, their conversion, pooling and heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenet_v2, resnet18

from lda.methods.baseline import use_instance_norm
from lda.parts.anti_norm import (
    AntiNormalised,
    BufferBankNorm2d,
    Expert,
    Route,
    UnseenExpert,
    add_buffer_banks,
    named_banks,
)
from lda.parts.backbones import Backbone, build_backbone, forward_shares
from lda.parts.given import Row
from lda.parts.heads import Head, gem
from lda.parts.routes import Switch


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 64, 32, generator=torch.Generator().manual_seed(0))


def converted(name: str = "small", recompute: bool = False) -> tuple[Backbone, Switch[Route]]:
    torch.manual_seed(0)
    backbone = build_backbone(name, recompute=recompute)
    return backbone, add_buffer_banks(backbone, num_domains=3, momentum=0.9)


def test_shares_of_the_forward_pass_are_those_of_torchs_counter() -> None:
    backbone = build_backbone("resnet18")
    shares = forward_shares(backbone)
    assert list(shares) == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    assert sum(shares.values()) == pytest.approx(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, 256, 128))
    counted = {key.removeprefix("Backbone."): sum(value.values()) for key, value in counter.flop_counts.items()}
    for part, share in shares.items():
        own = sum(number for name, number in counted.items() if name.split(".")[0] == part and name.count(".") < 2)
        assert share == pytest.approx(own / counted["Global"]), part


@pytest.mark.parametrize(
    ("name", "shape", "sites"),
    [
        ("small", (192, 8, 4), 12),
        ("resnet18", (512, 4, 2), 20),
        ("resnet50", (2048, 4, 2), 53),
        ("mobilenet_v2", (1280, 4, 2), 52),
    ],
)
def test_map_shape_and_conversion(name: str, shape: tuple[int, ...], sites: int, images: Tensor) -> None:
    """Last stride 1 keeps twice the map; every one of ResNet-50's 53 layers gets a bank; no parameter is added."""
    plain = build_backbone(name)
    with torch.inference_mode():
        assert plain.eval()(images[:1]).shape == (1, *shape)
    parameters = sum(p.numel() for p in plain.parameters())
    names = [n for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    add_buffer_banks(plain, num_domains=3, momentum=0.9)
    assert [n for n, _ in named_banks(plain)] == names
    assert len(names) == sites
    assert sum(p.numel() for p in plain.parameters()) == parameters
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())


def test_resnet18_is_torchvisions(images: Tensor) -> None:
    """Same weights, same map, up to the last stage whose stride differs."""
    torch.manual_seed(3)
    reference = resnet18().eval()
    torch.manual_seed(3)
    ours = build_backbone("resnet18").eval()
    reference.layer4[0].conv1.stride = reference.layer4[0].downsample[0].stride = (1, 1)
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
    for stage in (reference.layer1, reference.layer2, reference.layer3, reference.layer4):
        x = stage(x)
    torch.testing.assert_close(ours(images), x)


def test_mobilenet_is_torchvisions(images: Tensor) -> None:
    """Same weights, same map, up to the last stride; in training too, whose statistics every layer enters once."""
    torch.manual_seed(3)
    reference = mobilenet_v2().features
    torch.manual_seed(3)
    ours = build_backbone("mobilenet_v2")
    reference[14].conv[1][0].stride = (1, 1)
    assert torch.equal(ours(images), reference(images))
    for (name, one), other in zip(ours.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(ours.eval()(images), reference.eval()(images))


def test_stages_of_mobilenet_end_at_a_resnets_strides(images: Tensor) -> None:
    """4, 8, 16 and 16; the map is the last stage's output, rectified, and nothing lies behind."""
    sizes = {}
    for network in ("resnet18", "mobilenet_v2"):
        backbone = build_backbone(network).eval()
        x = images
        for name, step in backbone.steps():
            x = step(x)
            sizes[network, name.partition(".")[0]] = tuple(x.shape[2:])
    for network in ("resnet18", "mobilenet_v2"):
        assert [sizes[network, stage] for stage in backbone.stages] == [(16, 8), (8, 4), (4, 2), (4, 2)]
    assert [backbone.stage_channels(stage) for stage in backbone.stages] == [24, 32, 96, 1280]
    assert backbone(images).min() >= 0
    names = [name for name, _ in backbone.steps()]
    blocks = [f"layer{stage}.{n}" for stage, number in enumerate((3, 3, 7, 5), start=1) for n in range(number)]
    assert names == ["conv1", "bn1", "relu", *blocks]
    shares = forward_shares(backbone)
    assert list(shares) == ["conv1", *backbone.stages]
    assert sum(shares.values()) == pytest.approx(1)
    backbone.cut_after("layer3")
    assert backbone(images).shape[1] == backbone.channels == 96


def test_conversion_keeps_the_function_of_one_domain(images: Tensor) -> None:
    """A converted network whose bank holds BatchNorm's statistics computes what the plain one does."""
    torch.manual_seed(0)
    plain = build_backbone("small")
    for _ in range(3):
        plain(images)
    ours = copy.deepcopy(plain)
    switch = add_buffer_banks(ours, num_domains=1, momentum=0.9)
    for name, bank in named_banks(ours):
        old = plain.get_submodule(name)
        bank.mean[0].copy_(old.running_mean)
        bank.var[0].copy_(old.running_var)
    with switch.on(UnseenExpert()):
        torch.testing.assert_close(ours.eval()(images), plain.eval()(images))


def test_keep_first_leaves_the_stem(images: Tensor) -> None:
    backbone = build_backbone("small")
    add_buffer_banks(backbone, num_domains=2, momentum=0.9, sites="no_stem")
    assert isinstance(backbone.get_submodule("bn1"), nn.BatchNorm2d)
    assert len(list(named_banks(backbone))) == 11


def test_instance_norm_network_ignores_the_batch(images: Tensor) -> None:
    backbone = build_backbone("small")
    use_instance_norm(backbone)
    torch.testing.assert_close(backbone(images)[:1], backbone(images[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", [Expert(1), AntiNormalised(Row(2))])
def test_recomputation_changes_nothing(route: object, images: Tensor) -> None:
    """Same gradients and banks with activation checkpointing: the second computation must not update twice."""
    grads, banks = [], []
    for recompute in (False, True):
        backbone, switch = converted(recompute=recompute)
        for _ in range(2):
            with switch.on(route):
                y = backbone(images)
            with switch.on(UnseenExpert()):  # the switch stands elsewhere when the backward pass recomputes
                y.square().mean().backward()
        # gamma and beta take no part in Network-A
        grads.append([torch.zeros(1) if p.grad is None else p.grad for p in backbone.parameters()])
        banks.append(copy.deepcopy(dict(named_banks(backbone))))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    for name in banks[0]:
        assert banks[0][name].counts == banks[1][name].counts
        assert torch.equal(banks[0][name].mean, banks[1][name].mean)


@pytest.mark.parametrize(("name", "layer"), [("small", "layer2.0.bn1"), ("mobilenet_v2", "layer2.0.conv.1.1")])
def test_recomputation_of_plain_batch_norm_updates_once(name: str, layer: str, images: Tensor) -> None:
    running = []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone(name, recompute=recompute)
        backbone(images).sum().backward()
        norm = backbone.get_submodule(layer)
        running.append((norm.running_mean, norm.num_batches_tracked))
    assert torch.equal(running[0][0], running[1][0])
    assert running[0][1] == running[1][1] == 1


def test_a_module_after_a_stage_sees_its_output(images: Tensor) -> None:
    """Stages have names; what is put after one changes nothing else, and is not recomputed."""
    torch.manual_seed(0)
    backbone = build_backbone("small")
    plain = copy.deepcopy(backbone)
    assert backbone.stages == ["layer1", "layer2", "layer3", "layer4"]
    assert [backbone.stage_channels(stage) for stage in backbone.stages] == [24, 48, 96, 192]
    seen = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    backbone.insert_after("layer2", "watch", Watch())
    assert torch.equal(backbone(images), plain(images))
    assert [x.shape[1] for x in seen] == [48]


def test_gem_equals_loop() -> None:
    maps = torch.rand(2, 3, 4, 5)
    for n in range(2):
        for c in range(3):
            values = maps[n, c].flatten().tolist()
            expected = (sum(v**3 for v in values) / len(values)) ** (1 / 3)
            assert float(gem(maps, 3.0)[n, c]) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gem(maps, 1.0), maps.mean((2, 3)))


def test_gem_of_a_dead_map_has_finite_gradient() -> None:
    maps = torch.zeros(1, 2, 3, 3, requires_grad=True)
    gem(maps, 3.0).sum().backward()
    assert torch.isfinite(maps.grad).all()


def test_head_has_one_neck_and_classifier_per_group() -> None:
    head = Head(8, [3, 5])
    features = torch.randn(6, 8)
    assert head(features, 0).shape == (6, 3)
    assert head(features, 1).shape == (6, 5)
    before = head.necks[1].running_mean.clone()
    head(features + 1, 0)
    assert torch.equal(head.necks[1].running_mean, before)
    assert not any(neck.bias.requires_grad for neck in head.necks)


def test_layers_share_one_switch() -> None:
    backbone, switch = converted()
    layers = [m for m in backbone.modules() if isinstance(m, BufferBankNorm2d)]
    assert {id(layer.switch) for layer in layers} == {id(switch)}


def test_steps_are_blocks_and_single_parts_in_the_order_of_a_pass() -> None:
    assert [name for name, _ in build_backbone("small").steps()] == [
        "conv1", "bn1", "relu", "layer1.0", "layer2.0", "layer3.0", "layer4.0"
    ]  # fmt: skip
    deeper = build_backbone("resnet18")
    names = [name for name, _ in deeper.steps()]
    assert names == ["conv1", "bn1", "relu", "maxpool"] + [f"layer{i}.{n}" for i in range(1, 5) for n in range(2)]
    assert all(step is deeper.get_submodule(name) for name, step in deeper.steps())
    deeper.insert_after("layer2", "watch", nn.Identity())
    assert [name for name, _ in deeper.steps()][7:10] == ["layer2.1", "watch", "layer3.0"]
    deeper.cut_after("layer2")
    assert [name for name, _ in deeper.steps()][-1] == "layer2.1"


@pytest.mark.parametrize("recompute", [False, True])
def test_a_walk_over_all_steps_in_parts_is_a_pass(recompute: bool, images: Tensor) -> None:
    """Outputs, gradients and running statistics; every block is recomputed once where the network says so, and what
    is no block never is."""
    torch.manual_seed(0)
    whole = build_backbone("small", recompute=recompute)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    parts = copy.deepcopy(whole)
    calls: dict[str, int] = {}
    for name, step in parts.steps():
        step.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    steps = parts.steps()
    y = parts.walk(parts.walk(images, steps[:5]), iter(steps[5:]))
    expected = whole(images)
    assert torch.equal(y, expected)
    y.square().mean().backward()
    expected.square().mean().backward()
    assert calls == {name: 1 + (recompute and name.startswith("layer")) for name, _ in steps}
    for (name, one), (_, other) in zip(parts.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    for key, value in parts.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key
    assert torch.equal(parts.eval().walk(images, steps), whole.eval()(images))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_walk_may_go_through_copies(recompute: bool) -> None:
    """Nothing but the given step is run, whatever the backbone holds under its name."""
    backbone = build_backbone("small", recompute=recompute)
    own = copy.deepcopy(backbone.get_submodule("layer4.0"))
    with torch.no_grad():
        own.conv1.weight.mul_(-1)
    x = torch.rand(4, 96, 4, 2, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(backbone.state_dict())
    y = backbone.walk(x, [("layer4.0", own)])
    y.sum().backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert own.conv1.weight.grad is not None
    assert own.bn1.num_batches_tracked == 1, "the second computation writes nothing"
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not torch.allclose(y, backbone.get_submodule("layer4.0")(x), atol=1e-2)
