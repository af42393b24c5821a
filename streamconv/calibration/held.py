"""The memory of a calibration, from headers alone: what `plan` shows and a run refuses."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv import memory
from streamconv.calibration.names import Names
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.errors import BudgetError
from streamconv.families import Family
from streamconv.memory import MIB, show_size

_TORCH_BASE = 450 * MIB
"""Resident after torch and transformers are loaded (measured)."""


@dataclass(frozen=True, slots=True)
class Held:
    """Attributes:
    layer: bytes of one decoder layer in the computing type.
    batch: of a batch inside it.
    extra: of what is made of its inputs, where the layer is.
    """

    layer: int
    batch: int
    extra: int

    @classmethod
    def of(cls, index: Index, facts: ModelConfig, family: Family, tokens: int, itemsize: int, extra: int) -> Held:
        """Of a model.

        Args:
            tokens: of the largest batch.
            itemsize: bytes of the computing type.
        """
        held = [index.tensors[name] for name in Names(index, family, facts.architecture).layer(0)]
        layer = sum(record.nbytes // record.dtype.itemsize * itemsize for record in held)
        return cls(layer, tokens * (4 * facts.hidden_size + 3 * facts.intermediate_size) * max(itemsize, 4), extra)

    def host(self, device: str) -> int:
        """Bytes of the process."""
        return _TORCH_BASE + self.layer + self.batch + (self.extra if device == "cpu" else 0)

    def check(self, budget: int | None, device: str, smaller: str, room: int | None = None) -> None:
        """Refuse a budget, or a device, that it does not fit in.

        Args:
            budget: bytes; None: what is free.
            device: "cpu" or another.
            smaller: end of the hint.
        room: free bytes of the device; None for the CPU, or if nobody knows.

        Raises:
            BudgetError: says what is needed.
        """
        need, free = self.host(device), memory.available() if budget is None else budget
        if need > free:
            raise BudgetError(
                f"calibration takes about {show_size(need)} (one layer {show_size(self.layer)}), and only {show_size(free)} may be used",
                hint=f"--memory-budget {-(-need // MIB)}MiB, or a smaller --batch-size or --max-length" + smaller,
            )
        need = self.layer + self.batch + self.extra
        if room is not None and need > room:
            told = f"calibration takes about {show_size(need)} of {device} (one layer {show_size(self.layer)}), which has"
            hint = "a GPU with more memory, a smaller --batch-size or --max-length" + smaller + ", or --device cpu"
            raise BudgetError(f"{told} {show_size(room)} free", hint=hint)
