"""What a source's config says, whatever its spelling: Hugging Face config.json (old and transformers 5) or Meta params.json.

Number spelling is kept (an integer stays an integer), because it reaches config.json.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from streamconv.checkpoint.rope_config import is_number, rope, rotated_part, scaling_problems
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


_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_GEMMA = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "head_dim": 256}
# class defaults of transformers that files may rely on; dimensions are never guessed
_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"rms_norm_eps": 1e-06, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 2048},
    "MistralForCausalLM": _MISTRAL,
    "MixtralForCausalLM": _MISTRAL | {"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "Qwen3MoeForCausalLM": {"num_key_value_heads": 4, "max_position_embeddings": 32768},
    "Phi3ForCausalLM": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05},
    "GemmaForCausalLM": _GEMMA | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    "Gemma2ForCausalLM": _GEMMA | {"num_key_value_heads": 4, "hidden_act": None},
    "ExaoneForCausalLM": {"rms_norm_eps": 1e-05},
}


_NAMED = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "Phi3", "Gemma", "Gemma2", "Granite")
# for a config.json that states none, or contradicts its architecture: qwen3_moe of Qwen3MoeForCausalLM
MODEL_TYPES = {f"{name}ForCausalLM": re.sub(r"(?<=\w)(?=[A-Z])", "_", name).lower() for name in _NAMED}


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

    def checked(key: str, value: Any, good: bool, what: str, otherwise: Any) -> Any:
        if not good:
            problems.append(f"{key} is {shown_value(value)}, not {what}")
        return value if good else otherwise

    def whole(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        if value is None:
            value = defaults.get(key, default)
        if value is None:
            problems.append(f"{key} is missing")
            return 1
        return int(checked(key, value, type(value) is int and 0 < value < 1 << 40, "a positive whole number", 1))

    def number(key: str, fallback: float) -> Any:
        value = raw.get(key)
        value = defaults.get(key, fallback) if value is None else value
        return checked(key, value, is_number(value, 0, sys.float_info.max), "a number", fallback)

    def count(key: str) -> int:
        return 0 if raw.get(key) in (None, 0) and not isinstance(raw.get(key), bool) else whole(key)

    def text(key: str) -> Any:
        value = raw[key] if key in raw else defaults.get(key)
        return checked(key, value, isinstance(value, str | None), "a name", None)

    sizes = {key: whole(key) for key in _DIMENSIONS}
    heads = sizes["num_attention_heads"]
    kv = whole("num_key_value_heads", heads)
    head = whole("kv_channels") if raw.get("kv_channels") is not None else 0
    if not head and raw.get("head_dim") is None and defaults.get("head_dim") is None and sizes["hidden_size"] % heads:
        problems.append(f"hidden_size {sizes['hidden_size']} is not a multiple of num_attention_heads {heads}")
    head = head or whole("head_dim", max(1, sizes["hidden_size"] // heads))
    notes: list[str] = []
    theta, scaling = rope(raw, architecture, problems, notes, number)
    mixtral = architecture.startswith("Mixtral")  # its experts have intermediate_size
    of_experts = whole if mixtral or "Moe" in architecture else count
    switches = {key: checked(key, raw.get(key), isinstance(raw.get(key), bool | None), "true or false", None) for key in _SWITCHES}
    dtype = text("torch_dtype" if "torch_dtype" in raw else "dtype")
    model = ModelConfig(
        architecture=architecture,
        model_type=MODEL_TYPES.get(architecture, text("model_type") or ""),
        dtype=dtype.removeprefix("torch.") if dtype is not None else None,
        **sizes,
        num_key_value_heads=kv,
        head_size=head,
        max_position_embeddings=whole("max_position_embeddings"),
        hidden_act=text("hidden_act"),
        norm_eps=number("rms_norm_eps", 1e-06),
        rope_theta=theta,
        rope_scaling=scaling,
        partial_rotary_factor=rotated_part(raw, problems),
        attention_bias=bool(switches["bias" if "bias" in raw else "attention_bias"]),
        mlp_bias=bool(switches["mlp_bias"]),
        tie_word_embeddings=is_tied(raw),
        num_experts=of_experts("num_local_experts"),
        experts_per_token=of_experts("num_experts_per_tok"),
        moe_intermediate_size=(0 if mixtral else count("moe_intermediate_size")) or None,
        raw=raw,
        source="hf",
        notes=tuple(notes),
    )
    count("shared_expert_intermediate_size")
    dense, step = raw.get("mlp_only_layers"), raw.get("decoder_sparse_step", 1)  # which layers of a Qwen mixture have experts
    listed = dense is None or (isinstance(dense, list) and all(type(layer) is int for layer in dense))
    checked("mlp_only_layers", dense, listed, "a list of layers", None)
    checked("decoder_sparse_step", step, type(step) is int and step >= 1, "a positive whole number", None)
    for key in _FACTORS:
        if key in raw and (raw[key] is not None or key in _NEVER_NULL):
            factor = number(key, 1.0) if raw[key] is not None else -1.0
            least, most = _NEVER_NULL.get(key, (0.0, 1e30))
            checked(key, raw[key], least <= factor <= most, f"a number from {least:g} to {most:g}", None)
    if problems:
        raise CheckpointError([f"config.json: {problem}" for problem in problems])
    return model


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
        what = f"{error} is missing" if isinstance(error, KeyError) else f"a size is no number: {printable(error)}"
        raise CheckpointError(f"params.json: {what}") from None
    if min(dim, layers, heads, kv, inter) < 1 or max(dim, layers, inter, vocab) >= 1 << 40:
        raise CheckpointError("params.json: sizes must be positive, and below 2^40")
    theta, scaled = params.get("rope_theta", 10000), params.get("rope_scaling")
    for key, value in (("norm_eps", eps), ("rope_theta", theta)):
        if not is_number(value, 0, sys.float_info.max):
            raise CheckpointError(f"params.json: {key} is {shown_value(value)}, not a number")
    if scaled is not None and not isinstance(scaled, dict):
        raise CheckpointError(f"params.json: rope_scaling is {shown_value(scaled)}, not an object")
    problems = scaling_problems(scaled or {})
    if problems:
        raise CheckpointError([f"params.json: {problem}" for problem in problems])
    scaling = {"type": "llama3"} if params.get("use_scaled_rope") else scaled
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
