"""What a config.json fixes of a model's tensors, for the model types whose engines all build the same modules from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.untrusted import shown_value

_TEXT = ("text_config", "llm_config", "language_config")
_LARGEST = 1 << 40
_NEVER_ZERO = ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
Shape = tuple[int, ...]
Fixed = dict[str, tuple[Shape, str]]
"""Module -> shape of its weight, and the keys of config.json that it follows from."""


@dataclass(frozen=True, slots=True)
class ModelType:
    """A model type that is spelled like Llama.

    Attributes:
        norms: names of the norms [hidden_size] of a layer.
        head_norms: q_norm and k_norm are there.
        qkv_bias: q_proj, k_proj and v_proj have biases, whatever the config says.
        split_heads: without head_dim a head has hidden_size / num_attention_heads channels.
        all_heads: without num_key_value_heads there are as many as query heads.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: bool = False
    qkv_bias: bool = False
    split_heads: bool = True
    all_heads: bool = False


_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
MODEL_TYPES = {
    "llama": ModelType(all_heads=True), "granite": ModelType(all_heads=True), "phi3": ModelType(all_heads=True),
    "mistral": ModelType(), "mixtral": ModelType(), "smollm3": ModelType(), "deepseek_v2": ModelType(), "deepseek_v3": ModelType(),
    "qwen2": ModelType(qkv_bias=True), "qwen2_moe": ModelType(qkv_bias=True),
    "qwen3": ModelType(head_norms=True, split_heads=False), "qwen3_moe": ModelType(head_norms=True, split_heads=False),
    "gemma": ModelType(split_heads=False), "gemma2": ModelType(_AROUND, split_heads=False),
    "gemma3_text": ModelType(_AROUND, head_norms=True, split_heads=False),
    "olmo2": ModelType(_AFTER, head_norms=True), "cohere": ModelType(("input_layernorm",)),
}  # fmt: skip
"""By `model_type`. Of any other type sizes are compared too, and a difference is only told."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that speaks of the language model."""
    inner = next((part for key in _TEXT if isinstance(part := config.get(key), dict) and "num_hidden_layers" in part), None)
    return inner if inner is not None else config


def model_type(text: Mapping[str, Any]) -> str:
    """`model_type`, or what the architecture's name says where there is none; "" if neither does."""
    key = text.get("model_type")
    if isinstance(key, str):
        return key
    names = text.get("architectures")
    name = str(names[0]).removesuffix("ForCausalLM").lower() if isinstance(names, list) and names else ""
    return next((known for known in MODEL_TYPES if known.replace("_", "") == name), "")


