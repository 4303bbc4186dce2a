"""Where instance normalisation is put into a residual network, against slow oracles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lda.errors import UsageError
from lda.parts.backbones import Backbone, build_backbone
from lda.parts.instance_sites import (
    InstanceSite,
    NormalisedInvertedBlock,
    NormalisedSumBlock,
    SplitNorm2d,
    as_instance_site,
    use_after_stages,
    use_dualnorm,
    use_ibn_a,
    use_ibn_b,
)

PLACEMENTS = {
    "ibn_a": use_ibn_a,
    "ibn_b": use_ibn_b,
    "dualnorm": use_dualnorm,
    "after_stage": use_after_stages,
}
ADDED = {"ibn_a": 0, "ibn_b": 1536, "dualnorm": 3584, "after_stage": 0}  # parameters of ResNet-50
SITES = {"ibn_a": 13, "ibn_b": 3, "dualnorm": 3, "after_stage": 3}
SITES_SMALL = {"ibn_a": 3, "ibn_b": 3, "dualnorm": 3, "after_stage": 3}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 64, 32, generator=torch.Generator().manual_seed(0))


def trained_backbone(name: str = "small") -> Backbone:
    """A plain backbone whose gammas, betas and running statistics are no longer those of the beginning."""
    random = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    backbone = build_backbone(name)
    for norm in norms(backbone):
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5, generator=random)
            norm.bias.uniform_(-0.5, 0.5, generator=random)
            norm.running_mean.uniform_(-1, 1, generator=random)
            norm.running_var.uniform_(0.5, 2, generator=random)
            norm.num_batches_tracked.fill_(17)
    return backbone


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def sites(network: nn.Module) -> list[InstanceSite]:
    return [m for m in network.modules() if isinstance(m, InstanceSite)]


def slow_instance_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """(I), one image and channel at a time."""
    y = torch.empty_like(x)
    for i in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[i, c].double()
            mean = values.sum() / values.numel()
            var = (values - mean).square().sum() / values.numel()
            y[i, c] = (gamma[c] * (values - mean) / (var + 1e-5).sqrt() + beta[c]).to(x.dtype)
    return y


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_sites_and_parameters_of_resnet50(name: str) -> None:
    backbone = build_backbone("resnet50")
    before = count(backbone)
    PLACEMENTS[name](backbone)
    assert count(backbone) - before == ADDED[name]
    assert len(sites(backbone)) == SITES[name]
    assert not sites(backbone.get_submodule("layer4"))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_sites_of_the_small_network(name: str, images: Tensor) -> None:
    """A stage's only block is its last; it is changed once. What it computes is not what the plain one does."""
    plain = trained_backbone()
    backbone = copy.deepcopy(plain)
    PLACEMENTS[name](backbone)
    assert len(sites(backbone)) == SITES_SMALL[name]
    assert backbone.stages == plain.stages
    assert [backbone.stage_channels(stage) for stage in backbone.stages] == [24, 48, 96, 192]
    with torch.no_grad():
        assert backbone(images).shape == (4, 192, 8, 4)
        assert not torch.allclose(backbone.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("network", ["small", "resnet18"])
def test_sites_normalise_every_image_the_same_in_training_and_evaluation(
    name: str, network: str, images: Tensor
) -> None:
    """Mean 0 and variance 1 before gamma and beta, per image and channel; equation (I) by a loop; no mode."""
    backbone = trained_backbone(network)
    PLACEMENTS[name](backbone)
    passed: list[tuple[InstanceSite, Tensor, Tensor]] = []
    hooks = [  # cloned: a ReLU behind it works in place
        site.register_forward_hook(lambda site, x, y: passed.append((site, x[0].clone(), y.clone())))
        for site in sites(backbone)
    ]
    with torch.no_grad():
        backbone(images)
        for hook in hooks:
            hook.remove()
        assert len(passed) == len(sites(backbone)), "a site is passed once"
        for site, x, y in passed:
            gamma = torch.ones(x.shape[1]) if site.weight is None else site.weight
            beta = torch.zeros(x.shape[1]) if site.bias is None else site.bias
            torch.testing.assert_close(y, slow_instance_norm(x, gamma, beta), rtol=1e-3, atol=1e-4)
            normal = (y - beta[:, None, None]) / gamma[:, None, None]
            alive = x.var((2, 3), correction=0) > 0.1
            assert alive.any()
            torch.testing.assert_close(normal.mean((2, 3)), torch.zeros(x.shape[:2]), rtol=0, atol=1e-4)
            spread = normal.var((2, 3), correction=0)[alive]
            torch.testing.assert_close(spread, torch.ones_like(spread), rtol=1e-3, atol=0)
            assert torch.equal(copy.deepcopy(site).eval()(x), y)


def test_ibn_a_sits_at_the_first_norm_of_every_block() -> None:
    backbone = build_backbone("resnet18")
    use_ibn_a(backbone)
    found = [name for name, module in backbone.named_modules() if isinstance(module, SplitNorm2d)]
    assert found == [f"layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in (0, 1)]


@pytest.mark.parametrize(("name", "stages"), [("ibn_b", [1, 2]), ("dualnorm", [1, 2, 3])])
def test_sums_are_normalised_in_the_last_block_of_a_stage(name: str, stages: list[int]) -> None:
    backbone = build_backbone("resnet18")
    PLACEMENTS[name](backbone)
    found = [name for name, module in backbone.named_modules() if isinstance(module, NormalisedSumBlock)]
    assert found == [f"layer{stage}.1" for stage in stages]
    assert isinstance(backbone.get_submodule("bn1"), InstanceSite if name == "ibn_b" else nn.BatchNorm2d)


def test_sites_of_mobilenet() -> None:
    """IBN-a at the first norm of every block; sums of the last blocks, which have a shortcut in stages 1 to 3."""
    backbone = build_backbone("mobilenet_v2")
    use_ibn_a(backbone)
    found = [name for name, module in backbone.named_modules() if isinstance(module, SplitNorm2d)]
    assert found == [f"layer{s}.{n}.conv.0.1" for s, number in ((1, 3), (2, 3), (3, 7)) for n in range(number)]
    for name, stages in {"ibn_b": {1: 2, 2: 2}, "dualnorm": {1: 2, 2: 2, 3: 6}}.items():
        backbone = build_backbone("mobilenet_v2")
        PLACEMENTS[name](backbone)
        sums = [name for name, module in backbone.named_modules() if isinstance(module, NormalisedInvertedBlock)]
        assert sums == [f"layer{stage}.{last}" for stage, last in stages.items()]
        assert isinstance(backbone.get_submodule("bn1"), InstanceSite if name == "ibn_b" else nn.BatchNorm2d)


@pytest.mark.parametrize("block", [0, -1])
def test_inverted_block_with_normalised_sum_is_torchvisions_with_one_layer_more(block: int) -> None:
    """IN of what the plain block gives, with its shortcut or without; no ReLU."""
    torch.manual_seed(0)
    plain = build_backbone("mobilenet_v2").get_submodule("layer2")[block]
    ours = NormalisedInvertedBlock(copy.deepcopy(plain), 32)
    nn.init.uniform_(ours.sum_norm.weight, 0.5, 1.5)
    nn.init.normal_(ours.sum_norm.bias)
    x = torch.randn(3, 24 if block == 0 else 32, 8, 6)
    expected = slow_instance_norm(plain(x), ours.sum_norm.weight, ours.sum_norm.bias)
    torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4)
    assert ours(x).min() < 0


def test_ibn_a_begins_as_slices_of_the_plain_norms() -> None:
    plain = trained_backbone()
    backbone = copy.deepcopy(plain)
    use_ibn_a(backbone)
    for stage in (1, 2, 3):
        old, new = plain.get_submodule(f"layer{stage}.0.bn1"), backbone.get_submodule(f"layer{stage}.0.bn1")
        half = old.num_features // 2
        for key in ("weight", "bias"):
            assert torch.equal(getattr(new.instance, key), getattr(old, key)[:half])
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(new.batch, key), getattr(old, key)[half:])
        assert new.batch.num_batches_tracked == 17
        x = torch.randn(3, old.num_features, 5, 4)
        torch.testing.assert_close(new.eval()(x)[:, half:], old.eval()(x)[:, half:])
    untouched = {key: value for key, value in plain.state_dict().items() if key in backbone.state_dict()}
    assert len(untouched) == len(plain.state_dict()) - 15
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in untouched.items())


