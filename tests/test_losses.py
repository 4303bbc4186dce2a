"""Identity and batch-hard triplet loss against slow loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lda.parts import losses


def test_identity_loss_equals_loop() -> None:
    logits, labels, smoothing = torch.randn(4, 5), torch.tensor([0, 3, 1, 4]), 0.1
    total = 0.0
    for n in range(4):
        log_share = torch.log_softmax(logits[n], 0).tolist()
        for c in range(5):
            target = (1 - smoothing) * (c == int(labels[n])) + smoothing / 5
            total -= target * log_share[c]
    assert float(losses.identity_loss(logits, labels, smoothing)) == pytest.approx(total / 4, rel=1e-5)


def test_triplet_equals_loop() -> None:
    features = torch.randn(12, 8, generator=torch.Generator().manual_seed(7))
    labels = torch.tensor([0, 1, 2, 3]).repeat(3)
    total = 0.0
    for a in range(12):
        gaps = [float((features[a] - features[b]).norm()) for b in range(12)]
        positive = max(gaps[b] for b in range(12) if labels[b] == labels[a] and b != a)
        negative = min(gaps[b] for b in range(12) if labels[b] != labels[a])
        total += max(0.0, positive - negative + 0.3)
    assert float(losses.batch_hard_triplet_loss(features, labels, 0.3)) == pytest.approx(total / 12, rel=1e-4)


def test_triplet_of_identical_features_is_the_margin_with_finite_gradient() -> None:
    features = torch.ones(4, 3, requires_grad=True)
    loss = losses.batch_hard_triplet_loss(features, torch.tensor([0, 0, 1, 1]), 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.3, abs=1e-5)
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 0, 1, 2]])
def test_triplet_rejects_batches_without_triplets(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="two images of every identity"):
        losses.batch_hard_triplet_loss(torch.randn(4, 3), torch.tensor(labels), 0.3)


def test_distances_equal_loop_and_are_of_full_precision_inside_autocast() -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(5, 32, generator=random)
    b = torch.cat([torch.randn(3, 32, generator=random), a[:1] + 1e-2])
    found = losses.squared_distances(a, b)
    for i in range(5):
        for j in range(4):
            assert float(found[i, j]) == pytest.approx(float((a[i] - b[j]).square().sum()), rel=1e-4, abs=1e-5)
    labels = torch.tensor([0, 0, 1, 1, 1])
    triplet = losses.batch_hard_triplet_loss(a, labels, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.squared_distances(a, b), found)
        assert torch.equal(losses.batch_hard_triplet_loss(a, labels, 0.3), triplet)


def _slow_hardest(features: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """Hardest positive and negative of every anchor by loops; without a negative infinite."""
    positive, negative = [], []
    for a in range(len(labels)):
        gaps = [float((features[a] - features[b]).norm()) for b in range(len(labels))]
        positive.append(max(gaps[b] for b in range(len(labels)) if labels[b] == labels[a] and b != a))
        negative.append(min((gaps[b] for b in range(len(labels)) if labels[b] != labels[a]), default=float("inf")))
    return positive, negative


def test_hardest_distances_equal_loop() -> None:
    features = torch.randn(12, 8, generator=torch.Generator().manual_seed(7))
    labels = torch.tensor([0, 1, 2, 3]).repeat(3)
    found, expected = losses.hardest_distances(features, labels), _slow_hardest(features, labels)
    assert found.positive.tolist() == pytest.approx(expected[0], rel=1e-4)
    assert found.negative.tolist() == pytest.approx(expected[1], rel=1e-4)
    assert losses.hardest_distances(features.bfloat16(), labels).positive.dtype == torch.float32


def test_hardest_distances_of_one_identity() -> None:
    features, labels = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="two identities in a batch"):
        losses.hardest_distances(features, labels)
    found = losses.hardest_distances(features, labels, part=True)
    assert found.positive.tolist() == pytest.approx(_slow_hardest(features, labels)[0], rel=1e-4)
    assert found.negative.isinf().all()


@pytest.mark.parametrize("seed", range(3))
def test_relation_loss_equals_loop(seed: int) -> None:
    features, teacher = torch.randn(2, 24, 5, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]).repeat(3) + torch.arange(3).repeat_interleave(8) * 3
    (positive, negative), (aim_positive, aim_negative) = (_slow_hardest(e, labels) for e in (features, teacher))
    farther = sum(max(0.0, own - aim) for own, aim in zip(positive, aim_positive, strict=True))
    nearer = sum(max(0.0, aim - own) for own, aim in zip(negative, aim_negative, strict=True))
    assert farther > 0.1 < nearer
    found = losses.relation_loss(features, teacher, labels)
    assert float(found) == pytest.approx((farther + nearer) / 24, rel=1e-4)


def test_relation_loss_by_hand() -> None:
    """On a line, identities at 0, 2 | 5, 6; the teacher at 0, 1 | 5, 6. One pair is wider by 1, two anchors of four;
    the nearest negatives of the second, third and fourth image are 3, 3, 4 where the teacher has 4, 4, 5."""
    features, teacher = (torch.tensor(places)[:, None] for places in ([0.0, 2.0, 5.0, 6.0], [0.0, 1.0, 5.0, 6.0]))
    labels = torch.tensor([0, 0, 1, 1])
    assert float(losses.relation_loss(features, teacher, labels)) == pytest.approx(2 / 4 + 3 / 4, rel=1e-4)
    assert float(losses.relation_loss(teacher, features, labels)) == pytest.approx(0.0, abs=1e-6), (
        "easier costs nothing"
    )


def test_relation_loss_is_zero_at_the_teacher_and_does_not_teach_the_teacher() -> None:
    features, teacher = (
        torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in range(2)
    )
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert losses.relation_loss(features, features.detach().clone(), labels) == 0
    losses.relation_loss(features, teacher, labels).backward()
    assert teacher.grad is None
    assert features.grad.abs().max() > 0


def test_relation_loss_of_one_identity_is_its_positives_with_finite_gradient() -> None:
    features, teacher = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    features.requires_grad_()
    labels = torch.zeros(3, dtype=torch.long)
    loss = losses.relation_loss(features * 3, teacher, labels, part=True)
    own, aim = (_slow_hardest(e.detach(), labels)[0] for e in (features * 3, teacher))
    expected = sum(max(0.0, one - other) for one, other in zip(own, aim, strict=True)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1
    loss.backward()
    assert torch.isfinite(features.grad).all()
    with pytest.raises(ValueError, match="two identities in a batch"):
        losses.relation_loss(features, teacher, labels)
