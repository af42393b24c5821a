"""Tiny models of every family: sizes and config.json here, names from the family's own table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from streamconv.families import Family

HIDDEN, HEADS, SIZE, WIDTH, LAYERS, EXPERTS = 128, 4, 32, 256, 3, 4
GROUP = 64
Tensors = dict[str, torch.Tensor]
Key = tuple[str, int, int]
"""(role, layer or -1, expert or -1)."""

LINEAR = ("q", "k", "v", "qkv", "qkv_grouped", "o", "gate", "up", "gate_up", "down")
_MOE = ("router", "expert_gate", "expert_up", "expert_down", "experts_gate_up", "experts_down")


@dataclass(frozen=True)
class Recipe:
    """One tiny model.

    Attributes:
        family: the name of its family.
        variant: what tells it from others of the family.
        without: roles that this model has not.
        alternative: takes the second pattern of a role that has two.
        quants: those that its difference matters to; None for all.
        config: config.json beside the sizes.
    """

    family: str
    variant: str = ""
    kv: int = 2
    vocab: int = 37
    dtype: str = "float16"
    without: tuple[str, ...] = ("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias")
    alternative: bool = False
    quants: tuple[str, ...] | None = None
    experts: int = 0
    config: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.family + ("-" + self.variant if self.variant else "")

    @property
    def width(self) -> int:
        return HIDDEN if self.experts else WIDTH

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))


_STACKED = ("experts_gate_up", "experts_down")
_APART = ("expert_gate", "expert_up", "expert_down")
_NO_BIAS = Recipe("").without
_QWEN3_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN, "intermediate_size": 384, "head_dim": SIZE}

_GEMMA = {"head_dim": SIZE, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}

RECIPES = (
    Recipe("llama"),
    Recipe("llama", "biases", without=(), config={"attention_bias": True, "mlp_bias": True}),
    Recipe("llama", "one-kv-head", kv=1, dtype="bfloat16"),
    Recipe(
        "llama", "tied", kv=4, quants=("none", "smoothquant"), dtype="float32", without=(*_NO_BIAS, "lm_head"),
        config={"tie_word_embeddings": True},
    ),
    Recipe("llama-meta", vocab=36),
    Recipe("mistral", config={"sliding_window": None, "head_dim": SIZE}),
    Recipe("mixtral", experts=EXPERTS, without=(*_NO_BIAS, *_STACKED), config={"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    Recipe(
        "mixtral", "stacked", quants=("none", "int4"), experts=EXPERTS, alternative=True, without=(*_NO_BIAS, *_APART),
        config={"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    ),
    Recipe("qwen2", dtype="bfloat16", without=("o_bias",)),
    Recipe("qwen2", "tied", quants=("none",), without=("lm_head",), config={"tie_word_embeddings": True}),
    Recipe("qwen3", dtype="bfloat16", config={"head_dim": SIZE}),
    Recipe("qwen3_moe", experts=EXPERTS, without=_STACKED, config=_QWEN3_MOE),
    Recipe("qwen3_moe", "stacked", quants=("none", "int8"), experts=EXPERTS, without=_APART, config=_QWEN3_MOE),
    Recipe("phi3"),
    Recipe("gemma", without=("lm_head",), config=_GEMMA),
    Recipe("gemma", "head-copied", quants=("none",), config=_GEMMA),
    Recipe("gemma2", dtype="bfloat16", config=_GEMMA),
    Recipe("granite", config={"embedding_multiplier": 12.0, "attention_multiplier": 0.5, "residual_multiplier": 0.2}),
    Recipe("internlm", dtype="float32", without=(), config={"bias": True}),
    Recipe("internlm2", config={"bias": False}),
    Recipe("exaone"),
)  # fmt: skip


def shape(recipe: Recipe, role: str) -> tuple[int, ...]:
    """The shape of a role's tensor, as families/base.py describes it."""
    q, kv, width = HEADS * SIZE, recipe.kv * SIZE, recipe.width
    fused = (q + 2 * kv, HIDDEN)
    return {
        "embedding": (recipe.vocab, HIDDEN), "lm_head": (recipe.vocab, HIDDEN), "q": (q, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN),
        "o": (HIDDEN, q), "q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "o_bias": (HIDDEN,), "q_norm": (SIZE,), "k_norm": (SIZE,),
        "qkv": fused, "qkv_grouped": fused, "gate": (width, HIDDEN), "up": (width, HIDDEN), "down": (HIDDEN, width),
        "gate_up": (2 * width, HIDDEN), "gate_bias": (width,), "up_bias": (width,), "down_bias": (HIDDEN,),
        "router": (EXPERTS, HIDDEN), "expert_gate": (width, HIDDEN), "expert_up": (width, HIDDEN), "expert_down": (HIDDEN, width),
        "experts_gate_up": (EXPERTS, 2 * width, HIDDEN), "experts_down": (EXPERTS, HIDDEN, width),
    }.get(role, (HIDDEN,))  # fmt: skip


