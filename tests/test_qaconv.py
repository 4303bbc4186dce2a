"""QAConv's matcher against loops over pairs and positions, its losses, its memory, its scorer and its graph."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixed_batches import NUM_IDS, build, gradients, mixed_batch
from tasks import make_task
from torch import Tensor, nn

from lda.batch import Batch
from lda.config import preset
from lda.data.sources import Task
from lda.errors import UsageError
from lda.methods.base import Losses
from lda.methods.qaconv import QAConv
from lda.parts.backbones import build_backbone, map_size
from lda.parts.graph_sampling import anchor, by_domain, nearest, one_of_each
from lda.parts.matching import MapScorer, Matcher, best_matches, focal_losses, hard_score_loss, pairwise_loss
from lda.parts.routes import statistics_held
from lda.ranking import rank_encodings
from lda.testing import Evaluator
from lda.trainer import Trainer

CPU = torch.device("cpu")
SHARED = pytest.mark.parametrize("shared", [False, True])
LOSSES = pytest.mark.parametrize("loss", ["memory", "pairwise", "triplet"])


def qaconv(**changes: Any) -> QAConv:
    method = build("qaconv", **{"qaconv_loss": "memory", **changes})
    assert isinstance(method, QAConv)
    return method


def codes_of(count: int, seed: int, channels: int = 5, positions: int = 6) -> Tensor:
    """(count, C, r) in float64, of unit length at every position."""
    values = torch.randn(count, channels, positions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=1)


def matcher_of(shared: bool, positions: int = 6) -> Matcher:
    """In float64, with no parameter or statistic at a value that hides a mistake."""
    matcher = Matcher(positions, shared).double()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in matcher.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
        for norm in (matcher.norm_matches, matcher.norm_scores):
            norm.running_mean.fill_(0.3)
            norm.running_var.fill_(1.7)
    return matcher


def as_norm(values: Tensor, norm: nn.BatchNorm1d, training: bool) -> Tensor:
    mean, var = values.mean(), values.var(correction=0)
    if not training:
        mean, var = norm.running_mean[0], norm.running_var[0]
    return (values - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def slow_logits(matcher: Matcher, a: Tensor, b: Tensor, with_norm: bool = True) -> Tensor:
    """(Q3) to (Q7), one pair at a time."""
    r = a.shape[2]
    matches = []
    for x, y in itertools.product(a, b):
        cosine = x.T @ y
        matches.append(torch.cat([cosine.max(1).values, cosine.max(0).values]))
    m = torch.stack(matches)  # (A * M, 2r)
    if with_norm:
        m = as_norm(m, matcher.norm_matches, matcher.training)
    w_p, w_q = matcher.weight[0], matcher.weight[0 if matcher.shared else 1]
    bias = matcher.bias * (2 if matcher.shared else 1)
    z = torch.stack([(w_p * row[:r]).sum() + (w_q * row[r:]).sum() + bias[0] for row in m])
    return as_norm(z, matcher.norm_scores, matcher.training).view(len(a), len(b))


# --- Eqs. (Q3) to (Q7) -----------------------------------------------------------------------------------------------


def test_best_matches_equal_a_loop_over_positions() -> None:
    a, b = codes_of(2, 0), codes_of(3, 1)
    p, q = best_matches(a, b)
    for i, j in itertools.product(range(2), range(3)):
        cosine = [[float((a[i, :, s] * b[j, :, t]).sum()) for t in range(6)] for s in range(6)]
        assert p[i, :, j].tolist() == pytest.approx([max(row) for row in cosine])
        assert q[i, j].tolist() == pytest.approx([max(row[t] for row in cosine) for t in range(6)])


@SHARED
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_logits_equal_a_loop_in_any_chunks_with_their_gradients(shared: bool, training: bool, size: int) -> None:
    matcher = matcher_of(shared).train(training)
    again = copy.deepcopy(matcher)
    a, b = codes_of(3, 0).requires_grad_(), codes_of(7, 1).requires_grad_()
    a2, b2 = (x.detach().clone().requires_grad_() for x in (a, b))
    slope = torch.randn(3, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits = matcher(a, b, elements=size * 3 * 36)
    expected = slow_logits(again, a2, b2)
    torch.testing.assert_close(logits, expected)
    (logits * slope).sum().backward()
    (expected * slope).sum().backward()
    torch.testing.assert_close(a.grad, a2.grad)
    torch.testing.assert_close(b.grad, b2.grad)
    for (name, one), two in zip(matcher.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_some_rows_equal_those_rows_alone() -> None:
    rows = torch.tensor([5, 0, 3])
    one, two = matcher_of(False), matcher_of(False)
    a, b = codes_of(3, 0), codes_of(7, 1)
    torch.testing.assert_close(one(a, b, rows), two(a, b[rows]))
    torch.testing.assert_close(one.norm_matches.running_mean, two.norm_matches.running_mean)


def test_training_records_the_statistics_of_all_pairs_and_holds_them_when_told_to() -> None:
    matcher = matcher_of(False)
    a, b = codes_of(3, 0), codes_of(7, 1)
    p, q = best_matches(a, b)
    m = torch.cat([p.flatten(), q.flatten()])
    before = copy.deepcopy(matcher.state_dict())
    with statistics_held(matcher):
        matcher(a, b)
    assert all(torch.equal(value, before[key]) for key, value in matcher.state_dict().items())
    matcher(a, b, elements=2 * 3 * 36)
    norm = matcher.norm_matches
    assert float(norm.running_mean) == pytest.approx(0.9 * 0.3 + 0.1 * float(m.mean()))
    assert float(norm.running_var) == pytest.approx(0.9 * 1.7 + 0.1 * float(m.var()))
    assert [int(n.num_batches_tracked) for n in (norm, matcher.norm_scores)] == [1, 1]
    before = copy.deepcopy(matcher.state_dict())
    matcher.eval()(a, b)
    assert all(torch.equal(value, before[key]) for key, value in matcher.state_dict().items())


def test_recomputed_chunks_keep_three_numbers_a_pair() -> None:
    """Nothing of the size of the cosines is saved for the backward pass."""
    matcher, a, b = matcher_of(False), codes_of(3, 0).requires_grad_(), codes_of(64, 1)
    largest = [0, 0]
    for place, elements in enumerate([4 * 3 * 36, 10**9]):

        def saved(x: Tensor, place: int = place) -> Tensor:
            if not x.is_leaf:  # what the matcher computed, not what it was given
                largest[place] = max(largest[place], x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
            matcher(a, b, elements=elements)
    assert largest[0] <= 3 * 64
    assert largest[1] >= 3 * 64 * 36


def test_shared_weights_are_symmetric_and_separate_ones_are_not() -> None:
    a = codes_of(4, 0)
    symmetric = matcher_of(True)(a, a)
    torch.testing.assert_close(symmetric, symmetric.T)
    separate = matcher_of(False)(a, a)
    assert float((separate - separate.T).detach().abs().max()) > 0.1


def test_an_image_matches_itself_best() -> None:
    matcher, a = matcher_of(False).eval(), codes_of(6, 0)
    p, q = best_matches(a, a)
    torch.testing.assert_close(p.diagonal(dim1=0, dim2=2), torch.ones(6, 6, dtype=torch.float64))
    torch.testing.assert_close(q.diagonal(dim1=0, dim2=1), torch.ones(6, 6, dtype=torch.float64))
    with torch.no_grad():
        matcher.weight.abs_()
        matcher.norm_matches.weight.abs_()
        matcher.norm_scores.weight.abs_()
    assert torch.equal(matcher(a, a).argmax(1), torch.arange(6))


def test_positions_of_an_image_may_be_renamed_with_their_weights() -> None:
    matcher, a, b = matcher_of(False), codes_of(4, 0), codes_of(5, 1)
    expected = matcher(a, b)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert float((matcher(a[:, :, order], b) - expected).detach().abs().max()) > 0.01
    with torch.no_grad():
        matcher.weight[0] = matcher.weight[0, order]
    torch.testing.assert_close(matcher(a[:, :, order], b), expected)


@SHARED
def test_the_second_normalisation_absorbs_the_first(shared: bool) -> None:
    matcher, a, b = matcher_of(shared), codes_of(4, 0), codes_of(8, 1)
    with torch.no_grad():
        matcher.norm_matches.weight.abs_()
    assert float((matcher(a, b) - slow_logits(matcher, a, b, with_norm=False)).detach().abs().max()) < 1e-3


def test_weights_begin_as_in_the_releases() -> None:
    shared, separate = (Matcher(8, shared).requires_grad_(False) for shared in (True, False))
    assert torch.equal(shared.weight, torch.full((1, 8), 0.125))
    assert separate.weight.shape == (2, 8)
    assert float(separate.weight.min()) < 0 < float(separate.weight.max())
    assert float(separate.weight.abs().max()) <= 0.25


# --- Eqs. (Q9) to (Q12) ----------------------------------------------------------------------------------------------


def slow_bce(logit: Tensor, same: bool) -> Tensor:
    return -torch.log(torch.sigmoid(logit) if same else 1 - torch.sigmoid(logit))


def slow_memory_loss(logits: Tensor, same: Tensor) -> Tensor:
    total = torch.zeros((), dtype=logits.dtype)
    for a, n in itertools.product(range(len(logits)), range(logits.shape[1])):
        truth = torch.sigmoid(logits[a, n]) if same[a, n] else 1 - torch.sigmoid(logits[a, n])
        total = total + slow_bce(logits[a, n], bool(same[a, n])) * (1 - truth) ** 2
    return total / len(logits)


def slow_pairwise_loss(logits: Tensor, same: Tensor) -> Tensor:
    pairs = itertools.product(range(len(logits)), repeat=2)
    return torch.stack([slow_bce(logits[a, b], bool(same[a, b])) for a, b in pairs]).sum() / len(logits)


def slow_triplet_loss(logits: Tensor, same: Tensor, margin: float) -> Tensor:
    total, images = torch.zeros((), dtype=logits.dtype), range(len(logits))
    for a in images:
        hardest = max(logits[a, b] for b in images if not same[a, b])
        easiest = min(logits[a, b] for b in images if same[a, b] and b != a)
        total = total + (hardest - easiest + margin).clamp_min(0.0)
    return total / len(logits)


@LOSSES
def test_losses_equal_loops_with_their_gradient(loss: str) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    same = labels[:, None] == labels
    logits = 3 * torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    if loss == "memory":
        found, expected = focal_losses(one, same).sum(1).mean(), slow_memory_loss(two, same)
    elif loss == "pairwise":
        found, expected = pairwise_loss(one, same), slow_pairwise_loss(two, same)
    else:
        found, expected = hard_score_loss(one, same, 1.5), slow_triplet_loss(two, same, 1.5)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_by_hand() -> None:
    """Scores of 0: BCE is ln 2 and P is 1/2; a triplet of equal scores loses its margin."""
    same = torch.eye(2, dtype=torch.bool).repeat_interleave(2, 0).repeat_interleave(2, 1)
    zeros = torch.zeros(4, 4)
    assert float(focal_losses(zeros, same).sum(1).mean()) == pytest.approx(4 * 0.693147 / 4)
    assert float(pairwise_loss(zeros, same)) == pytest.approx(4 * 0.693147)
    assert float(hard_score_loss(zeros, same, 16.0)) == pytest.approx(16.0)
    assert float(hard_score_loss(20 * same.float(), same, 16.0)) == 0.0


def test_losses_stay_finite_at_any_score() -> None:
    same = torch.tensor([[True, False]])
    for value in (-1e4, 1e4):
        logits = torch.full((1, 2), value, requires_grad=True)
        (focal_losses(logits, same).sum() + pairwise_loss(logits, same)).backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_triplets_that_are_none_are_no_silent_zero() -> None:
    for labels in (torch.tensor([0, 0, 1]), torch.tensor([0, 0])):
        same = labels[:, None] == labels
        assert hard_score_loss(torch.zeros(len(same), len(same)), same, 1.0).isnan()


# --- the method ------------------------------------------------------------------------------------------------------


def stepped(method: QAConv, batch: Batch, step: int) -> Losses:
    """One step whose update only differentiates."""

    def update(losses: Losses, groups: tuple[str, ...] = ("main",), rule: str = "optimiser") -> None:
        assert set(groups) == set(method.parameter_groups())
        method.zero_grad()
        losses["loss/total"].backward()

    return method.train_step(batch, step, update)


@LOSSES
def test_step_equals_the_equations_on_the_methods_own_maps(loss: str) -> None:
    """Joint labels, normalisation, memory rows and the choice of loss: against loops over the method's maps."""
    method = qaconv(qaconv_loss=loss, image_height=32, image_width=16, qaconv_neck=8)
    for step in range(2):
        stepped(method, mixed_small(step), step)
    again = copy.deepcopy(method)
    batch = mixed_small(5)
    found = stepped(method, batch, 2)
    maps = again.maps(batch.images)
    codes = maps.flatten(2) / maps.flatten(2).norm(dim=1, keepdim=True).clamp_min(1e-12)
    labels = batch.labels + torch.tensor([0, 5, 12])[batch.domains]
    rows = [n for n in range(sum(NUM_IDS)) if loss == "memory" and bool(again.seen[n])]
    others = again.memory[rows] if loss == "memory" else codes
    columns = torch.tensor(rows) if loss == "memory" else labels
    same = labels[:, None] == columns
    logits = slow_logits(again.matcher, codes, others)
    expected = {
        "memory": lambda: slow_memory_loss(logits, same),
        "pairwise": lambda: slow_pairwise_loss(logits, same),
        "triplet": lambda: slow_triplet_loss(logits, same, 16.0),
    }[loss]()
    torch.testing.assert_close(found["loss/total"], expected, rtol=1e-4, atol=1e-4)
    assert float(found["match/positive"]) == pytest.approx(float(logits.detach()[same].mean()), abs=1e-4)
    assert float(found["match/negative"]) == pytest.approx(float(logits.detach()[~same].mean()), abs=1e-4)
    expected.backward()
    slow = gradients(again)
    assert set(gradients(method)) == {name for name, _ in method.named_parameters()}
    for name, gradient in gradients(method).items():
        torch.testing.assert_close(gradient, slow[name], rtol=1e-2, atol=1e-3, msg=lambda t, name=name: f"{name}: {t}")


