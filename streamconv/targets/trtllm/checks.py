"""Sizes and combinations that would make a broken checkpoint. All problems are found, not only the first."""

from __future__ import annotations

from collections.abc import Iterator

from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.untrusted import shown_value
from streamconv.families.base import Family
from streamconv.targets.trtllm import import_rules
from streamconv.targets.trtllm.options import TensorRTLLM

_ACTIVATIONS = ("fast-swiglu", "geglu", "gegelu", "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "identity", "openai-gelu",
                "quick_gelu", "relu", "relu2", "sigmoid", "silu", "softplus", "squared-relu", "swiglu", "tanh")  # fmt: skip
"""What TensorRT-LLM knows by name."""


def refusals(model: ModelConfig, family: Family, options: TensorRTLLM, kv: int, moe: tuple[int, int]) -> list[str]:
    """Reasons why this model cannot be cut as asked.

    Args:
        kv: KV heads after `--remove_duplicated_kv_heads`.
        moe: resolved (moe_tp_size, moe_ep_size).
    """
    return list(_refusals(model, family, options, kv, moe))


def _refusals(model: ModelConfig, family: Family, options: TensorRTLLM, kv: int, moe: tuple[int, int]) -> Iterator[str]:
    t, p, old = options.tp_size, options.pp_size, options.target_version == "0.16"
    heads, layers = model.num_attention_heads, model.num_hidden_layers
    if options.target_version not in family.versions:
        yield f"--target-version {options.target_version} does not know {model.architecture}"
    if heads % t:
        yield f"--tp-size {t} does not divide num_attention_heads {heads}"
    if kv > t and kv % t:
        yield f"--tp-size {t} does not divide num_key_value_heads {kv}"
    if kv < t and t % kv:
        yield f"--tp-size {t} is not a multiple of num_key_value_heads {kv}"
    if heads % kv:
        yield f"config.json: num_key_value_heads {kv} does not divide num_attention_heads {heads}"
    width = model.moe_intermediate_size or model.intermediate_size
    if model.num_experts and model.num_experts % moe[1]:
        yield f"--moe-ep-size {moe[1]} does not divide {model.num_experts} experts"
    if model.num_experts and width % moe[0]:
        yield f"--moe-tp-size {moe[0]} does not divide the expert width {width}"
    if not model.num_experts and model.intermediate_size % t:
        yield f"--tp-size {t} does not divide intermediate_size {model.intermediate_size}"
    if options.use_parallel_embedding and options.embedding_sharding_dim == 1 and model.hidden_size % t:
        yield f"--embedding-sharding-dim 1: --tp-size {t} does not divide hidden_size {model.hidden_size}"
    if p > layers:
        yield f"--pp-size {p} is larger than num_hidden_layers {layers}"
    elif old and layers % p:
        why = "0.16 would lose the last layers (--target-version 1.2 allows it)"
        yield f"--pp-size {p} does not divide num_hidden_layers {layers}: {why}"
    if model.hidden_act not in _ACTIVATIONS and (model.hidden_act is not None or not family.name.startswith("gemma")):
        yield f"config.json: hidden_act is {shown_value(model.hidden_act)}, an activation that TensorRT-LLM does not know"
    yield from _versions(model, family, options)
    yield from _context_parallel(model, family, options)
    if options.use_embedding_sharing and old and p > 1:
        yield "--use-embedding-sharing cannot work with --pp-size > 1"
    if options.use_embedding_sharing and old and not _sharable(options):
        yield "--use-embedding-sharing with --tp-size > 1 needs --use-parallel-embedding and --embedding-sharding-dim 0"
    if not family.pipeline and p > 1:
        yield f"{family.name}: pipeline parallelism is not supported by TensorRT-LLM"
    scaling = model.rope_scaling or {}
    kind = scaling.get("type", scaling.get("rope_type", "none"))
    known = ("none", "linear", "dynamic", "longrope", "llama3", "yarn", "mrope", "su")
    if kind not in known:
        yield f"config.json: rope_scaling type {kind!r} is not one TensorRT-LLM has ({', '.join(known[:7])})"
    if model.attention_bias and not family.tensors.keys() & {"q_bias", "o_bias"}:
        said = "bias" if "bias" in model.raw else "attention_bias"
        yield f"config.json: {said} is true, but {family.name} models with attention biases are not supported"
    yield from import_rules.refusals(options, kv)
    yield from _smoothquant(model, family, options, kv)


