"""What a source's config says, whatever its spelling: Hugging Face config.json (old and transformers 5) or Meta params.json.

Number spelling is kept (an integer stays an integer), because it reaches config.json.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from streamconv.checkpoint.rope_config import rope, rotated_part, scaling_problems
from streamconv.checkpoint.untrusted import shown_value
from streamconv.errors import CheckpointError, printable


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The facts a target needs.

    Attributes:
        dtype: config.json spelling ("bfloat16"), None if the source states none.
        head_size: rows of one attention head.
        rope_scaling: the source's object in its key order, or None.
        partial_rotary_factor: part of each head that is rotated; 1 for all of it.
        experts_per_token, num_experts: 0 for a dense model; None if the key is absent where that matters.
        moe_intermediate_size: width of one expert where it differs from intermediate_size.
        raw: the whole source config.
        notes: where the source contradicts itself, and what was believed.
    """

    architecture: str
    model_type: str
    dtype: str | None
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int | None
    hidden_act: str | None
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    raw: Mapping[str, Any]
    source: Literal["hf", "meta"]
    partial_rotary_factor: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int | None = None
    notes: tuple[str, ...] = ()


_DIMENSIONS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

# read from `raw` by the config writers
_FACTORS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "attn_logit_softcapping",
)

_SWITCHES = ("bias", "attention_bias", "mlp_bias", "tie_word_embeddings", "use_logn_attn", "norm_topk_prob")

# those that are calculated with, and in which range
_NEVER_NULL = {"attention_multiplier": (0.0, 1e30), "logits_scaling": (1e-30, 1e30)}


# class defaults of transformers that files may rely on; dimensions are never guessed
_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"rms_norm_eps": 1e-06, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 2048},
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "MixtralForCausalLM": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "Qwen3MoeForCausalLM": {"num_key_value_heads": 4, "max_position_embeddings": 32768},
    "Phi3ForCausalLM": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05},
    "GemmaForCausalLM": {
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "Gemma2ForCausalLM": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "hidden_act": None,
    },
    "ExaoneForCausalLM": {"rms_norm_eps": 1e-05},
}