class Sizes:
    """The numbers of a config that shapes follow from; what is no number is told in `problems`."""

    def __init__(self, text: Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        self._text = text
        if not isinstance(text.get("model_type", ""), str):
            self.problems.append(f"config.json: model_type is {shown_value(text['model_type'])}, not a name")

    def of(self, *keys: str) -> int | None:
        """The first of the keys that the config has; None if it has none of them, or a list with a number for each layer."""
        for key in keys:
            value = self._text.get(key)
            if value is None or isinstance(value, list | dict) or (value == 0 and key not in _NEVER_ZERO):
                continue
            if type(value) is int and 0 < value < _LARGEST:
                return value
            line = f"config.json: {key} is {shown_value(value)}, no size"
            self.problems += [] if line in self.problems else [line]
        return None

    def experts(self) -> int | None:
        """Routed experts of a layer."""
        return self.of("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def beside_layers(sizes: Sizes) -> Fixed:
    """The modules beside the layers."""
    hidden, vocab = sizes.of("hidden_size"), sizes.of("vocab_size")
    shapes: Fixed = {}
    if hidden is not None:
        shapes["norm"] = ((hidden,), "hidden_size")
        if vocab is not None:
            shapes |= dict.fromkeys(("embed_tokens", "lm_head"), ((vocab, hidden), "vocab_size, hidden_size"))
    return shapes


def in_layers(sizes: Sizes, kind: ModelType) -> Fixed:
    """The modules of a layer; numbers of experts are *."""
    hidden, inner = sizes.of("hidden_size"), sizes.of("intermediate_size")
    if hidden is None:
        return {}
    shapes: Fixed = dict.fromkeys(_AROUND, ((hidden,), "hidden_size"))
    heads = sizes.of("num_attention_heads")
    if heads is not None:
        rank = sizes.of("kv_lora_rank")
        shapes |= _attention(sizes, kind, hidden, heads) if rank is None else _latent(sizes, hidden, heads, rank)
    if inner is not None:
        why = "intermediate_size, hidden_size"
        shapes |= _gated("mlp", inner, hidden, why) | {"mlp.gate_up_proj": ((2 * inner, hidden), why)}
    return shapes | _experts(sizes, hidden, inner)


def _gated(module: str, inner: int, hidden: int, why: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Fixed:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return {f"{module}.{name}": (shape, why) for name, shape in zip(names, shapes, strict=True)}


def _attention(sizes: Sizes, kind: ModelType, hidden: int, heads: int) -> Fixed:
    size = sizes.of("head_dim") or (hidden // heads if kind.split_heads else None)
    if size is None:
        return {}
    groups = sizes.of("num_key_value_heads") or (heads if kind.all_heads else None)
    q = heads * size
    shapes: Fixed = {"self_attn.q_proj": ((q, hidden), "num_attention_heads, head_dim, hidden_size")}
    shapes["self_attn.o_proj"] = ((hidden, q), "hidden_size, num_attention_heads, head_dim")
    if groups is not None:
        shapes |= dict.fromkeys(
            ("self_attn.k_proj", "self_attn.v_proj"), ((groups * size, hidden), "num_key_value_heads, head_dim, hidden_size")
        )
        shapes["self_attn.qkv_proj"] = ((q + 2 * groups * size, hidden), "num_attention_heads, num_key_value_heads, head_dim, hidden_size")
    return shapes


def _latent(sizes: Sizes, hidden: int, heads: int, rank: int) -> Fixed:
    """DeepSeek's latent attention."""
    nope, rope, value = sizes.of("qk_nope_head_dim"), sizes.of("qk_rope_head_dim"), sizes.of("v_head_dim")
    if nope is None or rope is None or value is None:
        return {}
    low, query = sizes.of("q_lora_rank"), heads * (nope + rope)
    shapes: dict[str, Shape] = {"kv_a_proj_with_mqa": (rank + rope, hidden), "kv_a_layernorm": (rank,)}
    shapes |= {"kv_b_proj": (heads * (nope + value), rank), "o_proj": (hidden, heads * value)}
    shapes |= {"q_proj": (query, hidden)} if low is None else {}
    shapes |= {"q_a_proj": (low, hidden), "q_a_layernorm": (low,), "q_b_proj": (query, low)} if low is not None else {}
    return {f"self_attn.{name}": (shape, "the sizes of latent attention") for name, shape in shapes.items()}


def _experts(sizes: Sizes, hidden: int, inner: int | None) -> Fixed:
    count, own = sizes.experts(), sizes.of("moe_intermediate_size")
    width = own or inner
    if count is None or width is None:
        return {}
    why = f"{'moe_intermediate_size' if own else 'intermediate_size'}, hidden_size"
    shapes: Fixed = dict.fromkeys(("mlp.gate", "block_sparse_moe.gate"), ((count, hidden), "the number of experts, hidden_size"))
    shapes |= _gated("mlp.experts.*", width, hidden, why)
    shapes |= _gated("block_sparse_moe.experts.*", width, hidden, why, ("w1", "w3", "w2"))
    shapes["mlp.experts.gate_up_proj"] = ((count, 2 * width, hidden), f"the number of experts, {why}")
    shapes["mlp.experts.down_proj"] = ((count, hidden, width), f"the number of experts, {why}")
    shared, one = sizes.of("n_shared_experts"), sizes.of("shared_expert_intermediate_size")
    shapes |= _gated("mlp.shared_experts", shared * width, hidden, f"n_shared_experts, {why}") if shared is not None else {}
    shapes |= _gated("mlp.shared_expert", one, hidden, "shared_expert_intermediate_size, hidden_size") if one is not None else {}
    return shapes


def required(text: Mapping[str, Any], kind: ModelType) -> Iterator[tuple[str, ...]]:
    """Modules whose weights every layer has; of several one will do."""
    yield from ((norm,) for norm in kind.norms)
    if text.get("kv_lora_rank") is not None:
        low = ("q_a_proj", "q_a_layernorm", "q_b_proj") if text.get("q_lora_rank") is not None else ("q_proj",)
        yield from ((f"self_attn.{name}",) for name in (*low, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"))
        return
    yield from ((f"self_attn.{name}", "self_attn.qkv_proj") for name in ("q_proj", "k_proj", "v_proj"))
    yield ("self_attn.o_proj",)
    if kind.head_norms:
        yield from (("self_attn.q_norm",), ("self_attn.k_norm",))
