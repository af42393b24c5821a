"""The options that a checkpoint of another tool was made with, as far as its config.json and its tensors tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from streamconv.checkpoint.header_parse import TensorEntry
from streamconv.errors import VerifyError, printable
from streamconv.options import Version
from streamconv.targets.trtllm.expected_forms import SMOOTH
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import all_quants

_GENERATIONS: dict[Version, tuple[int, ...]] = {"0.16": (80, 90, 70), "1.2": (80, 90)}
"""A GPU for each weight layout."""
_MAPPING = ("tp_size", "pp_size", "cp_size", "moe_tp_size", "moe_ep_size")
_CONFIG = ("use_parallel_embedding", "embedding_sharding_dim", "remove_duplicated_kv_heads", "disable_weight_only_quant_plugin")
"""Options that config.json names as they are named here."""


def options_of(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[TensorRTLLM]:
    """Options that may have given this checkpoint; more than one where the bytes depend on what config.json does not say.

    Args:
        config: config.json, which has passed the checks of `verify`.
        tensors: those of rank 0.

    Raises:
        VerifyError: a weight format that streamconv does not write.
    """
    mapping, quantization = config["mapping"], config.get("quantization") or {}
    key, more = _quant(quantization.get("quant_algo"))
    versions = _versions(config, quantization)
    floats = any(name.endswith("attention.qkv.weight") and entry.dtype.is_float for name, entry in tensors.items())
    if key in ("int8", "int4") and floats:
        more["encoding"] = "raw"
    kv_cache, alpha = quantization.get("kv_cache_quant_algo"), quantization.get("smoothquant_val")
    kinds = {field.name: field.metadata["type"] for field in dataclasses.fields(TensorRTLLM)}
    for where, names in ((mapping, _MAPPING), (quantization, ("group_size",)), (config, _CONFIG)):
        for name in names:
            if where.get(name) is not None:
                more[name] = bool(where[name]) if kinds[name] is bool else _whole(where, name)
    options = TensorRTLLM(
        dtype=config["dtype"],
        quant=key,
        kv_cache=kv_cache.lower() if kv_cache in ("FP8", "INT8") else None,
        target_version=versions[0],
        use_embedding_sharing=bool(config.get("share_embedding_table")),
        use_meta_fp8_rowwise_recipe=bool(quantization.get("use_meta_recipe")),
        smoothquant=alpha if isinstance(alpha, float) else 0.5,
        rope_tables=any("embed_positions" in name for name in tensors),
        max_position_embeddings=_whole(config, "max_position_embeddings") or None,
        **more,
    )
    choices = [dataclasses.replace(options, target_version=version) for version in versions]
    if not all_quants()[key].info.sm_dependent or options.encoding == "raw":
        return choices
    return [dataclasses.replace(o, target_sm=sm) for o in choices for sm in _GENERATIONS[o.target_version]]


def _whole(where: Mapping[str, Any], key: str) -> int:
    value = where.get(key)
    if value is not None and type(value) is not int:
        raise VerifyError(f"config.json: {key} is {printable(repr(value), 60)}, not a whole number")
    return value or 0


def _quant(algo: object) -> tuple[str, dict[str, Any]]:
    if algo in (None, "NO_QUANT"):
        return "none", {}
    if algo in SMOOTH:
        return "smoothquant", {"per_channel": "PER_CHANNEL" in str(algo), "per_token": "PER_TOKEN" in str(algo)}
    for key, quant in all_quants().items():
        if quant.info.algo == algo:
            return key, {}
    raise VerifyError(f"--source: streamconv does not write quant_algo {printable(algo)}, so there is nothing to compare it with")


def _versions(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> tuple[Version, ...]:
    """The release lines that may have written a config.json, from the keys that only one of them has."""
    if "mamba_ssm_cache_dtype" in quantization or "moe_cluster_size" in config["mapping"]:
        return ("1.2",)
    if config.get("architecture") != "InternLM2ForCausalLM":
        return ("0.16",)
    return ("0.16", "1.2") if "share_embedding_table" in config else ("1.2", "0.16")
