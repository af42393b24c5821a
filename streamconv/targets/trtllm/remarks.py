"""What a user should know of a planned TensorRT-LLM checkpoint: values of the source that it cannot hold, or holds in another way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.quantized import SourceQuantization
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import printable
from streamconv.families import Family
from streamconv.lazy import np
from streamconv.targets.trtllm.config_sections import late_keys
from streamconv.targets.trtllm.lookup import TensorLookup
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import quant_of

_STEP = 4 << 20
"""Bytes of them that are compared at a time."""


def same_bytes(index: Index, roles: TensorLookup) -> bool:
    """Whether lm_head is a bit-identical copy of the embedding (only asked with --use-embedding-sharing)."""
    pair = _stored_pair(index, roles)  # Meta's path never shares
    if len(pair) < 2:
        return False
    step = max(1, _STEP // pair[0].stored_row_bytes)
    return same_rows(index.shards, pair, ((row, min(row + step, pair[0].rows)) for row in range(0, pair[0].rows, step)))


def about_lm_head(index: Index, roles: TensorLookup) -> list[str]:
    """A source that ties lm_head to the embedding and has another one all the same; the embedding is what 1.2 stores.

    Rows spread over both are compared, not all of them; nothing is fetched from the Hub for it.
    """
    pair = _stored_pair(index, roles)
    if len(pair) < 2 or any(type(index.shards[tensor.pieces[0].shard]) is not Shard for tensor in pair):
        return []
    if same_rows(index.shards, pair, spread(pair[0].rows)):
        return []
    message = "is not the embedding, to which config.json ties it (tie_word_embeddings): the embedding is stored, as TensorRT-LLM 1.2 does"
    return [f"{printable(pair[1].name)} {message}; set tie_word_embeddings to false to keep it"]


def _stored_pair(index: Index, roles: TensorLookup) -> list[SourceTensor]:
    """Embedding and lm_head, where both are tensors of the files."""
    names = [roles.found[key] for key in (("embedding", -1, -1), ("lm_head", -1, -1)) if key in roles.found]
    return [] if index.assembled is not None or index.views else [roles.tensors[name] for name in names]


def spread(rows: int) -> list[tuple[int, int]]:
    """Sixteen single rows, from the first to the last."""
    return [(row, row + 1) for row in sorted({number * (rows - 1) // 15 for number in range(16)})]


def same_rows(shards: Sequence[Shard], pair: Sequence[SourceTensor], rows: Iterable[tuple[int, int]]) -> bool:
    """Whether two tensors are of one dtype and shape, and hold the same in these rows."""
    if (pair[0].dtype, pair[0].shape) != (pair[1].dtype, pair[1].shape):
        return False
    for start, stop in rows:
        buffers = np.empty((2, (stop - start) * pair[0].stored_row_bytes), np.uint8)
        for tensor, out in zip(pair, buffers, strict=True):
            tensor.read(shards, start, stop, out, out[:0])
        if not bool((buffers[0] == buffers[1]).all()):
            return False
    return True


def about_kv_cache(quantization: SourceQuantization | None, options: TensorRTLLM) -> list[str]:
    """A quantized KV cache of the source that is not taken over."""
    if quantization is None or quantization.kv_algo in (None, "FP8" if options.kv_cache == "fp8" else None):
        return []
    return [f"{quantization.stated_in}: the source's KV cache in {quantization.kv_algo} is not taken over"]


def about_index(index: Index, spare: Sequence[str]) -> list[str]:
    """Where the index file and the files disagree without harm.

    Args:
        spare: tensors that the index file does not list and nothing needs.
    """
    findings = (
        (index.absent, "is listed in the index file, in no file, and needed by nothing"),
        (spare, "is not listed in the index file and not needed: left out"),
    )
    return [f"{printable(names[0])}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} {why}" for names, why in findings if names]


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
    message = "which early releases of TensorRT-LLM 1.x do not know and reject"
    return (f"config.json holds {late}, {message}: --target-version 1.0 leaves them out",)
