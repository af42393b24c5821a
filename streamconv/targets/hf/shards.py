"""Which file of the output takes which tensors."""

from __future__ import annotations

from collections.abc import Iterable

from streamconv.checkpoint.index import Index

_SHARD = 5 * 10**9
"""Bytes of a file where the source's files are cut in another way: what transformers takes."""


def shards_of(index: Index, tensors: Iterable[tuple[str, int, int]], most: int | None) -> dict[str, list[str]]:
    """Output file -> the tensors that it takes, in order.

    Args:
        tensors: name, number of the source's shard that holds it, and bytes.
        most: bytes of a file; None splits as the source does.
    """
    if index.views:
        most = most or _SHARD
    if most is None:
        names = output_names([shard.path.name for shard in index.shards])
        found: dict[str, list[str]] = {}
        for tensor, file, _ in tensors:
            found.setdefault(names[file], []).append(tensor)
        return dict(sorted(found.items()))
    shards: list[list[str]] = [[]]
    held = 0
    for tensor, _, nbytes in tensors:
        if shards[-1] and held + nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": part for n, part in enumerate(shards, 1)}


def output_names(names: list[str]) -> list[str]:
    """Names of the output's files for those of the source."""
    if len(names) == 1:
        return ["model.safetensors"]
    found = []
    for name in names:
        stem = name.rpartition(".")[0]
        found.append(("model" + stem.removeprefix("pytorch_model") if stem.startswith("pytorch_model") else stem) + ".safetensors")
    return found
