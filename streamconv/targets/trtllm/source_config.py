"""config.json of the Hugging Face model that a TensorRT-LLM checkpoint was made from: as it is recorded, or worked out from its own.

What is worked out gives the checkpoint's config.json again when it is converted: it undoes config_json.py, key by key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from streamconv.checkpoint.model_config import MODEL_TYPES
from streamconv.errors import CheckpointError, printable
from streamconv.families import family_of

Config = dict[str, Any]

_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_act": "hidden_act",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "rotary_scaling": "rope_scaling",
    "tie_word_embeddings": "tie_word_embeddings",
    "dtype": "torch_dtype",
}
_EXAONE = {"num_hidden_layers": "num_layers", "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon"}
_GEMMA = ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping")


def model_config(config: Mapping[str, Any], source: Mapping[str, Any] | None) -> Config:
    """A Hugging Face config.json with the dtype that the checkpoint has now.

    Args:
        source: that of the model, where it is recorded.

    Raises:
        CheckpointError: the architecture is unknown.
    """
    if source is not None:
        model = {key: value for key, value in source.items() if key != "quantization_config"}
        key = "dtype" if "dtype" in model and "torch_dtype" not in model else "torch_dtype"
        return model if str(model.get(key)).removeprefix("torch.") == config["dtype"] else model | {key: config["dtype"]}
    architecture = str(config.get("architecture"))
    kind = family_of(architecture).config_class
    model = {"architectures": [architecture]} | ({"model_type": MODEL_TYPES[architecture]} if architecture in MODEL_TYPES else {})
    model |= {theirs: config[ours] for ours, theirs in _NAMES.items() if ours in config}
    if config.get("remove_duplicated_kv_heads"):
        model["num_key_value_heads"] *= 2
    model |= _FAMILIES[kind](config, architecture)
    if architecture.startswith("Exaone"):
        model = {_EXAONE.get(key, key): value for key, value in model.items()}
    return model


def _llama(config: Mapping[str, Any], architecture: str) -> Config:
    moe = _section(config, "moe")
    entries: Config = {"bias" if architecture.startswith("InternLM") else "attention_bias": bool(config.get("attn_bias"))}
    if config.get("mlp_bias"):
        entries["mlp_bias"] = True
    if config.get("residual_mlp"):
        entries["parallel_attn_mlp_res"] = True
    if moe.get("num_experts"):
        entries |= {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe.get("top_k"), "hidden_act": "silu"}
    if architecture.startswith("Granite"):
        entries |= {key: config[key] for key in ("embedding_multiplier", "residual_multiplier") if key in config}
        if "attention_multiplier" in config:
            entries["attention_multiplier"] = _divided(config["attention_multiplier"], config["head_size"] ** 0.5)
        if "output_multiplier_scale" in config:
            entries["logits_scaling"] = 1.0 / config["output_multiplier_scale"]
    return entries


def _divided(product: float, factor: float) -> float:
    """The float whose product with a factor is rounded to this one."""
    near = product / factor
    return next((v for v in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)) if v * factor == product), near)


def _qwen(config: Mapping[str, Any], architecture: str) -> Config:
    moe = _section(config, "moe")
    entries: Config = {"use_logn_attn": True} if config.get("use_logn_attn") else {}
    if config.get("seq_length", 8192) != 8192:
        entries["seq_length"] = config["seq_length"]
    if moe.get("num_experts"):
        entries |= {"num_experts": moe["num_experts"], "num_experts_per_tok": moe.get("top_k"), "hidden_act": "silu"}
        entries |= {"moe_intermediate_size": config.get("moe_intermediate_size"), "norm_topk_prob": moe.get("normalization_mode") == 1}
        if config.get("moe_shared_expert_intermediate_size"):
            entries["shared_expert_intermediate_size"] = config["moe_shared_expert_intermediate_size"]
        entries |= {key: config[key] for key in ("mlp_only_layers", "decoder_sparse_step") if key in config}
    return entries


def _phi3(config: Mapping[str, Any], architecture: str) -> Config:
    entries: Config = {"hidden_act": "silu", "partial_rotary_factor": config.get("rotary_pct", 1.0)}
    if config.get("position_embedding_type") == "long_rope":
        factors = {"short_factor": config["longrope_scaling_short_factors"], "long_factor": config["longrope_scaling_long_factors"]}
        entries["rope_scaling"] = {"type": "longrope"} | factors
        entries["original_max_position_embeddings"] = config.get("original_max_position_embeddings", 4096)
    return entries


def _gemma(config: Mapping[str, Any], architecture: str) -> Config:
    entries: Config = {key: config[key] for key in _GEMMA if key in config}
    return entries | ({"rotary_scaling": config["rotary_scaling"]} if config.get("rotary_scaling") else {}) | {"tie_word_embeddings": True}


def _internlm2(config: Mapping[str, Any], architecture: str) -> Config:
    return {"bias": bool(config.get("attn_bias"))}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    if section is not None and not isinstance(section, dict):
        raise CheckpointError(f"config.json: {key} is {printable(repr(section), 60)}, not an object")
    return section or {}


_FAMILIES = {"llama": _llama, "qwen": _qwen, "phi3": _phi3, "gemma": _gemma, "internlm2": _internlm2}
