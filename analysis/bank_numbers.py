"""The Buffer Bank of a finished unit, and what its rows say about the domains.

Shapes: K domains, C channels of a layer. A bank holds a mean and a variance per layer, domain and channel, so a row of
it is a diagonal Gaussian: the distribution of the layer's input on that domain.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lda.bank_distance import row_distances
from lda.errors import UsageError, unknown

STATISTICS = ("mean", "standard deviation")


@dataclass(frozen=True)
class Bank:
    """The rows of a Buffer Bank that hold statistics.

    Attributes:
        domains: K source domains.
        unseen: source domains left out because some layer never saw them in training.
        mean: layer -> (K, C); layers in network order.
        std: layer -> (K, C), square root of the bank's variances.
    """

    domains: tuple[str, ...]
    unseen: tuple[str, ...]
    mean: Mapping[str, NDArray[np.float64]]
    std: Mapping[str, NDArray[np.float64]]

    @property
    def layers(self) -> list[str]:
        """Layer names in network order."""
        return list(self.mean)


def read_bank(path: Path) -> Bank:
    """Read a buffer_bank.npz (format: lda/runs.py). Raises UsageError naming the file when it is none."""
    try:
        arrays = dict(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
        domains = [str(domain) for domain in arrays["domains"]]
        layers = [str(layer) for layer in arrays["layers"]]
        seen = np.all([arrays[f"count/{layer}"] > 0 for layer in layers], axis=0)
        mean = {layer: arrays[f"mean/{layer}"][seen].astype(float) for layer in layers}
        std = {layer: np.sqrt(arrays[f"var/{layer}"][seen].astype(float)) for layer in layers}
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: expected a Buffer Bank as a run writes it: {error}") from None
    unseen = tuple(domain for domain, was_seen in zip(domains, seen, strict=True) if not was_seen)
    if len(unseen) == len(domains):
        raise UsageError(f"{path}: no domain was seen in training; train for more steps")
    return Bank(tuple(domain for domain in domains if domain not in unseen), unseen, mean, std)


def choose_layers(bank: Bank, names: Sequence[str] = ()) -> list[str]:
    """The named layers; first, middle and last of the main path by default. Raises UsageError for an unknown name."""
    for name in names:
        if name not in bank.layers:
            raise UsageError(f"--layers: {unknown('layer', name, bank.layers)}")
    if names:
        return list(names)
    # A shortcut's layer repeats the input of its block; the main path tells the story in order.
    main = [layer for layer in bank.layers if "downsample" not in layer] or bank.layers
    return list(dict.fromkeys([main[0], main[len(main) // 2], main[-1]]))


def channel_curves(bank: Bank, layers: Sequence[str], channels: int = 32, relative: bool = False) -> pd.DataFrame:
    """The statistics of some channels of every layer, as curves to draw.

    Chosen are the `channels` of a layer that differ most between domains (all, if it has fewer): those with the largest
    share in the 2-Wasserstein distances summed over all pairs of domains. The choice treats all domains alike. In every
    curve they are sorted by their average over domains, which makes the curves comparable by eye.

    `relative` gives differences to that average, in units of the channel's average standard deviation.

    Columns: layer, statistic (mean or standard deviation), domain, channel (index in the layer), position (0-based
    place on the axis), value. One row per combination.
    """
    parts = []
    for layer in layers:
        spread = bank.mean[layer].var(axis=0) + bank.std[layer].var(axis=0)  # (C,), proportional to that share
        chosen = np.sort(np.argsort(-spread, kind="stable")[:channels])
        for statistic, rows in zip(STATISTICS, (bank.mean[layer], bank.std[layer]), strict=True):
            average = rows.mean(axis=0)
            order = chosen[np.argsort(average[chosen], kind="stable")]
            values = (rows - average) / bank.std[layer].mean(axis=0) if relative else rows
            part = pd.DataFrame(values[:, order], index=pd.Index(bank.domains, name="domain"), columns=order)
            part = part.rename_axis(columns="channel").stack().rename("value").reset_index()
            part["position"] = part["channel"].map({channel: place for place, channel in enumerate(order)})
            parts.append(part.assign(layer=layer, statistic=statistic))
    return pd.concat(parts, ignore_index=True)[["layer", "statistic", "domain", "channel", "position", "value"]]


def layer_distances(bank: Bank) -> NDArray[np.float64]:
    """(layers, K, K): see `lda.bank_distance.row_distances`."""
    return np.stack([row_distances(bank.mean[layer], bank.std[layer]) for layer in bank.layers])


def domain_distances(bank: Bank) -> pd.DataFrame:
    """(K, K) `layer_distances` averaged over layers; rows and columns are domains."""
    names = pd.Index(bank.domains, name="domain")
    return pd.DataFrame(layer_distances(bank).mean(axis=0), index=names, columns=list(bank.domains))


def closest_pairs(distances: pd.DataFrame) -> list[tuple[str, str, float]]:
    """Every pair of domains with its distance, the closest first."""
    names = list(distances.index)
    pairs = [(a, b, float(distances.loc[a, b])) for i, a in enumerate(names) for b in names[i + 1 :]]
    return sorted(pairs, key=lambda pair: pair[2])
