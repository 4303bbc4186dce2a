"""Tools of methods that learn to generalise by episodes: sources held out, and passes with virtual weights.

A virtual pass uses tensors in the place of weights, by name: `torch.func.functional_call`, no copy of the network. It
writes running statistics like any pass; `lda.parts.routes.statistics_held` keeps it from doing so.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lda.batch import Batch
from lda.errors import UsageError
from lda.groups import Setup

InnerRule = Literal["sgd", "adam_first"]

_ADAM_EPS = 1e-8  # torch's


def draw_held_out(domains: Tensor, seed: int, step: int, number: int = 1) -> list[int]:
    """The held-out sources of a step, by rising domain: `number` of those in the batch, a function of (seed, step).

    domains: (B,) of the batch, on the CPU. Raises ValueError unless another domain is left to train on.
    """
    present = sorted(set(domains.tolist()))
    if not 1 <= number < len(present):
        raise ValueError(f"expected to hold out 1 to {len(present) - 1} of the batch's domains, got {number}")
    return sorted(random.Random(f"held out {seed} {step}").sample(present, number))


def split_by_domain(batch: Batch, held_out: Collection[int]) -> tuple[Batch, Batch]:
    """(the other images, the images of the domains `held_out`), each in the order of the batch."""
    out = torch.isin(batch.domains, torch.tensor(sorted(held_out)))
    return _part(batch, ~out), _part(batch, out)


def domain_parts(batch: Batch) -> dict[int, Batch]:
    """Domain -> its images, for the domains that are in the batch, by rising domain; each in the order of the batch."""
    return {domain: _part(batch, batch.domains == domain) for domain in sorted(set(batch.domains.tolist()))}


def _part(batch: Batch, chosen: Tensor) -> Batch:
    rows = chosen.nonzero()[:, 0]  # found on the CPU: a mask on a GPU would be waited for
    there = rows.to(batch.images.device)
    second = None if batch.second is None else batch.second[there]
    return Batch(batch.images[there], batch.labels[rows.to(batch.labels.device)], batch.domains[rows], second)


def refuse_recomputation(setup: Setup, title: str) -> None:
    """Raises UsageError when activations are to be recomputed: the second computation of a virtual pass would happen
    in the backward pass, after the network's own weights are back, and silently give a wrong gradient."""
    if setup.recompute:
        raise UsageError(
            f"activation_checkpointing: {title} trains through virtual weights, which a recomputation would not see; "
            "set activation_checkpointing=false"
        )


def inner_gradient(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> gradient of `loss`, detached, for the parameters that it depends on. Outside autocast, like any other."""
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def inner_step(
    parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], rate: float, rule: InnerRule = "sgd"
) -> dict[str, Tensor]:
    """The virtual weights theta' = theta - rate u(g), for the parameters that have a gradient g.

    sgd: u(g) = g. adam_first: u(g) = g / (|g| + 1e-8), the first step of a fresh Adam, close to sign(g).

    theta' depends on theta by the identity. So with a detached g the derivative of a loss at theta' is the first-order
    one, and with a g that has a graph the exact one.
    """
    steps = {name: g if rule == "sgd" else g / (g.abs() + _ADAM_EPS) for name, g in gradient.items()}
    return {name: parameters[name] - rate * step for name, step in steps.items()}


def virtual_call(owner: nn.Module, part: str, weights: Mapping[str, Tensor], *inputs: Any) -> Any:
    """`owner.part(*inputs)` with `weights`, named as in `owner.named_parameters()` or `named_buffers()`, in the place
    of its own; what is not named stays."""
    prefix = f"{part}."
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return functional_call(owner.get_submodule(part), own, inputs)
