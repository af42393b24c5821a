"""Random small models of every family whose config.json is right in its sizes and odd in everything else."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from streamconv.families import Family

Tensors = dict[str, torch.Tensor]
DTYPES = ("float16", "bfloat16", "float32")
_ROPE: tuple[Any, ...] = (
    None, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}, {"type": "default"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
)  # fmt: skip
_LINEAR = ("q", "k", "v", "qkv", "qkv_grouped", "o", "gate", "up", "gate_up", "down")
_BIASES = ("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv: int
    size: int
    hidden: int
    width: int
    expert_width: int
    vocab: int
    layers: int
    experts: int

    def shape(self, role: str) -> tuple[int, ...]:
        q, kv, h, w, x = self.heads * self.size, self.kv * self.size, self.hidden, self.width, self.expert_width
        return {
            "embedding": (self.vocab, h), "lm_head": (self.vocab, h), "q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q),
            "q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "q_norm": (self.size,), "k_norm": (self.size,),
            "qkv": (q + 2 * kv, h), "qkv_grouped": (q + 2 * kv, h), "gate": (w, h), "up": (w, h), "down": (h, w), "gate_up": (2 * w, h),
            "gate_bias": (w,), "up_bias": (w,), "router": (self.experts, h), "expert_gate": (x, h), "expert_up": (x, h),
            "expert_down": (h, x), "experts_gate_up": (self.experts, 2 * x, h), "experts_down": (self.experts, h, x),
        }.get(role, (h,))  # fmt: skip


def sizes_of(random: Random, family: Family) -> Sizes:
    heads, size = random.choice((2, 4, 4, 8)), random.choice((16, 32, 32, 64))
    kv = random.choice([n for n in (1, 2, 4, 8) if heads % n == 0])
    hidden = heads * size if random.random() < 0.7 else random.choice((64, 128, 192))
    width, expert = random.choice((128, 128, 256, 256, 100)), random.choice((64, 128))
    experts = random.choice((2, 4)) if "router" in family.tensors else 0
    return Sizes(heads, kv, size, hidden, width, expert, random.choice((16, 37, 64, 65)), random.choice((1, 2, 3)), experts)


def config_of(random: Random, family: Family, sizes: Sizes) -> dict[str, Any]:
    """config.json, right in its sizes and odd in everything else."""
    told: dict[str, Any] = {
        "architectures": [random.choice(family.architectures)], "model_type": family.name, "hidden_size": sizes.hidden,
        "intermediate_size": sizes.width, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv, "vocab_size": sizes.vocab, "max_position_embeddings": random.choice((32, 64)),
        "hidden_act": random.choice(("silu", "silu", "gelu", "gelu_pytorch_tanh", "swiglu")), "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "torch_dtype": random.choice(DTYPES), "tie_word_embeddings": random.random() < 0.4,
    }  # fmt: skip
    if sizes.heads * sizes.size != sizes.hidden or random.random() < 0.5:
        told["head_dim"] = sizes.size
    if sizes.experts:
        told[random.choice(("num_local_experts", "num_experts"))] = sizes.experts
        told["num_experts_per_tok"] = random.choice((1, 2))
        if sizes.expert_width != sizes.width or random.random() < 0.5:
            told["moe_intermediate_size"] = sizes.expert_width
    for key in ("bias", "attention_bias", "mlp_bias"):
        if random.random() < 0.2:
            told[key] = random.random() < 0.6
    if random.random() < 0.3:
        told["rope_scaling"] = random.choice(_ROPE)
    if random.random() < 0.4:
        told["model_type"] = random.choice(("llama", "mixtral", "qwen2", "qwen3", "gemma", "", None, "anything"))
    strays: tuple[tuple[str, Any], ...] = (
        ("rotary_pct", 0.5), ("num_local_experts", 0), ("num_experts", 0), ("moe_intermediate_size", 0), ("kv_channels", sizes.size),
        ("parallel_attn_mlp_res", True), ("attention_multiplier", 0.5), ("logits_scaling", 8.0), ("sliding_window", 16), ("seq_length", 99),
        ("num_experts_per_tok", 2), ("partial_rotary_factor", 0.5), ("query_pre_attn_scalar", 64), ("hidden_activation", "silu"),
    )  # fmt: skip
    for key, value in random.sample(strays, random.choice((0, 0, 1, 2))):
        told[key] = value
    absent = ("model_type", "tie_word_embeddings", "torch_dtype", "hidden_act", "rope_theta", "rms_norm_eps", "max_position_embeddings")
    for key in random.sample(absent, random.choice((0, 0, 0, 1, 2))):
        told.pop(key)
    if sizes.kv == sizes.heads and random.random() < 0.3:
        told.pop("num_key_value_heads")
    return told


def tensors_of(random: Random, family: Family, sizes: Sizes, told: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """Weights, mostly those that config.json asks for, and ranges."""
    biased = told.get("bias", told.get("attention_bias"))
    have = {"q_bias", "k_bias", "v_bias"} if "q_bias" in family.tensors and (biased or family.qkv_bias) else set()
    have |= {"o_bias"} if "o_bias" in family.tensors and biased else set()
    have |= {"gate_bias", "up_bias", "down_bias"} if told.get("mlp_bias") else set()
    if random.random() < 0.05:
        have ^= {random.choice(_BIASES)}
    stacked = random.random() < 0.3
    skip = {role for role in _BIASES if role not in have}
    skip |= {"expert_gate", "expert_up", "expert_down"} if stacked else {"experts_gate_up", "experts_down"}
    if random.random() < (0.7 if told.get("tie_word_embeddings", "gemma" in family.name) else 0.05):
        skip.add("lm_head")
    dtype = getattr(torch, str(told.get("torch_dtype", "float16")))
    made, ranges = Tensors(), Tensors()
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    for role, patterns in family.tensors.items():
        if role in skip:
            continue
        pattern = random.choice(patterns) if "expert" not in role else patterns[0]
        for layer in range(sizes.layers) if "{layer}" in pattern else (0,):
            for expert in range(sizes.experts) if "{expert}" in pattern else (0,):
                name = pattern.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                made[name] = (torch.randn(sizes.shape(role), generator=generator) * 0.05).to(dtype)
                if role in _LINEAR:
                    module, shape = name.removesuffix(".weight"), sizes.shape(role)
                    ranges[module + ".x"], ranges[module + ".y"] = torch.full((shape[1],), 3.0), torch.full((shape[0],), 5.0)
    return made, ranges
