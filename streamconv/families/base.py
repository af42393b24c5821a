"""What a family table says: how its tensors are called, and the few ways in which its layers differ.

A pattern is a tensor name in which `{layer}` and `{expert}` stand for whole numbers between dots; nothing else is special.
Every source name matches exactly one pattern or is an error that names the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from streamconv.options import TARGET_VERSIONS, Version

ROLES = {
    "embedding": "token embedding [V, H]",
    "lm_head": "output projection [V, H]",
    "final_norm": "norm before the output projection [H]",
    "input_norm": "norm before attention [H]",
    "post_norm": "norm before the MLP [H] (after attention in Gemma-2)",
    "pre_ffn_norm": "Gemma-2 norm before the MLP [H]",
    "post_ffn_norm": "Gemma-2 norm after the MLP [H]",
    "q": "query projection [Nq*D, H]",
    "k": "key projection [Nkv*D, H]",
    "v": "value projection [Nkv*D, H]",
    "o": "attention output projection [H, Nq*D]",
    "q_bias": "[Nq*D]",
    "k_bias": "[Nkv*D]",
    "v_bias": "[Nkv*D]",
    "o_bias": "[H]",
    "q_norm": "query head norm [D]",
    "k_norm": "key head norm [D]",
    "qkv": "q over k over v [(Nq+2Nkv)*D, H] (Phi-3)",
    "qkv_grouped": "for each KV head: its query heads, its key head, its value head (InternLM2)",
    "gate": "activated half of the MLP [I, H]",
    "up": "linear half of the MLP [I, H]",
    "down": "MLP output projection [H, I]",
    "gate_up": "gate over up [2I, H] (Phi-3)",
    "gate_bias": "[I]",
    "up_bias": "[I]",
    "down_bias": "[H]",
    "router": "expert router [E, H]",
    "expert_gate": "per expert [I, H]",
    "expert_up": "per expert [I, H]",
    "expert_down": "per expert [H, I]",
    "experts_gate_up": "stacked [E, 2I, H], gate over up",
    "experts_down": "stacked [E, H, I]",
}
"""The vocabulary shared by family tables and targets."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Attributes:
        name: what `inspect` and `list families` print.
        architectures: values of config.json `architectures[0]` it covers.
        config_class: key of the target's config writers.
        tensors: role -> pattern. A role may have alternatives.
        ignored: patterns of tensors that carry nothing a checkpoint needs (old rotary buffers).
        qkv_bias: q, k and v have biases whatever `attention_bias` of config.json says, which decides where `tensors` has them.
        norm_add_one: norms are stored as value + 1 (Gemma).
        rope_tables: NVIDIA's converter leaves rotary tables behind.
        pipeline: TensorRT-LLM cuts it into pipeline stages.
        versions: releases that know the architecture.
        evidence: where the rules come from: "golden" cases, or the specification alone.
        runs_as: model_type of transformers that computes the same, where it has none of this name.
        handles: what is special about it and taken care of, for `list families`.
    """

    name: str
    architectures: tuple[str, ...]
    config_class: str
    tensors: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
    qkv_bias: bool = False
    norm_add_one: bool = False
    rope_tables: bool = True
    pipeline: bool = True
    versions: tuple[Version, ...] = TARGET_VERSIONS
    evidence: Literal["golden", "specification"] = "golden"
    runs_as: str = ""
    handles: str = ""

    def has_bias(self, role: str, attention_bias: bool) -> bool:
        """Whether a model has the bias of q, k and v ("q_bias"), or that of attention's output ("o_bias")."""
        return role in self.tensors and (attention_bias or (self.qkv_bias and role != "o_bias"))


def with_bias(tensors: Mapping[str, tuple[str, ...]], *roles: str) -> dict[str, tuple[str, ...]]:
    """Tensors with biases beside the weights of some roles."""
    return {**tensors, **{f"{role}_bias": (tensors[role][0].removesuffix(".weight") + ".bias",) for role in roles}}


BARE_LLAMA: Mapping[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens.weight",),
    "lm_head": ("lm_head.weight",),
    "final_norm": ("model.norm.weight",),
    "input_norm": ("model.layers.{layer}.input_layernorm.weight",),
    "post_norm": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "q": ("model.layers.{layer}.self_attn.q_proj.weight",),
    "k": ("model.layers.{layer}.self_attn.k_proj.weight",),
    "v": ("model.layers.{layer}.self_attn.v_proj.weight",),
    "o": ("model.layers.{layer}.self_attn.o_proj.weight",),
    "gate": ("model.layers.{layer}.mlp.gate_proj.weight",),
    "up": ("model.layers.{layer}.mlp.up_proj.weight",),
    "down": ("model.layers.{layer}.mlp.down_proj.weight",),
}
"""Names that most decoder families share with Llama; a family that lacks a tensor does not accept it."""
ATTENTION_BIASED = with_bias(BARE_LLAMA, "q", "k", "v", "o")
LLAMA_TENSORS = with_bias(ATTENTION_BIASED, "gate", "up", "down")


def without(tensors: Mapping[str, tuple[str, ...]], *roles: str) -> dict[str, tuple[str, ...]]:
    """`tensors` less some roles."""
    return {role: patterns for role, patterns in tensors.items() if role not in roles}