@pytest.mark.parametrize("name", ["ibn_b", "dualnorm"])
def test_new_sites_begin_as_one_and_zero_and_the_rest_is_kept(name: str) -> None:
    plain = trained_backbone()
    backbone = copy.deepcopy(plain)
    PLACEMENTS[name](backbone)
    before, after = plain.state_dict(), backbone.state_dict()
    gone = (
        {f"bn1.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")} if name == "ibn_b" else set()
    )
    assert before.keys() - after.keys() == gone
    for key, value in after.items():
        if ".sum_norm." in key:
            assert torch.equal(value, torch.full_like(value, float(key.endswith("weight")))), key
        else:
            assert torch.equal(value, before[key]), key  # the stem's gamma and beta go over


def test_share_of_nothing_is_the_plain_network_and_of_everything_is_instance_norm(images: Tensor) -> None:
    plain = trained_backbone()
    nothing, everything, by_hand = (copy.deepcopy(plain) for _ in range(3))
    use_ibn_a(nothing, 0.0)
    use_ibn_a(everything, 1.0)
    for stage in (1, 2, 3):
        block = by_hand.get_submodule(f"layer{stage}.0")
        norm = block.bn1
        block.bn1 = nn.InstanceNorm2d(norm.num_features, affine=True)
        block.bn1.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    assert torch.equal(nothing(images), plain(images))
    assert torch.equal(everything(images), by_hand(images))
    assert count(nothing) == count(everything) == count(plain)


