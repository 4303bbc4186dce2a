"""Identity and batch-hard triplet loss against slow loops."""

from __future__ import annotations

import pytest
import torch

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


def test_relation_equals_loop_and_leaves_the_teacher_alone() -> None:
    random = torch.Generator().manual_seed(0)
    features, teacher = (torch.randn(6, 4, generator=random, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])

    def hardest(e: torch.Tensor, i: int) -> tuple[float, float]:
        gaps = [float((e[i] - e[n]).detach().norm()) for n in range(6)]
        positive = max(gaps[n] for n in range(6) if labels[n] == labels[i] and n != i)
        return positive, min(gaps[n] for n in range(6) if labels[n] != labels[i])

    total = 0.0
    for i in range(6):
        (far, near), (aim_far, aim_near) = hardest(features, i), hardest(teacher, i)
        total += max(0.0, far - aim_far) + max(0.0, aim_near - near)
    loss = losses.relation_loss(features, teacher, labels)
    assert loss.item() == pytest.approx(total / 6, rel=1e-4)
    loss.backward()
    assert features.grad is not None
    assert teacher.grad is None
    assert losses.relation_loss(features, features, labels).item() == 0.0


def test_relation_of_a_single_identity_has_positives_only() -> None:
    features = torch.tensor([[0.0], [3.0]], requires_grad=True)
    teacher, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([4, 4])
    loss = losses.relation_loss(features, teacher, labels, part=True)
    loss.backward()
    assert loss.item() == pytest.approx(2.0)
    assert torch.isfinite(features.grad).all()
    with pytest.raises(ValueError, match="two identities"):
        losses.relation_loss(features, teacher, labels)


def test_the_rounding_of_the_triplet_gradient_is_pinned() -> None:
    """To the bit: the last digits of a gradient decide a run of 160 steps by points of mAP, and with them every number
    that was written down. So the norms are one node of the graph, as in the line below."""
    features = torch.randn(12, 96, generator=torch.Generator().manual_seed(3), requires_grad=True)
    labels = torch.arange(6).repeat_interleave(2)
    norms = features.square().sum(1)
    squared = norms[:, None] + norms[None, :] - 2.0 * features @ features.T
    distances, same = squared.clamp_min(1e-12).sqrt(), labels[:, None] == labels
    hardest = distances.masked_fill(~same, 0.0).amax(1) - distances.masked_fill(same, torch.inf).amin(1)
    (expected,) = torch.autograd.grad((hardest + 0.3).relu().mean(), features)
    (found,) = torch.autograd.grad(losses.batch_hard_triplet_loss(features, labels, 0.3), features)
    assert torch.equal(found, expected)
