"""Tensors of one number, read while planning."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import np

_GAP = 1 << 16
"""Bytes between two of them that are read rather than skipped: for a model of the Hub each read is a request."""


def is_scale(value: float | None) -> bool:
    """Whether a number can be what codes are multiplied with."""
    return value is not None and math.isfinite(value) and value > 0


def read_scalars(tensors: Sequence[SourceTensor], shards: Sequence[Shard]) -> dict[str, float | None]:
    """Name -> value as float32; None for a tensor that has another number of elements than one."""
    found: dict[str, float | None] = {tensor.name: None for tensor in tensors}
    ordered = sorted((t for t in tensors if t.rows * t.cols == 1), key=lambda t: (t.pieces[0].shard, t.pieces[0].begin))
    while ordered:
        first = ordered[0].pieces[0]
        near, end = 0, first.begin
        for tensor in ordered:
            piece = tensor.pieces[0]
            if piece.shard != first.shard or piece.begin - end > _GAP:
                break
            near, end = near + 1, piece.begin + tensor.nbytes
        with shards[first.shard].window(first.begin, end) as window:
            for tensor in ordered[:near]:
                at = tensor.pieces[0].begin - first.begin
                data = np.frombuffer(bytes(window[at : at + tensor.nbytes]), tensor.dtype.storage)
                if tensor.dtype.name == "BF16":
                    value = (data.astype(np.uint32) << np.uint32(16)).view(np.float32)[0]
                else:
                    value = data.view({"F16": np.float16, "F32": np.float32}[tensor.dtype.name])[0]
                found[tensor.name] = float(value)
        ordered = ordered[near:]
    return found