# for a config.json that states none, or contradicts its architecture
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Phi3ForCausalLM": "phi3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "GraniteForCausalLM": "granite",
}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json with a known architecture says that the output projection is the embedding."""
    defaults = _DEFAULTS.get(config["architectures"][0], {})
    return bool(config.get("tie_word_embeddings", defaults.get("tie_word_embeddings")))


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json.

    Raises:
        CheckpointError: keys are missing or of the wrong type; all of them are named.
    """
    raw = dict(config)
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config.json: architectures names no model class")
    architecture = names[0]
    if isinstance(raw.get("text_config"), dict) and "hidden_size" not in raw:
        raw = raw | raw["text_config"] | {"architectures": names}
    # Exaone says it in its own words
    for ours, theirs in (
        ("num_hidden_layers", "num_layers"),
        ("hidden_act", "activation_function"),
        ("rms_norm_eps", "layer_norm_epsilon"),
        ("num_local_experts", "num_experts"),
    ):
        if ours not in raw and theirs in raw:
            raw[ours] = raw[theirs]
    defaults = _DEFAULTS[""] | _DEFAULTS.get(architecture, {})
    problems: list[str] = []

    def whole(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        if value is None:
            value = defaults.get(key, default)
        if value is None:
            problems.append(f"{key} is missing")
            return 1
        if type(value) is not int or not 0 < value < 1 << 40:
            problems.append(f"{key} is {shown_value(value)}, not a positive whole number")
            return 1
        return value

    def number(key: str, fallback: float) -> float:
        value = raw.get(key)
        value = defaults.get(key, fallback) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            problems.append(f"{key} is {shown_value(value)}, not a number")
            return fallback
        return value

    def count(key: str) -> int:
        return 0 if raw.get(key) in (None, 0) and not isinstance(raw.get(key), bool) else whole(key)

    def switch(key: str) -> bool | None:
        value = raw.get(key)
        if value is not None and not isinstance(value, bool):
            problems.append(f"{key} is {shown_value(value)}, not true or false")
            return None
        return value

    def text(key: str) -> str | None:
        value = raw[key] if key in raw else defaults.get(key)
        if value is not None and not isinstance(value, str):
            problems.append(f"{key} is {shown_value(value)}, not a name")
            return None
        return value

    sizes = {key: whole(key) for key in _DIMENSIONS}
    heads = sizes["num_attention_heads"]
    kv = whole("num_key_value_heads", heads)
    head = whole("kv_channels") if raw.get("kv_channels") is not None else 0
    if not head and raw.get("head_dim") is None and defaults.get("head_dim") is None and sizes["hidden_size"] % heads:
        problems.append(f"hidden_size {sizes['hidden_size']} is not a multiple of num_attention_heads {heads}")
    head = head or whole("head_dim", max(1, sizes["hidden_size"] // heads))
    notes: list[str] = []
    theta, scaling = rope(raw, architecture, problems, notes, number)
    rotated = rotated_part(raw, problems)
    moe = architecture.startswith("Mixtral") or "Moe" in architecture
    experts = whole("num_local_experts") if moe else count("num_local_experts")
    per_token = whole("num_experts_per_tok") if moe else count("num_experts_per_tok")
    width = 0 if architecture.startswith("Mixtral") else count("moe_intermediate_size")  # Mixtral's experts have intermediate_size
    positions = whole("max_position_embeddings")
    eps = number("rms_norm_eps", 1e-06)
    act = text("hidden_act")
    dtype = text("torch_dtype" if "torch_dtype" in raw else "dtype")
    model_type = text("model_type")
    switches = {key: switch(key) for key in _SWITCHES}
    count("shared_expert_intermediate_size")
    _sparse_layers(raw, problems)
    for key in _FACTORS:
        if key in raw and (raw[key] is not None or key in _NEVER_NULL):
            factor = number(key, 1.0) if raw[key] is not None else -1.0
            least, most = _NEVER_NULL.get(key, (0.0, 1e30))
            if not least <= factor <= most:
                problems.append(f"{key} is {shown_value(raw[key])}, not a number from {least:g} to {most:g}")
    if problems:
        raise CheckpointError([f"config.json: {problem}" for problem in problems])
    return ModelConfig(
        architecture=architecture,
        model_type=MODEL_TYPES.get(architecture, model_type or ""),
        dtype=dtype.removeprefix("torch.") if dtype is not None else None,
        **sizes,
        num_key_value_heads=kv,
        head_size=head,
        max_position_embeddings=positions,
        hidden_act=act,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        partial_rotary_factor=rotated,
        attention_bias=bool(switches["bias" if "bias" in raw else "attention_bias"]),
        mlp_bias=bool(switches["mlp_bias"]),
        tie_word_embeddings=is_tied(raw),
        num_experts=experts,
        experts_per_token=per_token,
        moe_intermediate_size=width or None,
        raw=raw,
        source="hf",
        notes=tuple(notes),
    )


def _sparse_layers(raw: Mapping[str, Any], problems: list[str]) -> None:
    """Which layers of a Qwen mixture have experts: `mlp_only_layers` and `decoder_sparse_step`."""
    dense, step = raw.get("mlp_only_layers"), raw.get("decoder_sparse_step", 1)
    if dense is not None and not (isinstance(dense, list) and all(type(layer) is int for layer in dense)):
        problems.append(f"mlp_only_layers is {shown_value(dense)}, not a list of layers")
    if type(step) is not int or step < 1:
        problems.append(f"decoder_sparse_step is {shown_value(step)}, not a positive whole number")


def from_meta(params: Mapping[str, Any], vocab_rows: int | None = None) -> ModelConfig:
    """Read Meta's params.json.

    Args:
        vocab_rows: rows of the output matrix, used where params.json has no usable vocab_size; else 32000.

    Raises:
        CheckpointError: keys are missing or not numbers.
    """
    try:
        dim, layers, heads = int(params["dim"]), int(params["n_layers"]), int(params["n_heads"])
        vocab = int(params.get("vocab_size", -1))
        if "hidden_dim" in params:
            inter = int(params["hidden_dim"])
        else:
            multiple, factor = int(params.get("multiple_of", 1)), float(params.get("ffn_dim_multiplier") or 1)
            inter = multiple * -(-int(int(8 * dim / 3) * factor) // multiple)
        eps = float(params["norm_eps"])
        kv = int(params.get("n_kv_heads") or heads)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else f"a size is no number: {printable(str(error))}"
        raise CheckpointError(f"params.json: {what}") from None
    if min(dim, layers, heads, kv, inter) < 1 or max(dim, layers, inter, vocab) >= 1 << 40:
        raise CheckpointError("params.json: sizes must be positive, and below 2^40")
    theta, stated = params.get("rope_theta", 10000), params.get("rope_scaling")
    for key, value in (("norm_eps", eps), ("rope_theta", theta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise CheckpointError(f"params.json: {key} is {shown_value(value)}, not a number")
    if stated is not None and not isinstance(stated, dict):
        raise CheckpointError(f"params.json: rope_scaling is {shown_value(stated)}, not an object")
    problems = scaling_problems(stated or {})
    if problems:
        raise CheckpointError([f"params.json: {problem}" for problem in problems])
    scaling = {"type": "llama3"} if params.get("use_scaled_rope") else stated
    return ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        dtype="bfloat16",
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_size=dim // heads,
        intermediate_size=inter,
        vocab_size=vocab if vocab > 0 else (vocab_rows or 32000),
        max_position_embeddings=2048,
        hidden_act="silu",
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        raw={key: value for key, value in params.items() if key not in _FACTORS},  # Hugging Face words, unchecked here
        source="meta",
    )
