"""A network's weights out of a file: read, matched by name, and every tensor's shape compared before one is taken."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lda.errors import UsageError

_SHOWN = 3  # tensors that a message names
_COUNTER = "num_batches_tracked"  # of BatchNorm layers: nothing reads it, and older files have none


@dataclass(frozen=True)
class LoadedWeights:
    """The file that a network began with.

    Attributes:
        sha256: of its bytes.
        matched: tensors of the network that the file filled.
        needed: tensors that the network has.
    """

    sha256: str
    matched: int
    needed: int


def load_weights(network: nn.Module, path: Path, head: str, older: Mapping[str, str] | None = None) -> LoadedWeights:
    """Fill a network from a state dict in its own key style, or in an older one.

    Args:
        head: what the names of the classifier begin with; it is left as it is, and the file need not have it.
        older: name of a tensor -> its name in the older style.

    Raises UsageError naming the file and what does not fit; then nothing was changed.
    """
    state, digest = _read(path)
    state = {key: value for key, value in state.items() if not key.startswith(head)}
    wanted = {name: value for name, value in network.state_dict().items() if not name.startswith(head)}
    names = {name: name for name in wanted}
    if older is not None:
        names = max(names, {name: older[name] for name in wanted}, key=lambda style: len(style.values() & state.keys()))
    names = {name: key for name, key in names.items() if key in state or not name.endswith(_COUNTER)}
    if problem := _misfit(state, {key: wanted[name] for name, key in names.items()}):
        raise UsageError(f"pretrained: {str(path)!r} does not fit {type(network).__name__}, {problem}")
    found = {name: state[key] for name, key in names.items()}
    network.load_state_dict(found, strict=False)
    return LoadedWeights(digest, len(found), len(names))


def flat_names(network: nn.Module) -> dict[str, str]:
    """Name of a tensor of torchvision's MobileNetV2 -> its name in the first files of that network, where a block's
    layers are counted in one row: features.2.conv.1.0 is features.2.conv.3 there."""
    from torchvision.models.mobilenetv2 import InvertedResidual  # late, as in backbones.py

    flat: dict[str, str] = {}
    for name, block in network.named_modules():
        if isinstance(block, InvertedResidual):
            layers = [inner for inner, layer in block.conv.named_modules() if not list(layer.children())]
            flat |= {f"{name}.conv.{inner}": f"{name}.conv.{number}" for number, inner in enumerate(layers)}
    places = {key: key.rpartition(".") for key in network.state_dict()}
    return {key: f"{flat.get(layer, layer)}.{tensor}" for key, (layer, _, tensor) in places.items()}


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """A state dict, and the SHA-256 of the very bytes that it was read from."""
    if not path.is_file():
        raise UsageError(
            f"pretrained: {str(path)!r} is not a file; expected none, imagenet or a torchvision state dict"
        )
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):  # the file is not to blame
        raise
    except Exception as error:  # torch raises half a dozen types for a file that is no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"pretrained: cannot read {str(path)!r} as a torch state dict: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UsageError(f"pretrained: {str(path)!r} holds no state dict: expected names and tensors")
    return state, hashlib.sha256(content).hexdigest()


def _misfit(state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> str:
    """What is wrong with a state dict, as a clause; "" where nothing is."""
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    wrong = [
        f"{key} is {_kind(state[key])} and should be {_kind(value)}"
        for key, value in wanted.items()
        if key in state and _kind(state[key]) != _kind(value)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    return "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys)


def _kind(value: object) -> str:
    """Shape and sort of numbers, of whatever precision."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    sort = "" if value.is_floating_point() else " of whole numbers"
    return f"{' x '.join(map(str, value.shape)) or 'one number'}{sort}"


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{', '.join(keys[:_SHOWN])}{more}"
