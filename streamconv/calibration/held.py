"""The memory of a calibration, from headers alone: what `plan` shows and a run refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from streamconv import memory
from streamconv.calibration.names import Names
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.untrusted import file_size
from streamconv.errors import BudgetError
from streamconv.families import Family
from streamconv.memory import MIB, show_size

_TORCH_BASE = 450 * MIB
"""Resident after torch and transformers are loaded (measured)."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER = 24
"""Bytes that a tokenizer takes for each of its file (measured for word-level and BPE ones of 200,000 tokens, rounded up)."""
_JITTER = 4
"""MiB by which the other process may differ when the hinted budget is used."""
_MODULE = 16 << 10
"""Bytes of a linear module beside its weights."""


@dataclass(frozen=True, slots=True)
class Held:
    """Attributes:
    layer: bytes of the largest decoder layer in the computing type.
    batch: of a batch inside it.
    extra: of what is made of its inputs, where the layer is.
    words: of the tokenizer.
    results: of all layers.
    """

    layer: int
    batch: int
    extra: int
    words: int
    results: int

    @classmethod
    def of(
        cls, index: Index, facts: ModelConfig, family: Family, tokens: int, itemsize: int, extra: int, kept: Callable[[int, int], int]
    ) -> Held:
        """Of a model.

        Args:
            tokens: of the largest batch.
            itemsize: bytes of the computing type.
            kept: see `Work.kept`.
        """
        layer, results, modules = 0, 0, 0
        for names in Names(index, family, facts.architecture).layers().values():
            entries = [index.tensors[name] for name in names]
            wide = [(prod(record.shape[:-2]), *record.shape[-2:]) for record in entries if len(record.shape) > 1]
            layer = max(layer, sum(record.nbytes // record.dtype.itemsize * itemsize for record in entries))
            results += sum(count * kept(rows, cols) for count, rows, cols in wide)
            modules = max(modules, sum(count for count, _, _ in wide))
        batch = tokens * (4 * facts.hidden_size + 3 * facts.intermediate_size) * max(itemsize, 4)
        folder = index.root if os.path.isdir(index.root) else index.root.parent
        words = _TOKENIZER * max(file_size(folder / name) for name in _TOKENIZERS)
        return cls(layer, batch, extra, words, results + _MODULE * modules)

    def host(self, device: str) -> int:
        """Bytes of the process."""
        return _TORCH_BASE + self.layer + self.batch + self.words + self.results + (self.extra if device == "cpu" else 0)

    @property
    def on_device(self) -> int:
        """Bytes of the device."""
        return self.layer + self.batch + self.extra

    def check(self, budget: int | None, device: str, smaller: str, room: int | None = None, beside: int = 0) -> None:
        """Refuse a budget, or a device, that it does not fit in.

        Args:
            budget: bytes; None: what is free.
            smaller: end of the hint.
            room: free bytes of the device; None for the CPU, or if nobody knows.
            beside: bytes of the budget that another process takes.

        Raises:
            BudgetError: says what is needed.
        """
        need, free = self.host(device) + beside, memory.available() if budget is None else budget
        if need > free:
            needs = f"one layer {show_size(self.layer)}, tokenizer {show_size(self.words)}, results {show_size(self.results)}"
            smallest = -(-need // MIB) + (_JITTER if beside else 0)
            raise BudgetError(
                f"calibration takes about {show_size(need)} ({needs}), and only {show_size(free)} may be used",
                hint=f"--memory-budget {smallest}MiB, or a smaller --batch-size or --max-length" + smaller,
            )
        need = self.on_device
        if room is not None and need > room:
            needs = f"calibration takes about {show_size(need)} of {device} (one layer {show_size(self.layer)}), which has"
            hint = "a GPU with more memory, a smaller --batch-size or --max-length" + smaller + ", or --device cpu"
            raise BudgetError(f"{needs} {show_size(room)} free", hint=hint)
