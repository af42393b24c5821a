"""Parts of config.json that all model classes share: dtype, `mapping`, `quantization`, `moe`.

0.16 rejects unknown keys inside `mapping` and `quantization`, and so does an early 1.x: each release gets exactly its own.
"""

from __future__ import annotations

from typing import Any

from streamconv.errors import RefusedError, UsageError
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import all_quants

Config = dict[str, Any]

_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def resolve_dtype(requested: str, source: str | None) -> str:
    """The checkpoint's dtype: auto takes the source's, float16 where that is float32 or unstated.

    Raises:
        UsageError: not a dtype TensorRT-LLM has.
    """
    if requested == "auto":
        return "float16" if source in (None, "float32") else _known(str(source))
    return _known(_SHORT.get(requested, requested))


def _known(name: str) -> str:
    if name not in ("float16", "bfloat16", "float32"):
        raise UsageError(f"dtype {name!r} is not float16, bfloat16 or float32", hint="--dtype float16 or bfloat16")
    return name


def resolve_moe(options: TensorRTLLM) -> tuple[int, int]:
    """(moe_tp_size, moe_ep_size) as the official command line settles them.

    Raises:
        RefusedError: their product is not tp_size.
    """
    tp, moe_tp, moe_ep = options.tp_size, options.moe_tp_size, options.moe_ep_size
    if moe_tp < 1 and moe_ep < 1:
        moe_tp, moe_ep = tp, 1
    elif moe_tp < 1:
        moe_tp = tp // moe_ep
    elif moe_ep < 1:
        moe_ep = tp // moe_tp
    if moe_tp * moe_ep != tp and min(options.moe_tp_size, options.moe_ep_size) < 1:  # one was given, the other follows
        given = f"--moe-tp-size {moe_tp}" if options.moe_ep_size < 1 else f"--moe-ep-size {moe_ep}"
        raise RefusedError([f"{given} does not divide --tp-size {tp}"])
    if moe_tp * moe_ep != tp:
        raise RefusedError([f"--moe-tp-size {moe_tp} times --moe-ep-size {moe_ep} is not --tp-size {tp}"])
    return moe_tp, moe_ep


LATE_KEYS: dict[str, Config] = {
    "mapping": {"cp_config": {}, "enable_attention_dp": False, "enable_lm_head_tp_in_adp": False},
    "quantization": {"mamba_ssm_cache_dtype": None},
}
"""Keys of the late 1.x releases, with what they always hold here; an early 1.x reader rejects them."""


def mapping_section(options: TensorRTLLM, *, attention_sizes: bool = False) -> Config:
    """`mapping`.

    Args:
        attention_sizes: the family's converter leaves the resolved sizes of attention in, where others write -1 (1.x).
    """
    moe_tp, moe_ep = resolve_moe(options)
    tp, pp, cp = options.tp_size, options.pp_size, options.cp_size
    old = {"world_size": tp * pp * cp, "gpus_per_node": 8, "cp_size": cp, "tp_size": tp, "pp_size": pp}
    if options.target_version == "0.16":
        return old | {"moe_tp_size": moe_tp, "moe_ep_size": moe_ep}
    new = old | {
        "moe_tp_size": moe_tp,
        "moe_cluster_size": 1,
        "moe_ep_size": moe_ep,
        "attn_tp_size": tp * cp if attention_sizes else -1,
        "attn_cp_size": 1 if attention_sizes else -1,
    }
    return new | _late("mapping", options)


def late_keys(config: Config) -> str | None:
    """What an early 1.x reader would not take: "mapping.cp_config, ..."; None if there is nothing."""
    late = [f"{section}.{key}" for section, keys in LATE_KEYS.items() for key in keys if key in config.get(section, {})]
    return ", ".join(late) or None


def _late(section: str, options: TensorRTLLM) -> Config:
    return LATE_KEYS[section].copy() if options.target_version == "1.2" else {}


def quantization_section(options: TensorRTLLM) -> Config:
    """`quantization` with the keys of the target version, in official order.

    --group-size counts for formats with groups only.
    """
    key = options.quant
    quant = all_quants().get(key)
    algo = quant.info.algo if quant is not None else None
    if key == "smoothquant":
        algo = smoothquant_algo(options)
    gptq, awq = key in ("int4_gptq", "int8_gptq"), key == "int4_awq"
    rowwise = key == "fp8_rowwise"
    section: Config = {
        "quant_algo": algo,
        "kv_cache_quant_algo": options.kv_cache.upper() if options.kv_cache else None,
        "group_size": options.group_size if gptq or awq else 128,
        "smoothquant_val": options.smoothquant,
        "clamp_val": [-1200.0, 1200.0] if rowwise else None,
        "use_meta_recipe": options.use_meta_fp8_rowwise_recipe,
        "has_zero_point": gptq,
        "pre_quant_scale": awq,
        "exclude_modules": None,
    }
    return section | _late("quantization", options)


def smoothquant_algo(options: TensorRTLLM) -> str:
    """One of the four plugin variants."""
    weights = "PER_CHANNEL" if options.per_channel else "PER_TENSOR"
    if not options.per_channel and not options.per_token:
        return "W8A8_SQ_PER_TENSOR_PLUGIN"
    return f"W8A8_SQ_{weights}_{'PER_TOKEN' if options.per_token else 'PER_TENSOR'}_PLUGIN"


def moe_section(experts: int, top_k: int, normalization: int | None) -> Config:
    return {
        "num_experts": experts,
        "shared_expert_intermediate_size": 0,
        "top_k": top_k,
        "normalization_mode": normalization,
        "sparse_mixer_epsilon": 0.01,
        "tp_mode": 0,
        "device_limited_n_group": 0,
        "device_limited_topk_group": 0,
        "device_limited_routed_scaling_factor": 1.0,
    }