def names(recipe: Recipe, family: Family) -> dict[Key, str]:
    """The tensors of the model: key -> name."""
    found: dict[Key, str] = {}
    for role, patterns in family.tensors.items():
        if role in recipe.without or (role in _MOE and not recipe.experts):
            continue
        pattern = patterns[-1] if recipe.alternative else patterns[0]
        for layer in range(LAYERS) if "{layer}" in pattern else (-1,):
            for expert in range(EXPERTS) if "{expert}" in pattern else (-1,):
                found[role, layer, expert] = pattern.replace("{layer}", str(layer)).replace("{expert}", str(expert))
    return found


def values(recipe: Recipe, family: Family) -> dict[Key, torch.Tensor]:
    """Random weights in the source's dtype; ignored tensors are not among them."""
    random = torch.Generator().manual_seed(7)
    made = {}
    for key in names(recipe, family):
        size = shape(recipe, key[0])
        made[key] = (torch.randn(size, generator=random) * 0.05).to(getattr(torch, recipe.dtype))
    return made


def ignored(family: Family) -> Tensors:
    """Tensors that the family says carry nothing, for layer 0."""
    return {pattern.replace("{layer}", "0"): torch.rand(SIZE // 2) for pattern in family.ignored}


def config(recipe: Recipe, family: Family) -> dict[str, Any]:
    return {
        "architectures": list(family.architectures[:1]), "model_type": recipe.family, "hidden_size": HIDDEN,
        "intermediate_size": recipe.width, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": recipe.kv, "vocab_size": recipe.vocab, "max_position_embeddings": 64, "hidden_act": "silu",
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": recipe.dtype,
    } | recipe.config  # fmt: skip


def write(recipe: Recipe, family: Family, folder: Path, tensors: Tensors, stated: dict[str, Any] | None = None) -> Path:
    """A folder with these tensors; Meta's in two files."""
    folder.mkdir(parents=True)
    if not family.architectures:
        _write_meta(folder, tensors)
        return folder
    told = config(recipe, family) | ({"quantization_config": stated} if stated else {})
    (folder / "config.json").write_text(json.dumps(told))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def _write_meta(folder: Path, tensors: Tensors, parts: int = 2) -> None:
    """params.json and consolidated files, cut as Meta cut Llama 2."""
    params = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": 2, "hidden_dim": WIDTH, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(parts):
        held = {}
        for name, tensor in tensors.items():
            axis = 1 if any(piece in name for piece in ("wo.", "w2.", "tok_embeddings.")) else 0
            whole = "norm" in name or "rope" in name or tensor.dim() < 2
            held[name] = (tensor if whole else tensor.chunk(parts, axis)[rank]).clone(memory_format=torch.contiguous_format)
        torch.save(held, folder / f"consolidated.{rank:02d}.pth")
