"""A layer's forward as CUDA graphs: launching a layer's kernels one by one from Python takes longer than computing them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Shape = tuple[int, int]
"""Samples, tokens."""

_MOST = 64
"""Shapes that get a graph; every graph holds some device memory."""

_LEAST_USES = 4
"""Runs of a shape that pay for capturing it."""


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    input: torch.Tensor
    output: torch.Tensor


class Graphs:
    """The same forward on one shape after the other, replayed from the third time on; the numbers are those of the plain run.

    A forward that cannot be captured (it looks at values on the host, as some experts' routing does) goes on running as it is.

    Args:
        device: torch device; anything but a CUDA device runs plainly.
        uses: how often each shape will come.
    """

    def __init__(self, device: str, uses: Counter[Shape]) -> None:
        self._device = torch.device(device)
        often = [shape for shape, count in uses.most_common(_MOST) if count >= _LEAST_USES]
        self._worth = frozenset(often) if self._device.type == "cuda" else frozenset[Shape]()
        self._graphs: dict[Hashable, _Graph | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._worth else None

    def run(self, forward: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, kind: Hashable) -> torch.Tensor:
        """`forward(states)`, both [samples, tokens, hidden]; what comes back is good until the next call.

        Args:
            kind: what else decides which kernels run.
        """
        shape = (states.shape[0], states.shape[1])
        if shape not in self._worth:
            return forward(states)
        key = (shape, kind)
        if key not in self._graphs:  # libraries allocate and load at their first run, which a capture forbids
            self._graphs[key] = None
            return forward(states)
        graph = self._graphs[key]
        if graph is None:
            try:
                graph = self._graphs[key] = self._capture(forward, states)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:  # a step that a capture forbids
                self._worth = frozenset()
                torch.cuda.synchronize(self._device)
                return forward(states)
        graph.input.copy_(states)
        graph.graph.replay()
        return graph.output

    def _capture(self, forward: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> _Graph:
        with torch.cuda.device(self._device):
            inputs = states.clone()
            # torch's own stream for captures lies on the device of the first capture in this process, whichever that was
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            with torch.cuda.stream(stream):
                # A graph takes two of these when it begins. Where there is no room for them torch ends the process as it drops the
                # graph ("should be registered"); here that is an ordinary error, before there is a graph.
                room = [torch.empty(1, dtype=torch.int64, device=self._device) for _ in range(2)]
                del room
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool)
                try:
                    with _no_waiting():
                        output = forward(inputs)
                finally:
                    graph.capture_end()
        return _Graph(graph, inputs, output)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Refuse to wait for the device before CUDA does, which would break the capture: torch's allocator never learns of a broken
    one's end, and for the rest of the process it gives no cached memory back."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # that it is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
