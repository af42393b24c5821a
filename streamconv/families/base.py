"""What a family table says: how its tensors are called, and the few ways in which its layers differ.

A pattern is a tensor name in which `{layer}` and `{expert}` stand for whole numbers between dots; nothing else is special.
Every source name matches exactly one pattern or is an error that names the nearest.

Tables and targets share these roles (V vocabulary, H hidden, I intermediate, D head size, Nq and Nkv heads, E experts):

    embedding, lm_head [V, H]; final_norm [H]
    input_norm, post_norm: before attention, and before the MLP (after attention in Gemma-2); pre_ffn_norm, post_ffn_norm [H]
    q [Nq*D, H]; k, v [Nkv*D, H]; o [H, Nq*D]; q_bias, k_bias, v_bias, o_bias; q_norm, k_norm: of heads [D]
    qkv: q over k over v; qkv_grouped: for each KV head its query heads, its key head, its value head [(Nq+2Nkv)*D, H]
    gate: activated, up: linear [I, H]; down [H, I]; gate_bias, up_bias, down_bias; gate_up: gate over up [2I, H]
    router [E, H]; expert_gate, expert_up [I, H]; expert_down [H, I]; stacked: experts_gate_up [E, 2I, H], experts_down [E, H, I]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from streamconv.options import TARGET_VERSIONS, Version


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
