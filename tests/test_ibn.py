"""IBN-Net: the baseline's step on another network. Its sites are tested in tests/test_instance_sites.py."""

from __future__ import annotations

import pytest
import torch
from mixed_batches import build, gradients, mixed_batch
from torch import nn

from lda.errors import UsageError
from lda.methods.ibn import IBN
from lda.parts.instance_sites import InstanceSite, NormalisedSumBlock, SplitNorm2d


def test_share_zero_is_the_baseline_to_the_bit() -> None:
    """Same weights from the seed, same losses, gradients, running statistics and features."""
    ours, baseline = build("ibn", ibn_ratio=0.0), build("baseline")
    data = mixed_batch()
    losses, expected = ours.training_losses(data, 0), baseline.training_losses(data, 0)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[key], expected[key]) for key in losses)
    for method, total in ((ours, losses), (baseline, expected)):
        total["loss/total"].backward()
        method.eval()
    assert ours.state_dict().keys() == baseline.state_dict().keys()
    assert all(torch.equal(value, baseline.state_dict()[key]) for key, value in ours.state_dict().items())
    assert all(torch.equal(value, gradients(baseline)[key]) for key, value in gradients(ours).items())
    assert torch.equal(ours(data.images), baseline(data.images))


def kinds(method: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in method.named_modules() if isinstance(module, kind)]


def test_kind_and_share_choose_the_network() -> None:
    a, b = build("ibn"), build("ibn", ibn_kind="b")
    assert isinstance(a, IBN)
    assert (a.label, b.label) == ("IBN-a", "IBN-b")
    assert kinds(a, SplitNorm2d) == [f"backbone.layer{stage}.0.bn1" for stage in (1, 2, 3)]
    assert kinds(b, NormalisedSumBlock) == [f"backbone.layer{stage}.0" for stage in (1, 2)]
    assert "backbone.bn1" in kinds(b, InstanceSite)
    quarter = build("ibn", ibn_ratio=0.25)
    assert [s.instance_channels for s in quarter.modules() if isinstance(s, SplitNorm2d)] == [6, 12, 24]
    parameters = [sum(p.numel() for p in m.parameters()) for m in (build("baseline"), a, b)]
    assert parameters[1] == parameters[0]
    assert parameters[2] == parameters[0] + 2 * (24 + 48)


@pytest.mark.parametrize("changes", [{}, {"ibn_ratio": 0.3}, {"ibn_ratio": 1.0}, {"ibn_kind": "b"}], ids=str)
def test_another_network_gives_another_loss(changes: dict[str, object]) -> None:
    data = mixed_batch()
    plain = build("baseline").training_losses(data, 0)["loss/total"]
    assert not torch.isclose(build("ibn", **changes).training_losses(data, 0)["loss/total"], plain, rtol=1e-4)


def test_too_small_images_are_one_clear_line() -> None:
    method = build("ibn")
    data = mixed_batch()
    small = data._replace(images=data.images[:, :, :4, :2])
    with pytest.raises(UsageError, match="image_height, image_width"):
        method.training_losses(small, 0)
