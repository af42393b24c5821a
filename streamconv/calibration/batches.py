"""Samples of tokens put together: for a forward, and for reading their embeddings."""

from __future__ import annotations

from collections.abc import Iterator

from streamconv.memory import MIB

_GROUP = 32 * MIB
"""Bytes of embedded samples that are made together."""


def batches_of(ids: list[list[int]], size: int) -> list[list[list[int]]]:
    """Neighbours of equal length go together: no padding, so batching changes nothing but speed."""
    batches: list[list[list[int]]] = []
    for sample in ids:
        if batches and len(batches[-1]) < size and len(batches[-1][0]) == len(sample):
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def groups_of(samples: list[list[int]], token_bytes: int) -> Iterator[list[list[int]]]:
    """Samples whose embeddings are read together, so that rows that they share are read once."""
    group: list[list[int]] = []
    for sample in samples:
        if group and sum(map(len, group), len(sample)) * token_bytes > _GROUP:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
