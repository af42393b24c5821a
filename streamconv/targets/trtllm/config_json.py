"""config.json, key for key and byte for byte.

Key order is the official one: a family's own attributes come first where its class sets them first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from streamconv.checkpoint.model_config import ModelConfig
from streamconv.targets.trtllm.config_sections import Config, mapping_section, moe_section, quantization_section
from streamconv.targets.trtllm.options import TensorRTLLM


def build_config(
    model: ModelConfig,
    options: TensorRTLLM,
    *,
    config_class: str = "llama",
    dtype: str,
    quantization: Mapping[str, Any] | None = None,
    calibrated: bool = False,
    share_embedding_table: bool = False,
) -> Config:
    """The configuration of a checkpoint.

    Args:
        config_class: key of CONFIG_CLASSES (the family table names it).
        dtype: resolved dtype.
        quantization: entries that replace those derived from the options.
        calibrated: the calibration path, which leaves the sizes of attention in `mapping` and appends two bookkeeping keys.
        share_embedding_table: lm_head is left out (0.16).
    """
    config = CONFIG_CLASSES[config_class](model, options, dtype, share_embedding_table)
    if quantization:
        config["quantization"].update(quantization)
    if calibrated and config_class in ("llama", "qwen") and "attn_tp_size" in config["mapping"]:
        config["mapping"] = mapping_section(options, attention_sizes=True)
    if calibrated and config_class == "llama":
        config |= {"quant_ckpt_path": None, "load_model_on_cpu": False}
    if calibrated and config_class == "qwen" and options.target_version != "0.16":
        config |= {"device": "cuda", "load_model_on_cpu": False}
    return config


def dump(config: Config) -> bytes:
    """The bytes of config.json: four spaces, ASCII, no newline at the end."""
    return json.dumps(config, indent=4).encode()


def _base(model: ModelConfig, options: TensorRTLLM, dtype: str, shared: bool, **changes: Any) -> Config:
    """The keys that all classes of models share."""
    kv = model.num_key_value_heads // (2 if options.remove_duplicated_kv_heads else 1)
    config = {
        "architecture": model.architecture,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": model.hidden_act,
        "logits_dtype": "float32",
        "norm_epsilon": model.norm_eps,
        "runtime_defaults": None,
        "position_embedding_type": "rope_gpt_neox",
        "num_key_value_heads": kv,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": options.max_position_embeddings or model.max_position_embeddings,
        "mapping": mapping_section(options),
        "quantization": quantization_section(options),
        "use_parallel_embedding": options.use_parallel_embedding,
        "embedding_sharding_dim": options.embedding_sharding_dim,
    }
    if options.target_version == "0.16":
        config["share_embedding_table"] = shared
    config["head_size"] = model.head_size
    config["qk_layernorm"] = False
    config["rotary_embedding_dim"] = model.head_size
    unknown = set(changes) - set(config)
    if unknown:
        raise AssertionError(f"no such keys: {unknown}")
    return config | changes


def _llama(model: ModelConfig, options: TensorRTLLM, dtype: str, shared: bool) -> Config:
    new = options.target_version != "0.16"
    raw = model.raw
    mixtral = model.architecture.startswith("Mixtral")  # as the tensors: model_type may be missing, or say something else
    head = {
        "mlp_bias": model.mlp_bias,
        "attn_bias": model.attention_bias,
        "rotary_base": model.rope_theta,
        "rotary_scaling": model.rope_scaling,
        "residual_mlp": bool(raw.get("parallel_attn_mlp_res", False)),
        "disable_weight_only_quant_plugin": options.disable_weight_only_quant_plugin,
        "moe": moe_section(
            model.num_experts,
            model.experts_per_token if model.num_experts else 0,
            1 if mixtral or model.source == "meta" else None,
        ),
        "remove_duplicated_kv_heads": options.remove_duplicated_kv_heads,
        "fc_after_embed": False,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "layer_idx_offset": 0,
    }
    if new:
        attention = raw.get("attention_multiplier", 1.0)
        head |= {
            "embedding_multiplier": raw.get("embedding_multiplier", 1.0),
            "attention_multiplier": attention if attention == 1.0 else attention * model.head_size**0.5,
            "residual_multiplier": raw.get("residual_multiplier", 1.0),
            "output_multiplier_scale": 1.0 / raw.get("logits_scaling", 1.0),
            "has_partial_lora_mask": False,
        }
    act = "swiglu" if mixtral else model.hidden_act
    config = head | _base(model, options, dtype, shared, hidden_act=act)
    if new and model.source == "hf":
        config["tie_word_embeddings"] = model.tie_word_embeddings
    return config


def _qwen(model: ModelConfig, options: TensorRTLLM, dtype: str, shared: bool) -> Config:
    new = options.target_version != "0.16"
    raw = model.raw
    moe = model.num_experts > 0
    qwen3 = model.architecture.startswith("Qwen3")
    head: Config = {
        "mlp_bias": False,
        "attn_bias": not qwen3,
        "rotary_base": model.rope_theta,
        "rotary_scaling": model.rope_scaling,
        "disable_weight_only_quant_plugin": options.disable_weight_only_quant_plugin,
        "num_labels": 1,
    }
    if new:
        head["use_logn_attn"] = bool(raw.get("use_logn_attn", False))
    if options.target_version == "1.2":
        head |= {"mlp_only_layers": raw.get("mlp_only_layers") or [], "decoder_sparse_step": raw.get("decoder_sparse_step", 1)}
    # NVIDIA writes 0 for every model, and those with norm_topk_prob then compute wrong weights of experts
    mode = 1 if moe and raw.get("norm_topk_prob") else 0
    head["moe"] = moe_section(model.num_experts, model.experts_per_token if moe else 0, mode)
    size = model.head_size
    if not new and raw.get("kv_channels") is None:
        size = model.hidden_size // model.num_attention_heads  # 0.16 does not look at head_dim
    config = head | _base(
        model,
        options,
        dtype,
        shared,
        hidden_act="swiglu" if moe else model.hidden_act,
        head_size=size,
        rotary_embedding_dim=size,
    )
    if new:
        config["seq_length"] = raw.get("seq_length", 8192)
    return config | {
        "qwen_type": model.model_type,
        "moe_intermediate_size": model.moe_intermediate_size or 0,
        "moe_shared_expert_intermediate_size": raw.get("shared_expert_intermediate_size") or 0,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


def _phi3(model: ModelConfig, options: TensorRTLLM, dtype: str, shared: bool) -> Config:
    long = (model.max_position_embeddings or 0) >= 128000
    scaling = model.rope_scaling or {}
    size = model.hidden_size // model.num_attention_heads
    config = {"rotary_base": model.rope_theta, "rotary_scaling": None} | _base(
        model,
        options,
        dtype,
        shared,
        hidden_act="swiglu",
        position_embedding_type="long_rope" if long else "rope_gpt_neox",
        head_size=size,
        rotary_embedding_dim=int(size * model.partial_rotary_factor),
        mapping=mapping_section(options, attention_sizes=True),
    )
    if options.target_version != "0.16":  # rotary_pct: the loader fails without it
        config |= {"rotary_pct": model.partial_rotary_factor, "tie_word_embeddings": model.tie_word_embeddings}
    if long:
        config |= {
            "original_max_position_embeddings": model.raw.get("original_max_position_embeddings", 4096),
            "longrope_scaling_short_factors": scaling.get("short_factor"),
            "longrope_scaling_long_factors": scaling.get("long_factor"),
        }
    return config


def _gemma(model: ModelConfig, options: TensorRTLLM, dtype: str, shared: bool) -> Config:
    second = model.architecture.startswith("Gemma2")
    mapping = mapping_section(options, attention_sizes=True)
    config = _base(model, options, dtype, shared, hidden_act=model.hidden_act or "gelu", mapping=mapping)
    # quirks of this family's own command line
    config["quantization"]["smoothquant_val"] = None
    if options.quant in ("int8", "int4"):
        config["quantization"]["pre_quant_scale"] = True
    config |= {
        "rotary_base": model.rope_theta if options.target_version != "0.16" else 10000.0,
        "attn_bias": False,
        "mlp_bias": False,
        "rotary_scaling": model.raw.get("rotary_scaling"),
        "inter_layernorms": second,
    }
    if second:
        config |= {
            "query_pre_attn_scalar": model.raw.get("query_pre_attn_scalar", 256),
            "final_logit_softcapping": model.raw.get("final_logit_softcapping", 30.0),
            "attn_logit_softcapping": model.raw.get("attn_logit_softcapping", 50.0),
        }
    return config


def _internlm2(model: ModelConfig, options: TensorRTLLM, dtype: str, shared: bool) -> Config:
    base = _base(model, options, dtype, shared)
    config: Config = {key: model.rope_theta if key == "rotary_base" else base[key] for key in _INTERNLM2}
    config["num_key_value_heads"] = model.num_key_value_heads
    if options.target_version == "0.16":
        config["share_embedding_table"] = shared
    config["quantization"] = {"quant_algo": base["quantization"]["quant_algo"]}
    config["mapping"] = {"world_size": options.tp_size * options.pp_size, "tp_size": options.tp_size, "pp_size": options.pp_size}
    if options.target_version != "0.16":
        config["has_partial_lora_mask"] = False
    config |= {"attn_bias": model.attention_bias, "rotary_scaling": model.rope_scaling}
    if options.kv_cache:
        config["quantization"]["kv_cache_quant_algo"] = options.kv_cache.upper()
    return config


_INTERNLM2 = (
    *("architecture", "dtype", "logits_dtype", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"),
    *("intermediate_size", "norm_epsilon", "vocab_size", "position_embedding_type", "rotary_base", "max_position_embeddings"),
    *("hidden_act", "use_parallel_embedding", "embedding_sharding_dim"),
)
"""Its first keys, in order."""


CONFIG_CLASSES: dict[str, Callable[[ModelConfig, TensorRTLLM, str, bool], Config]] = {
    "llama": _llama,
    "qwen": _qwen,
    "phi3": _phi3,
    "gemma": _gemma,
    "internlm2": _internlm2,
}
