"""What a user should know of a planned TensorRT-LLM checkpoint: values of the source that it cannot hold, or holds in another way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.quantized import SourceQuantization
from streamconv.checkpoint.shard import Shard
from streamconv.errors import printable
from streamconv.families import Family
from streamconv.targets.trtllm.config_sections import late_keys
from streamconv.targets.trtllm.lookup import TensorLookup
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import quant_of

_PLACES = 16
"""Places of two tensors that are compared."""


def same_bytes(index: Index, roles: TensorLookup) -> bool:
    """Whether lm_head is a bit-identical copy of the embedding (only asked with --use-embedding-sharing)."""
    names = [roles.found.get((role, -1, -1)) for role in ("embedding", "lm_head")]
    if index.assembled is not None or index.views or any(name not in index.tensors for name in names):
        return False  # Meta's path never shares
    first, second = (index.tensors[name] for name in names if name is not None)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    step = 4 << 20
    for at in range(0, first.nbytes, step):
        size = min(step, first.nbytes - at)
        with index.shards[first.shard].window(first.begin + at, first.begin + at + size) as a:
            left = bytes(a)
        with index.shards[second.shard].window(second.begin + at, second.begin + at + size) as b:
            if left != bytes(b):
                return False
    return True


def about_lm_head(index: Index, roles: TensorLookup) -> list[str]:
    """A source that ties lm_head to the embedding and has another one all the same; the embedding is what 1.2 stores.

    Places spread over both are compared, not all of them; nothing is fetched from the Hub for it.
    """
    names = [roles.found.get((role, -1, -1)) for role in ("embedding", "lm_head")]
    if index.assembled is not None or index.views or any(name not in index.tensors for name in names):
        return []
    first, second = (index.tensors[name] for name in names if name is not None)
    shards = [index.shards[record.shard] for record in (first, second)]
    if any(type(shard) is not Shard for shard in shards):
        return []
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    size = min(4096, first.nbytes)
    for number in range(_PLACES if same else 0):
        at = (first.nbytes - size) * number // (_PLACES - 1)
        with shards[0].window(first.begin + at, first.begin + at + size) as a:
            left = bytes(a)
        with shards[1].window(second.begin + at, second.begin + at + size) as b:
            same = same and left == bytes(b)
    if same:
        return []
    told = "is not the embedding, to which config.json ties it (tie_word_embeddings): the embedding is stored, as TensorRT-LLM 1.2 does"
    return [f"{printable(names[1] or '')} {told}; set tie_word_embeddings to false to keep it"]


def about_kv_cache(stated: SourceQuantization | None, options: TensorRTLLM) -> list[str]:
    """A quantized KV cache of the source that is not taken over."""
    if stated is None or stated.kv_algo in (None, "FP8" if options.kv_cache == "fp8" else None):
        return []
    return [f"{stated.stated_in}: the source's KV cache in {stated.kv_algo} is not taken over"]


def about_index(index: Index, spare: Sequence[str]) -> list[str]:
    """Where the index file and the files disagree without harm.

    Args:
        spare: tensors that the index file does not list and nothing needs.
    """
    told = (
        (index.absent, "is listed in the index file, in no file, and needed by nothing"),
        (spare, "is not listed in the index file and not needed: left out"),
    )
    return [f"{printable(names[0])}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} {why}" for names, why in told if names]


def about_model(model: ModelConfig, options: TensorRTLLM, family: Family) -> list[str]:
    lines = list(model.notes)
    scaling = model.rope_scaling or {}
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind == "yarn" and options.target_version == "0.16":
        lines.append("rope_scaling type yarn: TensorRT-LLM 0.16 has no yarn mathematics")
    least = quant_of(options.quant).info.least_sm
    if least and options.target_sm is not None and options.target_sm < least:
        lines.append(f"--quant {options.quant}: TensorRT-LLM's kernels for it need SM {least} or later, not {options.target_sm}")
    if options.use_embedding_sharing and options.target_version != "0.16":
        lines.append("--use-embedding-sharing has no effect for 1.x, which decides sharing when the engine is built")
    if options.target_sm and options.target_sm >= 100 and options.encoding == "processed":
        lines.append(f"--target-sm {options.target_sm}: releases of TensorRT-LLM differ in its layout; --encoding raw is portable")
    if model.raw.get("sliding_window") and family.config_class == "llama":
        lines.append("sliding_window is not part of a TensorRT-LLM checkpoint; it is dropped, as NVIDIA's converter does")
    if model.mlp_bias and family.config_class == "llama" and "gate_bias" in family.tensors:
        lines.append("mlp_bias: written, though NVIDIA's converter drops these biases")
    if model.partial_rotary_factor != 1 and family.config_class != "phi3":
        lines.append(
            f"config.json: partial_rotary_factor {model.partial_rotary_factor:g} is dropped, as NVIDIA's converter does: TensorRT-LLM"
            f" rotates whole heads of {family.name}"
        )
    if model.dtype is None and options.dtype == "auto":
        lines.append(f"config.json states no dtype: float16 is assumed ({printable(model.architecture)})")
    return lines


def late_notes(config: dict[str, Any]) -> tuple[str, ...]:
    """What is right for the release that was asked for, and not for every one of its line."""
    late = late_keys(config)
    if late is None:
        return ()
    told = "which early releases of TensorRT-LLM 1.x do not know and reject"
    return (f"config.json holds {late}, {told}: --target-version 1.0 leaves them out",)
