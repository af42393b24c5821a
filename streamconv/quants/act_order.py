"""Act order: the group of each input channel, where groups do not come one after the other (g_idx)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamconv.checkpoint.rows import SourceTensor, content
from streamconv.checkpoint.shard import Shard
from streamconv.errors import CheckpointError, printable
from streamconv.lazy import np


def groups_of(order: SourceTensor | None, cols: int, groups: int, shards: Sequence[Shard]) -> np.ndarray[Any, Any]:
    """int32 [K]: the group of each input channel.

    Raises:
        CheckpointError: the file names a group that there is not, or gives one more channels than another.
    """
    if order is None:
        return np.arange(cols, dtype=np.int32) // np.int32(cols // groups)
    found = np.empty(cols, np.int32)
    order.read(shards, 0, cols, found.view(np.uint8), found.view(np.uint8)[:0])
    if found.min() < 0 or found.max() >= groups:
        raise CheckpointError(f"{printable(order.name)} names a group that there is not: there are {groups}")
    if (np.bincount(found, minlength=groups) != cols // groups).any():
        raise CheckpointError(f"{printable(order.name)} does not give {cols // groups} input features to each group")
    return found


def in_order(order: SourceTensor, shards: Sequence[Shard], group: int) -> bool:
    """Whether g_idx, int32 [K], says that groups come one after the other: K / group whole ones."""
    return content(order, shards) == np.repeat(np.arange(order.rows // group, dtype="<i4"), group).tobytes()
