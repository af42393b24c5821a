"""The three rotary tables that NVIDIA's converter leaves in its rank files; off by default.

The loader recomputes them, and the last bit depends on the math library, so they are written only with --rope-tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.dtypes import F32
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.untrusted import shown_value
from streamconv.errors import CheckpointError
from streamconv.lazy import Bytes, np
from streamconv.planning.draft import Draft
from streamconv.planning.matrix_table import Named
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.options import TensorRTLLM


@dataclass(frozen=True, slots=True)
class RopeTable(SourceTensor):
    """A table whose rows are computed when they are needed. kind: "positions", "frequencies" or "pairs"."""

    kind: str = ""
    base: float = 10000.0
    scaling: tuple[tuple[str, Any], ...] = ()

    @property
    def stored_row_bytes(self) -> int:
        return 0

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        out[:] = np.ascontiguousarray(self.fill(start, stop)).reshape(-1).view(np.uint8)

    def fill(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows [start, stop) as float32."""
        if self.kind == "frequencies":
            return _frequencies(self.base, 2 * self.rows, dict(self.scaling))[start:stop].reshape(-1, 1)
        # positions use base 10000 without scaling whatever the model says
        positions = self.kind == "positions"
        freq = _frequencies(10000.0, self.cols, {}) if positions else _frequencies(self.base, self.cols, dict(self.scaling))
        angle = np.arange(start, stop, dtype=np.float32)[:, None] * freq[None, :]
        if positions:
            return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
        return np.stack([np.cos(angle), np.sin(angle)], axis=2).reshape(stop - start, self.cols)


def _frequencies(base: float, dim: int, scaling: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Inverse frequencies float32 [dim/2], rounded where the official code rounds."""
    kind = scaling.get("type", scaling.get("rope_type", "none"))
    scale = 1.0
    if kind == "linear":
        scale = 1.0 / float(scaling.get("factor", 1.0))
    elif kind not in ("none", "llama3", "default"):
        scale = float(scaling.get("factor", 1.0))  # sic: the raw factor
    power = (float(base) ** (np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)
    freq = (np.float32(scale) / power).astype(np.float32)
    if kind != "llama3":
        return freq
    factor, low = float(scaling.get("factor", 8.0)), float(scaling.get("low_freq_factor", 1.0))
    high, old = float(scaling.get("high_freq_factor", 4.0)), float(scaling.get("original_max_position_embeddings", 8192))
    out = []
    for f in freq.astype(np.float64):
        wave = 2 * math.pi / f
        if wave < old / high:
            out.append(f)
        elif wave > old / low:
            out.append(f / factor)
        else:
            smooth = (old / wave - low) / (high - low)
            out.append((1 - smooth) * f / factor + smooth * f)
    return np.asarray(out, dtype=np.float64).astype(np.float32)


def add_tables(builder: Draft, model: ModelConfig, options: TensorRTLLM) -> None:
    """Add the tables to every rank file.

    Raises:
        CheckpointError: `rotary_pct` of the source is no share of a head.
    """
    length = options.max_position_embeddings or model.max_position_embeddings
    if not length:
        return
    share = model.raw.get("rotary_pct")
    share = 1.0 if share is None else share
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise CheckpointError(f"config.json: rotary_pct is {shown_value(share)}, not a number above 0 and at most 1")
    dim = int(model.head_size * share)
    scaling = tuple((model.rope_scaling or {}).items())
    base = float(model.rope_theta)
    tables = (
        ("embed_positions", "positions", (length, dim), (1, length, dim)),
        ("rotary_inv_freq", "frequencies", (dim // 2, 1), (dim // 2,)),
        ("embed_positions_for_gpt_attention", "pairs", (length, dim), (1, length * dim)),
    )
    for file in range(options.tp_size * options.pp_size):
        for name, kind, (rows, cols), shape in tables:
            matrix = builder.matrix(file, name, rows, cols, Plain(F32), spelling=Named(shape))
            builder.feed(matrix, RopeTable(name, F32, (rows, cols), (), kind=kind, base=base, scaling=scaling), 0, rows)
