"""What a run does with each layer while all samples go through it: activation ranges, or a search for INT4 codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from streamconv.calibration.layers import OneLayer
    from streamconv.calibration.scratch import Scratch
    from streamconv.checkpoint.model_config import ModelConfig


class Work(Protocol):
    """One kind of result.

    Attributes:
        name: what its file holds, for messages.
        smaller: how the user makes it need less memory, if at all; the end of a hint.
        asked: what decides the numbers beside the model and the samples.
        captured: the forward may be captured in a graph: whatever the hooks do is done on the device, in buffers that stay.
    """

    name: str
    smaller: str
    asked: Any
    captured: bool

    def holds(self, path: Path) -> str | None:
        """`name`, if a file in the place of the result holds something else; None if it may be replaced."""

    def extra(self, facts: ModelConfig) -> int:
        """Bytes that it needs beside the layer and a batch."""

    def kept(self, rows: int, cols: int) -> int:
        """Bytes that the results of a linear layer [rows, cols] take until the end."""

    def open(self, layer: OneLayer, scratch: Scratch, tokens: int, facts: dict[str, Any]) -> None:
        """The model and the samples are known to be good; called once, before the first layer."""

    def watch(self, layer: torch.nn.Module) -> None:
        """Put hooks on a layer that was built anew."""

    def passes(self, layer: OneLayer) -> Sequence[Callable[[], None]]:
        """The weights of a layer are loaded: what begins each pass of all samples through it."""

    def finish(self, layer: OneLayer) -> dict[str, torch.Tensor]:
        """All samples went through: small results to be kept, by name; whatever it wrote itself is synced."""

    def notes(self, results: dict[str, torch.Tensor]) -> list[str]:
        """What the user should know of the results, a line each."""

    def write(self, results: dict[str, torch.Tensor], new: Path, facts: dict[str, Any]) -> int:
        """Write the file of the results; gives the number of its tensors."""
