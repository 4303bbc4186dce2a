"""DualNorm: the baseline's step on another network, tested behind the neck. Its sites: tests/test_instance_sites.py."""

from __future__ import annotations

import torch
from mixed_batches import build, gradients, mixed_batch, shaken
from torch import nn

from lda.methods.dualnorm import DualNorm
from lda.parts.heads import gem
from lda.parts.instance_sites import InstanceSite, NormalisedSumBlock


def dualnorm() -> DualNorm:
    method = build("dualnorm")
    assert isinstance(method, DualNorm)
    return method


def test_without_its_layers_training_is_the_baseline_to_the_bit() -> None:
    ours, baseline = dualnorm(), build("baseline")
    data = mixed_batch()
    assert not torch.equal(dualnorm().training_losses(data, 0)["loss/total"], _total(baseline))
    for block in ours.modules():
        if isinstance(block, NormalisedSumBlock):
            block.sum_norm = nn.Identity()  # type: ignore[assignment]
    baseline = build("baseline")
    losses, expected = ours.training_losses(data, 0), baseline.training_losses(data, 0)
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    losses["loss/total"].backward()
    expected["loss/total"].backward()
    assert all(torch.equal(value, gradients(baseline)[key]) for key, value in gradients(ours).items())


def _total(method: nn.Module) -> torch.Tensor:
    return method.training_losses(mixed_batch(), 0)["loss/total"]


def test_three_stages_are_normalised_and_the_stem_is_not() -> None:
    found = [name for name, module in dualnorm().named_modules() if isinstance(module, InstanceSite)]
    assert found == [f"backbone.layer{stage}.0.sum_norm" for stage in (1, 2, 3)]


def test_feature_is_behind_the_neck_by_hand() -> None:
    """f = gamma (e - M) / sqrt(V + eps) with the neck's running statistics, no shift, then L2."""
    method = shaken(dualnorm())
    for seed in range(3):
        _ = method.training_losses(mixed_batch(seed), 0)
    method.eval()
    images = mixed_batch(5).images
    neck = method.head.necks[0]
    assert torch.equal(neck.bias, torch.zeros_like(neck.bias))
    assert not neck.bias.requires_grad
    with torch.no_grad():
        e = gem(method.backbone(images), 3.0)
        f = neck.weight * (e - neck.running_mean) / (neck.running_var + neck.eps).sqrt()
        encoded = method(images)
    torch.testing.assert_close(encoded, f / f.norm(dim=1, keepdim=True))
    before = e / e.norm(dim=1, keepdim=True)
    assert not torch.allclose(encoded, before, atol=1e-2)
