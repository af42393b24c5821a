"""What a user should know of a planned TensorRT-LLM checkpoint: values of the source that it cannot hold, or holds in another way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.quantized import SourceQuantization
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.tensor_table import TensorRecord
from streamconv.errors import printable
from streamconv.families import Family
from streamconv.targets.trtllm.config_sections import late_keys
from streamconv.targets.trtllm.lookup import TensorLookup
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import quant_of

_STEP = 4 << 20
"""Bytes of them that are compared at a time."""
_PLACES = 16
"""Places of two tensors that are compared."""


def same_bytes(index: Index, roles: TensorLookup) -> bool:
    """Whether lm_head is a bit-identical copy of the embedding (only asked with --use-embedding-sharing)."""
    pair = _stored_pair(index, roles)  # Meta's path never shares
    return pair is not None and _alike(index, pair, range(0, pair[0].nbytes, _STEP), _STEP)


def about_lm_head(index: Index, roles: TensorLookup) -> list[str]:
    """A source that ties lm_head to the embedding and has another one all the same; the embedding is what 1.2 stores.

    Places spread over both are compared, not all of them; nothing is fetched from the Hub for it.
    """
    pair = _stored_pair(index, roles)
    if pair is None or any(type(index.shards[record.shard]) is not Shard for record in pair):
        return []
    size = min(4096, pair[0].nbytes)
    if _alike(index, pair, ((pair[0].nbytes - size) * number // (_PLACES - 1) for number in range(_PLACES)), size):
        return []
    told = "is not the embedding, to which config.json ties it (tie_word_embeddings): the embedding is stored, as TensorRT-LLM 1.2 does"
    name = printable(roles.found["lm_head", -1, -1])
    return [f"{name} {told}; set tie_word_embeddings to false to keep it"]


def _stored_pair(index: Index, roles: TensorLookup) -> tuple[TensorRecord, TensorRecord] | None:
    """Embedding and lm_head, where both are tensors of the files."""
    first, second = (index.tensors.get(roles.found.get((role, -1, -1), "")) for role in ("embedding", "lm_head"))
    return None if index.assembled is not None or index.views or first is None or second is None else (first, second)


def _alike(index: Index, pair: tuple[TensorRecord, TensorRecord], places: Iterable[int], size: int) -> bool:
    """Whether two tensors are of one dtype and shape, and hold the same `size` bytes at each of the places."""
    if (pair[0].dtype, pair[0].shape) != (pair[1].dtype, pair[1].shape):
        return False
    for at in places:
        held = list[bytes]()
        for record in pair:
            with index.shards[record.shard].window(record.begin + at, record.begin + min(at + size, record.nbytes)) as data:
                held.append(bytes(data))
        if held[0] != held[1]:
            return False
    return True


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