def _sharable(options: TensorRTLLM) -> bool:
    """Whether every rank's embedding is its part of the output projection."""
    return options.tp_size == 1 or (options.use_parallel_embedding and options.embedding_sharding_dim == 0)


def _versions(model: ModelConfig, family: Family, options: TensorRTLLM) -> Iterator[str]:
    """What a release cannot say in config.json, so that it would compute something else."""
    old, factor, size = options.target_version == "0.16", model.partial_rotary_factor, model.hidden_size // model.num_attention_heads
    if family.config_class == "phi3" and factor != 1 and old:
        yield f"config.json: partial_rotary_factor {factor:g}: TensorRT-LLM 0.16 rotates whole heads of Phi-3; use --target-version 1.2"
    if family.config_class != "qwen":
        return
    if model.raw.get("kv_channels") is None and model.head_size != size and old:
        why = f"is not hidden_size / num_attention_heads {size}, which TensorRT-LLM 0.16 takes for {family.name}"
        yield f"config.json: head_dim {model.head_size} {why}; use --target-version 1.2"
    dense = any(0 <= layer < model.num_hidden_layers for layer in model.raw.get("mlp_only_layers") or [])
    if model.num_experts and (dense or model.raw.get("decoder_sparse_step", 1) != 1):
        why = f"leave some layers of {family.name} without experts, which is not supported"
        yield f"config.json: mlp_only_layers and decoder_sparse_step {why}"


def _context_parallel(model: ModelConfig, family: Family, options: TensorRTLLM) -> list[str]:
    """Combinations that TensorRT-LLM's converter or loader stops at."""
    if options.cp_size == 1:
        return []
    what = "--quant smoothquant" if options.quant == "smoothquant" else "--kv-cache int8"
    rules = (
        (options.target_version == "0.16", " needs --target-version 1.0 or 1.2"),
        (model.num_experts, ": TensorRT-LLM loads no mixture of experts with context parallelism"),
        (options.quant == "smoothquant" or options.kv_cache == "int8", f": {what} cannot be combined with context parallelism"),
        (
            family.name == "llama-meta",
            ": a Meta checkpoint cannot be converted for context parallelism; convert the Hugging Face one",
        ),
        (family.config_class == "internlm2", f": config.json of {family.name} has no place for it"),
    )
    return [f"--cp-size {options.cp_size}{why}" for wrong, why in rules if wrong]


def _smoothquant(model: ModelConfig, family: Family, options: TensorRTLLM, kv: int) -> list[str]:
    """What SmoothQuant cannot do."""
    if options.quant != "smoothquant":
        return []
    known = family.config_class in ("llama", "qwen") and {"q", "gate"} <= set(family.tensors) and "q_norm" not in family.tensors
    size = model.num_attention_heads * model.head_size
    rules = (
        (not 0 <= options.smoothquant <= 1, f"--smoothquant {options.smoothquant:g}: alpha is a number from 0 to 1"),
        (not known, f"--quant smoothquant: {family.name} is not supported, only models of the Llama type and Qwen2 are"),
        (family.name == "llama-meta", "--quant smoothquant: a Meta checkpoint is not supported; convert the Hugging Face one"),
        (
            model.num_experts,
            "--quant smoothquant: mixture-of-experts weights are not SmoothQuantized; use --quant int8 or int4",
        ),
        (
            kv < options.tp_size,
            f"--quant smoothquant: --tp-size {options.tp_size} is more than num_key_value_heads {kv}, heads would be cut",
        ),
        (size != model.hidden_size, f"--quant smoothquant: num_attention_heads * head_dim {size} is not hidden_size {model.hidden_size}"),
        (options.remove_duplicated_kv_heads, "--quant smoothquant and --remove-duplicated-kv-heads exclude each other"),
        (model.mlp_bias, "--quant smoothquant: mlp_bias is not supported"),
    )
    return [why for wrong, why in rules if wrong]


def embedding_is_shared(model: ModelConfig, options: TensorRTLLM, *, lm_head_missing: bool, qwen: bool) -> bool:
    """Whether `lm_head.weight` is left out and shared with the embedding; 0.16 only.

    Llama shares when asked to; Qwen shares tied models by itself wherever the loader accepts the result.
    """
    if options.target_version != "0.16" or options.pp_size > 1 or options.cp_size > 1:
        return False
    shared = model.tie_word_embeddings if qwen else (options.use_embedding_sharing and lm_head_missing)
    return _sharable(options) and shared