def test_an_odd_number_of_channels_loses_none() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    nn.init.uniform_(norm.weight)
    x = torch.randn(4, 5, 6, 3)
    y = SplitNorm2d(norm, 2)(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[:, :2], slow_instance_norm(x[:, :2], norm.weight[:2], norm.bias[:2]))
    torch.testing.assert_close(y[:, 2:], norm(x)[:, 2:])


def test_instance_channels_do_not_see_a_change_of_contrast_and_brightness() -> None:
    """Of the IN part only, and only per image and channel; the BN part does."""
    torch.manual_seed(0)
    split = SplitNorm2d(nn.BatchNorm2d(8), 4)
    x = torch.randn(4, 8, 16, 8)
    changed = x * (0.5 + 2 * torch.rand(4, 8, 1, 1)) + torch.randn(4, 8, 1, 1)
    torch.testing.assert_close(split(changed)[:, :4], split(x)[:, :4], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(split(changed)[:, 4:], split(x)[:, 4:], atol=0.1)


def residual_sum(block: nn.Module, x: Tensor) -> Tensor:
    """What a plain block adds, as its last norm and its shortcut give it."""
    parts: list[Tensor] = []
    for layer in (norms(block)[-1 if block.downsample is None else -2], block.downsample):
        if layer is not None:
            layer.register_forward_hook(lambda m, i, y: parts.append(y.clone()))
    block(x)
    return parts[0] + (parts[1] if len(parts) > 1 else x)


@pytest.mark.parametrize("network", ["small", "resnet18", "resnet50"])
def test_block_with_normalised_sum_is_torchvisions_with_one_layer_more(network: str, images: Tensor) -> None:
    """relu(IN(sum)), with the sum made of what the plain block's last norm and its shortcut gave; and without the
    layer it is the plain block, to the bit."""
    torch.manual_seed(0)
    for block in (build_backbone(network).get_submodule("layer2")[i] for i in (0, -1)):
        channels = norms(block)[2 if network == "resnet50" else 1].num_features
        ours = NormalisedSumBlock(copy.deepcopy(block), channels)
        nn.init.uniform_(ours.sum_norm.weight, 0.5, 1.5)
        nn.init.normal_(ours.sum_norm.bias)
        x = torch.randn(3, block.conv1.in_channels, 8, 6)
        total, plain = residual_sum(block, x), block(x)
        expected = slow_instance_norm(total, ours.sum_norm.weight, ours.sum_norm.bias).relu()
        torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4)
        ours.sum_norm = nn.Identity()  # type: ignore[assignment]
        assert torch.equal(ours(x), plain)


def test_after_stages_is_instance_norm_behind_the_relu(images: Tensor) -> None:
    """BAU's backbone: the plain parts in order with a plain IN between; nothing to load."""
    plain = trained_backbone()
    backbone = copy.deepcopy(plain)
    use_after_stages(backbone)
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    x = plain.relu(plain.bn1(plain.conv1(images)))
    for stage in (plain.layer1, plain.layer2, plain.layer3):
        x = stage(x)
        assert x.min() == 0
        x = slow_instance_norm(x, torch.ones(x.shape[1]), torch.zeros(x.shape[1]))
    torch.testing.assert_close(backbone(images), plain.layer4(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_recomputation_changes_nothing(name: str, images: Tensor) -> None:
    gradients, buffers = [], []
    for recompute in (False, True):
        backbone = trained_backbone()
        PLACEMENTS[name](backbone)
        backbone.recompute = recompute
        backbone(images).square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters()])
        buffers.append(list(backbone.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_map_of_one_place_is_refused(name: str, training: bool) -> None:
    """Instance normalisation would make it beta for every image."""
    backbone = build_backbone("resnet18").train(training)
    PLACEMENTS[name](backbone)
    with pytest.raises(UsageError, match=r"image_height, image_width: .* a map of 1 x 1"):
        backbone(torch.randn(2, 3, 4, 4))


def test_a_site_made_of_a_batch_norm_has_its_gamma_and_beta() -> None:
    norm = trained_backbone().get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    x = torch.randn(2, norm.num_features, 4, 3)
    torch.testing.assert_close(as_instance_site(norm)(x), slow_instance_norm(x, norm.weight, norm.bias))
