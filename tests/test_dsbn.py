"""DSBN against plain batch normalisation, against LDA's first path, and its three rules for an unseen domain."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lda import methods
from lda.batch import Batch
from lda.config import preset
from lda.methods.base import Method
from lda.methods.baseline import Baseline
from lda.methods.dsbn import DSBN
from lda.methods.lda import LDA
from lda.parts.domain_norm import DomainBatchNorm2d, OneSet
from lda.parts.heads import gem
from lda.parts.losses import batch_hard_triplet_loss, identity_loss

NUM_IDS = (5, 7, 6)
INFERENCES = ("ensemble", "mean_stats", "nearest")


def built(name: str, num_ids: Sequence[int] = NUM_IDS, **changes: Any) -> Method:
    config = preset("standin", method=name, warmup_epochs=0, **changes)
    return methods.build(config.method, config.setup(num_ids))


def dsbn(num_ids: Sequence[int] = NUM_IDS, **changes: Any) -> DSBN:
    method = built("dsbn", num_ids, **changes)
    assert isinstance(method, DSBN)
    return method


def batch_of(domains: Sequence[int], seed: int = 0) -> Batch:
    """Four images, two of each of two identities, of every domain named."""
    labels = torch.tensor([0, 0, 3, 3]).repeat(len(domains))
    images = torch.randn(len(labels), 3, 32, 16, generator=torch.Generator().manual_seed(seed))
    return Batch(images, labels, torch.tensor(list(domains)).repeat_interleave(4))


@torch.enable_grad()
def trained(method: Method, steps: int = 5) -> Method:
    """A few steps in which domain k has its own brightness, so that the sets differ."""
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        batch = batch_of(range(method.num_domains), step)
        batch = batch._replace(images=batch.images * 0.5 + batch.domains[:, None, None, None])
        loss = method.training_losses(batch, step)["loss/total"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return method.eval()


def with_inference(method: DSBN, inference: str) -> DSBN:
    other = dsbn(method.setup.num_ids, dsbn_inference=inference)
    other.load_state_dict(method.state_dict())
    return other.eval()


def test_one_domain_is_the_plain_baseline() -> None:
    """Losses, gradients, statistics and features, in every rule of inference."""
    one, plain = dsbn([8]), built("baseline", [8])
    assert isinstance(plain, Baseline)
    batch = batch_of([0])
    total, expected = (m.training_losses(batch, 0)["loss/total"] for m in (one, plain))
    assert torch.equal(total, expected)
    total.backward()
    expected.backward()
    for own, other in zip(one.parameters(), plain.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.equal(own.grad, other.grad)
    with torch.no_grad():
        features = plain.eval()(batch.images)
        for inference in INFERENCES:
            torch.testing.assert_close(with_inference(one, inference)(batch.images), features)


def test_shared_affine_is_ldas_first_path() -> None:
    """On a batch of one domain: LDA without second path and latent loss has the same losses and gradients."""
    own = dsbn(dsbn_affine="shared")
    lda = built("lda", network_a="none", inference="expert", consistency_weight=0.0)
    assert isinstance(lda, LDA)
    batch = batch_of([1], seed=4)
    total, expected = (m.training_losses(batch, 0)["loss/total"] for m in (own, lda))
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    for name in ("backbone.conv1.weight", "backbone.layer4.0.conv2.weight", "head.classifiers.1.weight"):
        one, other = own.get_parameter(name), lda.get_parameter(name.replace("head.", "head_e."))
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_a_mixed_step_is_the_mean_of_steps_of_one_domain() -> None:
    """The identity loss by hand from passes of one domain; triplets over all features."""
    method = dsbn(triplet_weight=0.7)
    reference = copy.deepcopy(method)
    batch = batch_of([2, 0, 2, 1], seed=1)  # unequal shares: the mean is over images, not over domains
    losses = method.training_losses(batch, 0)
    features = torch.zeros(len(batch.labels), 192)
    identity = torch.zeros(())
    for domain in range(3):
        rows = batch.domains == domain
        with reference.switch.on(OneSet(domain)):
            features[rows] = gem(reference.backbone(batch.images[rows]), 3.0)
        logits = reference.head(features[rows], domain)
        identity = identity + identity_loss(logits, batch.labels[rows], 0.1) * rows.float().mean()
    everyone = batch.labels + torch.tensor([0, 5, 12])[batch.domains]
    total = identity + 0.7 * batch_hard_triplet_loss(features, everyone, 0.3)
    torch.testing.assert_close(losses["loss/total"], total)
    losses["loss/total"].backward()
    total.backward()
    for (name, one), (_, other) in zip(method.named_parameters(), reference.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    for key, value in method.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-4, atol=1e-5, msg=key)


def test_absent_domains_are_left_alone_whole() -> None:
    """Sets, necks, classifiers and their moments, by Adam with weight decay."""
    method = dsbn()
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    before: dict[str, Tensor] = {}
    for step, domains in enumerate(([0, 1, 2], [0, 2])):
        loss = method.training_losses(batch_of(domains, step), step)["loss/total"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        foreign = {
            k: v.clone() for k, v in method.state_dict().items() if ".sets.1." in k or k.startswith("head.necks.1")
        }
        foreign |= {k: v.clone() for k, v in method.state_dict().items() if k.startswith("head.classifiers.1")}
        for name, parameter in method.named_parameters():
            if name in foreign and parameter in optimizer.state:
                foreign |= {f"{name}/{key}": value.clone() for key, value in optimizer.state[parameter].items()}
        if before:
            assert foreign.keys() == before.keys()
            assert [key for key in foreign if not torch.equal(foreign[key], before[key])] == []
        before = foreign


@torch.no_grad()
def test_equal_sets_make_all_rules_agree() -> None:
    method = trained(dsbn())
    assert isinstance(method, DSBN)
    for module in method.backbone.modules():
        if isinstance(module, DomainBatchNorm2d):
            for domain in (1, 2):
                module.norm(domain).load_state_dict(module.norm(0).state_dict())
    images = batch_of([0]).images
    features = [with_inference(method, inference)(images) for inference in INFERENCES]
    torch.testing.assert_close(features[0], features[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(features[0], features[2], rtol=1e-4, atol=1e-6)


def _watch(domain: int, seen: list[Tensor], layer: DomainBatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
    norm, x = layer.norm(domain), inputs[0]
    gap = (x.mean((2, 3)) - norm.running_mean).square() + (x.var((2, 3)).sqrt() - norm.running_var.sqrt()).square()
    seen.append(gap.mean(1).sqrt())


@torch.no_grad()
def test_rules_are_what_they_say() -> None:
    """Ensemble and nearest from the K passes by hand; trained sets differ, so the rules do too."""
    method = trained(dsbn(), steps=40)  # the running statistics have arrived
    assert isinstance(method, DSBN)
    images = torch.cat([batch_of([k]).images * 0.5 + k for k in range(3)])
    passes, distances = [], []
    for domain in range(3):
        seen: list[Tensor] = []
        watch = functools.partial(_watch, domain, seen)
        layers = [m for m in method.backbone.modules() if isinstance(m, DomainBatchNorm2d)]
        hooks = [m.register_forward_pre_hook(watch) for m in layers]
        with method.switch.on(OneSet(domain)):
            passes.append(F.normalize(gem(method.backbone(images), 3.0)))
        for hook in hooks:
            hook.remove()
        assert len(seen) == 12
        distances.append(sum(seen))
    nearest = torch.stack(distances).argmin(0).tolist()
    assert nearest == [0] * 4 + [1] * 4 + [2] * 4, "an image is nearest to the domain that looks like it"
    torch.testing.assert_close(with_inference(method, "ensemble")(images), sum(passes) / 3)
    chosen = torch.stack([passes[k][n] for n, k in enumerate(nearest)])
    torch.testing.assert_close(with_inference(method, "nearest")(images), chosen)
    averaged = with_inference(method, "mean_stats")(images)
    torch.testing.assert_close(averaged.norm(dim=1), torch.ones(12))
    assert not torch.allclose(averaged, sum(passes) / 3, atol=1e-3)


def test_parameters_are_what_the_sets_add() -> None:
    count = lambda method: sum(p.numel() for p in method.backbone.parameters())  # noqa: E731
    plain, channels = count(built("baseline")), 1080
    assert count(dsbn()) == plain + 2 * 2 * channels
    assert count(dsbn(dsbn_affine="shared")) == plain


@pytest.mark.parametrize(("inference", "forwards"), [("ensemble", 3), ("mean_stats", 1), ("nearest", 3)])
def test_cost_and_name_of_the_rules(inference: str, forwards: int) -> None:
    method = dsbn(dsbn_inference=inference)
    assert method.cost.test_forwards == forwards
    assert method.inference == inference
    stem = method.backbone.conv1
    seen: list[int] = []
    stem.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        method.eval()(batch_of([0]).images)
    assert sum(seen) == 4 * forwards
