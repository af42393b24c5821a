"""config.json from the size flags of the official command line, when it names no checkpoint.

NVIDIA's script writes fewer keys here than for a checkpoint; its loader has defaults for the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamconv.checkpoint.model_config import ModelConfig
from streamconv.errors import RefusedError, UsageError
from streamconv.families import family_of
from streamconv.targets.trtllm.checks import refusals
from streamconv.targets.trtllm.config_json import dump
from streamconv.targets.trtllm.config_sections import Config, mapping_section, quantization_section, resolve_dtype, resolve_moe

if TYPE_CHECKING:
    from streamconv.cli.official_flags import OfficialRequest

_MADE_ELSEWHERE = {"fp8": "FP8", "nvfp4": "NVFP4", "qserve": "W4A8_QSERVE_PER_CHANNEL"}
"""Formats whose weights only other tools make; a config.json can name them."""
_MAPPING = ("world_size", "tp_size", "pp_size", "moe_tp_size", "moe_ep_size")


def config_from_flags(request: OfficialRequest) -> bytes:
    """The bytes of config.json.

    Raises:
        UsageError: a size that is none.
        RefusedError: sizes that cannot be split as asked; all reasons are listed.
    """
    sizes, options = request.sizes, request.options
    for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_kv_head", "n_embd", "inter_size"):
        value = getattr(sizes, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} is not a positive number")
    if sizes.n_embd % sizes.n_head:
        raise UsageError(f"--n_embd {sizes.n_embd} is not a multiple of --n_head {sizes.n_head}")
    if sizes.moe_num_experts < 0 or sizes.moe_top_k < 0 or (sizes.moe_top_k and not sizes.moe_num_experts):
        raise UsageError("--moe_top_k goes with --moe_num_experts, and neither is negative")
    dtype = resolve_dtype(options.dtype, None)
    kv = sizes.n_kv_head or sizes.n_head
    top_k = (sizes.moe_top_k or 1) if sizes.moe_num_experts else 0
    model = ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        dtype=None,
        hidden_size=sizes.n_embd,
        num_hidden_layers=sizes.n_layer,
        num_attention_heads=sizes.n_head,
        num_key_value_heads=kv,
        head_size=sizes.n_embd // sizes.n_head,
        intermediate_size=sizes.inter_size,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.n_positions,
        hidden_act=sizes.hidden_act,
        norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rotary_base,
        rope_scaling=None,
        num_experts=sizes.moe_num_experts,
        experts_per_token=top_k,
        raw={},
        source="meta",
    )
    halved = kv // 2 if options.remove_duplicated_kv_heads else kv
    problems = refusals(model, family_of(model.architecture), options, max(halved, 1), resolve_moe(options))
    if problems:
        raise RefusedError(problems)
    mapping, quantization = mapping_section(options), quantization_section(options)
    algo = _MADE_ELSEWHERE.get(options.quant)
    if algo is not None:
        quantization["quant_algo"] = algo.replace("PER_CHANNEL", "PER_GROUP") if request.per_group else algo
    config: Config = {
        "architecture": model.architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.inter_size,
        "ffn_dim_multiplier": sizes.ffn_dim_multiplier,
        "multiple_of": sizes.multiple_of,
        "num_key_value_heads": kv,
        "vocab_size": sizes.vocab_size,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": sizes.n_positions,
        "hidden_act": sizes.hidden_act,
        "rotary_base": sizes.rotary_base,
        "norm_epsilon": sizes.rms_norm_eps,
        "moe": {"num_experts": sizes.moe_num_experts, "top_k": top_k, "normalization_mode": sizes.moe_renorm_mode},
        "mapping": {key: mapping[key] for key in (_MAPPING if options.target_version == "0.16" else (*_MAPPING, "cp_size"))},
        "quantization": quantization,
        "use_parallel_embedding": options.use_parallel_embedding,
        "embedding_sharding_dim": options.embedding_sharding_dim,
    }
    if options.target_version == "0.16":
        config["share_embedding_table"] = options.use_embedding_sharing
    config |= {
        "disable_weight_only_quant_plugin": options.disable_weight_only_quant_plugin,
        "remove_duplicated_kv_heads": options.remove_duplicated_kv_heads,
        "quant_ckpt_path": request.quant_ckpt_path,
        "load_model_on_cpu": request.load_model_on_cpu,
    }
    return dump(config)
