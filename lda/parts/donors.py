"""Which domain's row a step borrows: the donor j of Eq. (4) of LDA."""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import Tensor

from lda.parts.bank import BufferBank
from lda.parts.latent import distance
from lda.parts.losses import Gaussian


def draw_donor(
    rule: Literal["uniform", "round_robin"], domain: int, num_domains: int, seed: int | str, step: int
) -> int:
    """The other domain j != `domain` whose row a step borrows: a function of (seed, step), so a resumed run agrees.

    Raises ValueError when there is no other.
    """
    others = [other for other in range(num_domains) if other != domain]
    if not others:
        raise ValueError(f"expected two or more domains to draw a donor from, got {num_domains}")
    if rule == "round_robin":
        return others[step % len(others)]
    return random.Random(f"donor {seed} {step}").choice(others)


def draw_donors(count: int, domain: int, num_domains: int, seed: int, step: int) -> tuple[int, ...]:
    """A donor for every image of a batch of `count`."""
    return tuple(draw_donor("uniform", domain, num_domains, f"{seed} image {image}", step) for image in range(count))


@torch.no_grad()
def by_distance(rule: Literal["nearest", "farthest"], domain: int, bank: BufferBank) -> Tensor:
    """The other domain whose row of `bank` is nearest to, or farthest from, that of `domain`, by D of Eq. (8).

    A tensor without axes, so that a GPU's answer is not waited for.
    """
    own = Gaussian(bank.mean[domain], bank.var[domain])
    gaps = distance(own, Gaussian(bank.mean, bank.var))
    gaps[domain] = torch.inf if rule == "nearest" else -torch.inf
    return gaps.argmin() if rule == "nearest" else gaps.argmax()
