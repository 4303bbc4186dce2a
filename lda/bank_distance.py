"""How far apart two domains lie in a Buffer Bank: one formula for the dashboard's curves and for figures. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def row_distances(mean: NDArray[np.float64], std: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K, C) means and standard deviations of K domains in one layer -> (K, K) distances.

    The 2-Wasserstein distance of diagonal Gaussians, W2 = sqrt(sum_c (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2), over
    sqrt(C): a root mean square over channels, so that wide layers count no more than narrow ones.
    """
    square = (mean[:, None] - mean) ** 2 + (std[:, None] - std) ** 2  # (K, K, C)
    distances: NDArray[np.float64] = np.sqrt(square.mean(axis=2))
    return distances
