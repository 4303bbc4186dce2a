"""From a map to a feature, and from a feature to logits.

Shapes: map (N, C, h, w) after the last ReLU -> feature (N, D), D = C -> logits (N, identities).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gem(maps: Tensor, p: float) -> Tensor:
    """Generalised-mean pooling, (N, C, H, W) -> (N, C): (mean_hw x^p)^(1/p), in fp32. p = 1 is average pooling."""
    pooled = F.adaptive_avg_pool2d(maps.float().clamp_min(1e-6).pow(p), 1).flatten(1)
    return pooled.pow(1.0 / p)


class Head(nn.Module):
    """BNNeck and bias-free linear classifier, one pair per group of identities.

    A group is a source domain (one classifier each) or all sources together (a joint classifier).

    Args:
        in_features: D of the feature.
        num_ids: identities per group.
    """

    def __init__(self, in_features: int, num_ids: Sequence[int]) -> None:
        super().__init__()
        self.necks = nn.ModuleList(nn.BatchNorm1d(in_features) for _ in num_ids)
        self.classifiers = nn.ModuleList(nn.Linear(in_features, n, bias=False) for n in num_ids)
        for name, parameter in self.named_parameters():
            if name.startswith("classifiers."):
                nn.init.normal_(parameter, std=0.001)
            elif name.endswith(".bias"):
                parameter.requires_grad_(False)  # a BNNeck has no shift (Luo et al., arXiv 1903.07071)

    def forward(self, features: Tensor, group: int) -> Tensor:
        """(N, D) features of one group -> (N, identities of the group) logits."""
        logits: Tensor = self.classifiers[group](self.necks[group](features))
        return logits


def label_offsets(num_ids: Sequence[int]) -> Tensor:
    """Where each domain's labels start in a joint classifier, (K,)."""
    return torch.tensor([0, *num_ids[:-1]]).cumsum(0)
