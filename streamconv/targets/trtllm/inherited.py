"""The options of a conversion whose source is a TensorRT-LLM checkpoint: what is not given stays as it is."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.tensor_table import TensorTable
from streamconv.errors import RefusedError
from streamconv.targets.trtllm.options import TensorRTLLM

_RANK = re.compile(r"rank(0|[1-9]\d{0,3})\.safetensors")
_EXPERTS = ("moe_tp_size", "moe_ep_size")
"""What follows from tp_size where nobody asks for something else."""


def is_rank_folder(folder: Path) -> bool:
    """Whether a folder holds rank files; config.json decides whether they can be read."""
    return os.path.lexists(folder / "rank0.safetensors") and os.path.lexists(folder / "config.json")


def stored_ranks(folder: Path) -> Index:
    """The tensors of all rank files, each behind the name of its rank; reads headers alone."""
    ranks = sorted((int(known[1]), path) for path in folder.iterdir() if (known := _RANK.fullmatch(path.name)))
    shards, tensors = tuple(Shard(path) for _, path in ranks), TensorTable()
    for number, shard in enumerate(shards):
        for tensor in shard.header().tensors.values():
            tensors.add(f"{shard.path.stem}.{tensor.name}", tensor.dtype, tensor.shape, number, tensor.begin)
    return Index(folder, {}, shards, tensors)


@dataclass(frozen=True, slots=True)
class Origin:
    """How the rank files of a source were made.

    Attributes:
        dtype: of what is not quantized, and of the scales of integers.
        cache_factors: layer -> float32 factor of its quantized KV cache.
        bound: that FP8 weights and activations were clamped to.
    """

    options: TensorRTLLM
    dtype: str
    bound: float | None = None
    cache_factors: Mapping[int, bytes] = field(default_factory=dict)


def origin_of(index: Index) -> Origin | None:
    """How a source was made, None if it is no TensorRT-LLM checkpoint."""
    return index.origin if isinstance(index.origin, Origin) else None


def inherited(options: TensorRTLLM, origin: Origin | None) -> TensorRTLLM:
    """The options with those of the source in the place of what was not given.

    Raises:
        RefusedError: the source is quantized, and another format is asked for.
    """
    if origin is None:
        return options
    old = origin.options
    if old.quant in ("fp8", "int4_awq"):
        message = f"the source is a checkpoint made with --quant {old.quant}, whose weights are not cut anew"
        raise RefusedError([message], hint="--to hf decodes them, and --to hf --quant keep keeps their codes; convert that")
    for name, none in (("quant", "none"), ("kv_cache", None)):
        was, asked = getattr(old, name), getattr(options, name)
        if name in options.given and was != none and asked != was:
            shown = f"--{name.replace('_', '-')} {was}"
            raise RefusedError(
                [f"the source is a checkpoint made with {shown}, which is kept or decoded, not made into another format"],
                hint="decode it first (--to hf), and convert that",
            )
    tp_size = options.tp_size if "tp_size" in options.given else old.tp_size
    left = set(_EXPERTS) if tp_size != old.tp_size or set(_EXPERTS) & options.given else set()
    names = {each.name for each in dataclasses.fields(options)} - options.given - left
    settled = dataclasses.replace(options, **{name: getattr(old, name) for name in names})
    laid_out = old.quant in ("int8", "int4", "int4_gptq", "int8_gptq") and old.encoding == "processed"
    if laid_out and (settled.encoding != old.encoding or settled.dtype not in (old.dtype, "auto", origin.dtype)):
        asked = f"--encoding {settled.encoding}" if settled.encoding != old.encoding else f"--dtype {settled.dtype}"
        message = f"{asked}: the source holds integers and their scales in {origin.dtype}, which stay as they are"
        raise RefusedError([message], hint="decode it first (--to hf), and convert that")
    split = settled.tp_size > 1 and not (settled.use_parallel_embedding and settled.embedding_sharding_dim == 0)
    if "use_embedding_sharing" in names and (split or settled.pp_size > 1):  # the new cut has no place for it
        settled = dataclasses.replace(settled, use_embedding_sharing=False)
    return settled
