"""Which way a pass goes through layers that know several, and passes that leave no trace.

A layer with several ways reads `Switch.route` in its forward pass; what a route is, is the method's business. A layer
that keeps statistics of its own obeys `recording`, as `nn.BatchNorm2d` is made to by `statistics_held`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, TypeVar

from torch import Tensor, nn

Route = TypeVar("Route")


class Switch(Generic[Route]):
    """Says which way the pass under way takes; one object shared by all layers of a network."""

    def __init__(self) -> None:
        self._route: Route | None = None

    @property
    def route(self) -> Route:
        """The way of this pass. Raises RuntimeError outside `with switch.on(route)`."""
        if self._route is None:
            raise RuntimeError("this network needs a route: call it inside `with switch.on(...)`")
        return self._route

    @contextmanager
    def on(self, route: Route | None) -> Iterator[None]:
        """Take `route` inside the `with` block."""
        before, self._route = self._route, route
        try:
            yield
        finally:
            self._route = before

    def remembered(self) -> Callable[[], AbstractContextManager[None]]:
        """What puts the switch back to where it stands now, for a computation that is made again later."""
        route = self._route
        return lambda: self.on(route)


class RecordingLayer(nn.Module):
    """A layer that keeps statistics of what passes, while `recording` is True."""

    recording: bool = True


@contextmanager
def statistics_held(network: nn.Module) -> Iterator[None]:
    """Passes in here normalise as ever and leave running statistics and banks as they are, to the bit."""
    plain = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(layer.momentum, _copy(layer.num_batches_tracked)) for layer in plain]
    layers = [m for m in network.modules() if isinstance(m, RecordingLayer)]
    recording = [layer.recording for layer in layers]
    for layer in plain:
        layer.momentum = 0.0  # not track_running_stats: recomputation needs the same tensors saved both times
    for recorder in layers:
        recorder.recording = False
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(plain, before, strict=True):
            layer.momentum = momentum
            if count is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(count)
        for recorder, was in zip(layers, recording, strict=True):
            recorder.recording = was


def _copy(count: Tensor | None) -> Tensor | None:
    return None if count is None else count.clone()