def mixed_small(seed: int) -> Batch:
    """Two images of two identities of every domain, others with every seed."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([random.choice(n, 2, replace=False).repeat(2) for n in NUM_IDS])
    images = torch.randn(12, 3, 32, 16, generator=torch.Generator().manual_seed(seed))
    return Batch(images, torch.from_numpy(labels), torch.tensor([0, 1, 2]).repeat_interleave(4))


def test_memory_holds_one_image_of_every_identity_that_was_shown() -> None:
    method = qaconv()
    batch, joint = mixed_batch(), torch.tensor([0, 1, 5, 8, 14, 16])
    first = stepped(method, batch, 0)
    assert float(first["loss/total"].detach()) == 0.0  # nothing is seen
    assert torch.equal(method.seen.nonzero()[:, 0], joint)
    for step in range(3):
        before = method.memory.clone()
        stepped(method, batch, step)
        assert not method.memory.requires_grad
        written = [n for n in range(sum(NUM_IDS)) if not torch.equal(method.memory[n], before[n])]
        assert set(written) <= set(joint.tolist())
        with statistics_held(method):
            codes = F.normalize(method.maps(batch.images).flatten(2), dim=1)
        torch.testing.assert_close(method.memory[joint], codes[step % 2 :: 2], rtol=1e-3, atol=1e-4)


def test_identities_that_were_never_shown_change_nothing() -> None:
    """Neither the loss nor the statistics: a method of more identities agrees with one that has only those seen."""
    small, large = (qaconv(num_ids=ids, qaconv_shift="zero") for ids in ((5, 5, 5), (5, 5, 50)))
    for step in range(3):
        one, two = (stepped(method, mixed_batch(step), step) for method in (small, large))
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], msg=lambda text, name=name: f"{name}: {text}")
    for key, value in small.matcher.state_dict().items():
        torch.testing.assert_close(value, large.matcher.state_dict()[key])


@LOSSES
def test_losses_are_in_single_precision_under_autocast(loss: str) -> None:
    method = qaconv(qaconv_loss=loss)
    stepped(method, mixed_batch(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method.training_losses(mixed_batch(1), 1)
        assert method.encode(mixed_batch(1).images).dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in losses.values())
    losses["loss/total"].backward()


def test_versions_follow_their_loss_and_can_be_mixed() -> None:
    def parts(**changes: Any) -> tuple[bool, bool]:
        method = qaconv(**changes)
        return method.matcher.shared, any(isinstance(module, nn.BatchNorm2d) for module in method.neck)

    assert parts() == (False, True)
    assert parts(qaconv_loss="pairwise") == (False, True)
    assert parts(qaconv_loss="triplet") == (True, False)
    assert parts(qaconv_loss="triplet", qaconv_shared_weights="no", qaconv_neck_norm="batch") == (False, True)
    assert parts(qaconv_shared_weights="yes", qaconv_neck_norm="none") == (True, False)
    assert qaconv().label == "QAConv"
    assert qaconv(qaconv_loss="triplet", qaconv_sampler="graph").label == "QAConv (triplet loss, graph sampling)"


def test_scores_begin_at_the_odds_of_a_positive_in_the_memory() -> None:
    def shift(**changes: Any) -> float:
        return qaconv(**changes).matcher.norm_scores.bias.item()

    assert 1 / (1 + np.exp(-shift())) == pytest.approx(1 / 18)  # one of 5 + 7 + 6
    assert shift(qaconv_shift="zero") == 0.0
    assert shift(qaconv_loss="pairwise") == 0.0


def test_margin_moves_the_triplet_loss() -> None:
    narrow, wide = (
        qaconv(qaconv_loss="triplet", qaconv_margin=margin).training_losses(mixed_batch(), 0)["loss/total"]
        for margin in (16.0, 20.0)
    )
    assert float((wide - narrow).detach()) == pytest.approx(4.0, abs=1e-3)


def test_an_identity_of_one_image_is_its_own_positive() -> None:
    """P x K repeats it: a copy scores as high as the image with itself."""
    method = qaconv(qaconv_loss="triplet", qaconv_margin=0.0).eval()
    batch = mixed_batch()
    twice = batch._replace(images=batch.images[::2].repeat_interleave(2, 0))
    codes = F.normalize(method.maps(twice.images).flatten(2), dim=1)
    logits = method.matcher(codes, codes)
    torch.testing.assert_close(logits.diagonal(1)[::2], logits.diagonal()[::2], rtol=1e-4, atol=1e-4)
    assert float(method.training_losses(twice, 0)["loss/total"].detach()) == pytest.approx(0.0, abs=1e-3)


def test_what_is_behind_the_layer_is_not_there() -> None:
    method = qaconv()
    assert not any("layer4" in name for name in method.state_dict())
    assert method.map_size == (8, 4)
    assert method.backbone.channels == 96
    later = qaconv(qaconv_layer="layer4", qaconv_neck=16)
    assert later.backbone.channels == 192
    assert later.encode(mixed_batch().images).shape == (12, 16, 8, 4)
    assert later.cost.train_passes > method.cost.train_passes


@pytest.mark.parametrize("layer", ["layer3", "layer4"])
def test_map_size_is_that_of_a_map(layer: str) -> None:
    backbone = build_backbone("resnet18").eval()
    backbone.cut_after(layer)
    for size in ((64, 32), (70, 45)):
        with torch.no_grad():
            maps = backbone(torch.zeros(1, 3, *size))
        assert maps.shape == (1, backbone.channels, *map_size(backbone, size))


def test_another_image_size_is_refused() -> None:
    method = qaconv().eval()
    with pytest.raises(UsageError, match=r"image_height, image_width: .*\(8, 4\).*use \(64, 32\)"):
        method(torch.zeros(1, 3, 32, 16))


def test_new_layers_have_a_rate_of_their_own() -> None:
    groups = qaconv(qaconv_new_layer_rate=10.0).parameter_groups()
    assert (groups["main"].rate, groups["new"].rate) == (1.0, 10.0)
    method = qaconv()
    listed = {id(p) for group in method.parameter_groups().values() for p in group.parameters}
    assert listed == {id(p) for p in method.parameters()}
    assert {id(p) for p in method.backbone.parameters()} == {
        id(p) for p in method.parameter_groups()["main"].parameters
    }


def test_frozen_statistics_need_pretrained_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"qaconv_freeze_bn: .*; set qaconv_freeze_bn=no"):
        qaconv(qaconv_freeze_bn="yes")
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / "weights.pt")
    small = {"image_height": 32, "image_width": 16, "qaconv_neck": 8, "qaconv_loss": "pairwise"}
    weights = {"backbone": "resnet18", "pretrained": str(tmp_path / "weights.pt")}
    for changes in ({"qaconv_freeze_bn": "yes", **weights}, {}):
        method = qaconv(**small, **changes)
        before = copy.deepcopy(method.backbone.state_dict())
        stepped(method, mixed_small(0), 0)
        changed = [key for key, value in method.backbone.state_dict().items() if not torch.equal(value, before[key])]
        assert bool(changed) == (not changes)
        assert method.neck[1].training
        assert all(p.grad is not None for p in method.backbone.parameters())


# --- Eq. (Q13) -------------------------------------------------------------------------------------------------------


@SHARED
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_scores_rank_as_the_logits_do(shared: bool, signs: tuple[int, int]) -> None:
    matcher, a, b = matcher_of(shared).eval(), codes_of(5, 0), codes_of(9, 1)
    with torch.no_grad():
        matcher.norm_matches.weight.abs_().mul_(signs[0])
        matcher.norm_scores.weight.abs_().mul_(signs[1])
    scores = matcher.scorer((5, 3, 2), 16).scores(a, b)
    logits = matcher(a, b).detach()
    assert torch.equal(scores.argsort(1), logits.argsort(1))
    slope, shift = np.polyfit(scores.flatten().numpy(), logits.flatten().numpy(), 1)
    assert slope > 0
    torch.testing.assert_close(logits, slope * scores + shift)
    assert float(scores.abs().max()) <= 1.0
    with torch.no_grad():
        matcher.weight.abs_()
        ones = matcher.scorer((5, 3, 2), 16).scores(a, a).diagonal()
    torch.testing.assert_close(ones, torch.full((5,), float(signs[0] * signs[1]), dtype=torch.float64))


@pytest.fixture(scope="module")
def ranked() -> tuple[MapScorer, Tensor, Tensor, list[list[int]]]:
    """A scorer, and maps of which some are equal, so that ties are there."""
    random = torch.Generator().manual_seed(0)
    matcher = Matcher(8, False)
    maps = F.normalize(torch.randn(60, 16, 4, 2, generator=random), dim=1)
    maps[20:40:2] = maps[0:20:2]
    maps[41::3] = maps[40]
    pids = torch.arange(60) % 7
    ids = [pids[:20].tolist(), pids[20:].tolist(), [0] * 20, [1] * 40]
    return matcher.scorer((16, 4, 2), 10**6), maps[:20], maps[20:], ids


@pytest.mark.parametrize("pairs", [1, 7, 40, 123])
def test_blocks_cannot_change_a_ranking(ranked: tuple[MapScorer, Tensor, Tensor, list[list[int]]], pairs: int) -> None:
    scorer, query, gallery, ids = ranked
    whole = rank_encodings(scorer, query, gallery, *ids)
    blocks = MapScorer(scorer.query_weights, scorer.gallery_weights, scorer.shape, pairs)
    assert rank_encodings(blocks, query, gallery, *ids) == whole
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    moved = [ids[0], [ids[1][i] for i in order.tolist()], *ids[2:]]
    assert rank_encodings(blocks, query, gallery[order], *moved) == whole


def test_scorer_says_what_it_costs_and_what_it_takes() -> None:
    method = qaconv(qaconv_pairs_per_block=77).eval()
    scorer = method.scorer()
    assert scorer.pairs_per_block == 77
    assert scorer.pair_cost == 32 * 32 * 64 + 2 * 32
    assert not scorer.adds_flip
    assert scorer.tie == pytest.approx(4.8e-7, rel=0.01)
    with pytest.raises(UsageError, match=r"expected \(N, 64, 8, 4\), got shape \(3, 64, 4, 8\)"):
        scorer.prepare(torch.zeros(3, 64, 4, 8))
    codes = scorer.prepare(method.encode(mixed_batch().images).bfloat16())
    assert codes.dtype == torch.float32
    assert codes.shape == (12, 64, 32)


def test_images_without_a_difference_tie() -> None:
    """A collapsed network scores worst, whatever the order of the gallery."""
    scorer = Matcher(8, False).scorer((16, 4, 2), 5)
    maps = F.normalize(torch.ones(12, 16, 4, 2), dim=1)
    ids = ([0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0], [1] * 10)
    assert rank_encodings(scorer, maps[:2], maps[2:], *ids).mAP == pytest.approx(0.1)


# --- training on drawn rectangles ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("tasks"), 3)


def trainer_of(task: Task, **changes: Any) -> Trainer:
    torch.set_num_threads(1)
    small = {"image_height": 32, "image_width": 16, "ids_per_batch": 6, "images_per_id": 2, "pad": 1}
    settings = {**small, "warmup_epochs": 0, "qaconv_neck": 16, "evaluation_batch": 16}
    settings |= {"qaconv_loss": "memory", **changes}
    return Trainer(preset("standin", method="qaconv", threads=1, **settings), task, CPU)


def run(trainer: Trainer, until: int) -> Iterator[tuple[Batch, dict[str, float]]]:
    """(batch, scalars) of every step."""
    for batch in itertools.islice(trainer.loader(), until - trainer.step):
        yield batch, trainer.train_step(batch)


@pytest.mark.parametrize(("loss", "steps"), [("memory", 50), ("pairwise", 30)])
def test_learns_who_is_who(tmp_path: Path, loss: str, steps: int) -> None:
    small = make_task(tmp_path, 2, ids=10)
    trainer = trainer_of(small, qaconv_loss=loss, images_per_id=4, milestones=())
    evaluator = Evaluator(small.validation, trainer.config, CPU)
    assert evaluator(trainer.method).mAP < 0.5
    scalars = [scalars for _, scalars in run(trainer, steps)][-1]
    assert evaluator(trainer.method).mAP > 0.8
    assert scalars["match/positive"] > scalars["match/negative"] + 0.2
    assert scalars["match/gain"] > 0.1


def test_flipped_images_are_not_added(task: Task) -> None:
    trainer = trainer_of(task)
    config = trainer.config.replace(flip_test=True)
    with pytest.raises(UsageError, match="QAConv cannot be added; set flip_test=false"):
        Evaluator(task.test_splits, config, CPU)(trainer.method)


# --- graph sampling --------------------------------------------------------------------------------------------------


def graph_trainer(task: Task, **changes: Any) -> Trainer:
    return trainer_of(task, qaconv_sampler="graph", **changes)


def joint_of(batch: Batch) -> list[int]:
    """The identities of a batch of sources of 6, 7 and 8."""
    return (batch.labels + torch.tensor([0, 6, 13])[batch.domains])[::2].tolist()


def test_every_identity_is_an_anchor_once_an_epoch_with_its_look_alikes(task: Task) -> None:
    trainer = graph_trainer(task, qaconv_graph_steps=0, learning_rate=1e-6)
    method = trainer.method
    assert isinstance(method, QAConv)
    assert method.layout.dealt == "method"
    shown = [joint_of(batch) for batch, _ in run(trainer, 21)]
    rows = {n: {n, *method.neighbours[n].tolist()} for n in range(21)}
    anchors = [anchor(step, 21, 0, 0) for step in range(21)]
    assert sorted(anchors) == list(range(21))
    assert anchors != [anchor(step, 21, 0, 1) for step in range(21)]
    assert anchors != [anchor(step, 21, 1, 0) for step in range(21)]
    for identities, one in zip(shown, anchors, strict=True):
        assert len(identities) == 6
        assert set(identities) == rows[one]
    assert [method.looks_at_sources(step) for step in (0, 1, 20, 21, 42)] == [True, False, False, True, True]


def test_graph_is_that_of_the_scorer_on_clean_images(task: Task) -> None:
    trainer = graph_trainer(task)
    method = trainer.method
    assert isinstance(method, QAConv)
    before = copy.deepcopy(method.state_dict())
    random = torch.random.get_rng_state()
    trainer.prepare()
    assert method.training
    assert torch.equal(torch.random.get_rng_state(), random)
    changed = [key for key, value in method.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["neighbours", "graphs"]

    from lda.data.batches import CleanImages

    method.eval()
    clean = list(CleanImages(task.sources, trainer.packed, 5))
    with torch.no_grad():
        codes = one_of_each(clean, torch.tensor([0, 6, 13]), 21, method.encode, 0, 0)
        scores = method.scorer().scores(codes.flatten(2), codes.flatten(2))
    for n in range(21):
        others = sorted((m for m in range(21) if m != n), key=lambda m: -float(scores[n, m]))
        assert method.neighbours[n].tolist() == others[:5]


def test_graph_run_goes_on_from_a_checkpoint_across_epochs(task: Task) -> None:
    straight, broken, later = (graph_trainer(task, qaconv_graph_steps=4) for _ in range(3))
    logged = [scalars for _, scalars in run(straight, 10)]
    for until in (3, 8):  # within an epoch, and where one begins
        list(run(broken, until))
        later.method.load_state_dict(copy.deepcopy(broken.method.state_dict()))
        later.optimizer.load_state_dict(copy.deepcopy(broken.optimizer.state_dict()))
        later.step = until
        assert [scalars for _, scalars in run(later, 10)] == logged[until:]
    assert int(straight.method.graphs) == 3  # type: ignore[arg-type]
    for key, value in straight.method.state_dict().items():
        assert torch.equal(value, later.method.state_dict()[key]), key


def test_too_few_identities_for_a_batch_are_refused() -> None:
    with pytest.raises(UsageError, match=r"graph deals 20 identities a step, and the sources have 18; set ids_per"):
        qaconv(qaconv_sampler="graph", ids_per_batch=20)


def test_graph_is_drawn_before_it_is_asked() -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        qaconv(qaconv_sampler="graph").identities(0)


@pytest.mark.parametrize("pairs", [1, 5, 9, 20, 1000])
def test_nearest_in_any_blocks(pairs: int) -> None:
    scores = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)) + 5 * torch.eye(9)
    sizes: list[int] = []

    def block(rows: slice, columns: slice) -> Tensor:
        sizes.append((rows.stop - rows.start) * (columns.stop - columns.start))
        return scores[rows, columns]

    found = nearest(block, 9, 3, pairs)
    assert max(sizes) <= pairs
    for n in range(9):
        others = sorted((m for m in range(9) if m != n), key=lambda m: -float(scores[n, m]))
        assert found[n].tolist() == others[:3]


def clean(size: int) -> Iterator[Batch]:
    """Five images of every identity of two domains of 2 and 3, whose value says which image it is."""
    number = 0
    for domain, ids in enumerate((2, 3)):
        labels = torch.arange(ids).repeat(5)
        for part in labels.split(size):
            images = torch.arange(number, number + len(part), dtype=torch.float32)[:, None, None, None]
            number += len(part)
            yield Batch(images, part, torch.full((len(part),), domain))


def test_one_image_of_each_is_drawn_whatever_the_batches() -> None:
    labels = torch.cat([torch.arange(2).repeat(5), 2 + torch.arange(3).repeat(5)])

    def drawn(size: int, seed: int = 0, epoch: int = 0) -> list[int]:
        found = one_of_each(clean(size), torch.tensor([0, 2]), 5, lambda images: images, seed, epoch)
        return found.flatten().long().tolist()

    first = drawn(1)
    assert labels[first].tolist() == [0, 1, 2, 3, 4]
    assert all(drawn(size) == first for size in (2, 7, 100))
    others = [drawn(7, seed, epoch) for seed, epoch in itertools.product(range(4), range(25))]
    for n in range(5):  # each of five images comes up in 100 draws
        assert len({one[n] for one in others}) == 5
    with pytest.raises(ValueError, match="1 of 6 identities have no image"):
        one_of_each(clean(3), torch.tensor([0, 2]), 6, lambda images: images, 0, 0)


def test_joint_labels_are_dealt_by_domain() -> None:
    dealt = by_domain(np.array([17, 4, 5, 0, 12]), NUM_IDS)
    assert [(k, labels.tolist()) for k, labels in dealt] == [(0, [4, 0]), (1, [0]), (2, [5, 0])]
    assert all(labels.dtype == np.int64 for _, labels in dealt)
