"""Experts that a source stores as one tensor [E, ...]: engines want one 2-D weight for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from streamconv.checkpoint.rows import SourceTensor
from streamconv.targets.hf.sources import Stored

_TRANSPOSED = ("llama4", "llama4_text", "gpt_oss")
"""Model types that store stacked experts as [E, in, out]."""


def unstack(stored: Stored, config: Mapping[str, Any]) -> None:
    """`X.experts.gate_up_proj` [E, 2I, H] -> `X.experts.{e}.gate_proj.weight`, `.up_proj.weight`; `X.experts.down_proj` likewise.

    The gate is the first half. What is stored transposed stays as it is: its rows are no output features.
    """
    text = config.get("text_config")
    types = {part.get("model_type") for part in (config, text) if isinstance(part, dict)}
    if types & set(_TRANSPOSED):
        return
    for name in [name for name, shape in stored.shapes.items() if len(shape) == 3]:
        stem = name.removesuffix(".weight")
        module, _, last = stem.rpartition(".")
        whole = stored.weights[name]
        if not module.endswith("experts") or last not in ("gate_up_proj", "down_proj") or not isinstance(whole, SourceTensor):
            continue
        _split(stored, name, whole, module, ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",))


def _split(stored: Stored, name: str, whole: SourceTensor, module: str, parts: tuple[str, ...]) -> None:
    experts, rows, cols = stored.shapes.pop(name)
    del stored.weights[name]
    file, each = stored.files.pop(name), rows // len(parts)
    for expert in range(experts):
        for number, part in enumerate(parts):
            made = f"{module}.{expert}.{part}.weight"
            stored.weights[made] = _rows_of(whole, made, expert * rows + number * each, each)
            stored.shapes[made] = (each, cols)
            stored.files[made] = file


def _rows_of(whole: SourceTensor, name: str, first: int, rows: int) -> SourceTensor:
    """Rows [first, first + rows) of a tensor as one of their own."""
    piece = whole.pieces[0]
    begin = piece.begin + first * whole.stored_row_bytes
    return dataclasses.replace(whole, name=name, shape=(rows, whole.cols), pieces=(piece._replace(begin=begin, rows=rows),))
