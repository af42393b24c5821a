"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE."""

from streamconv.families.base import BARE_LLAMA, Family, with_bias, without

_HEAD_NORMS = {
    "q_norm": ("model.layers.{layer}.self_attn.q_norm.weight",),
    "k_norm": ("model.layers.{layer}.self_attn.k_norm.weight",),
}
_QWEN3 = {**BARE_LLAMA, **_HEAD_NORMS}
_EXPERTS = {
    "router": ("model.layers.{layer}.mlp.gate.weight",),
    "expert_gate": ("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",),
    "expert_up": ("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",),
    "expert_down": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
    "experts_gate_up": ("model.layers.{layer}.mlp.experts.gate_up_proj",),
    "experts_down": ("model.layers.{layer}.mlp.experts.down_proj",),
}

FAMILIES = (
    Family(
        "qwen2",
        ("Qwen2ForCausalLM",),
        "qwen",
        with_bias(BARE_LLAMA, "q", "k", "v"),
        qkv_bias=True,
        handles="Qwen2 and Qwen2.5; biases of Q, K and V; tied embeddings",
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        "qwen",
        _QWEN3,
        versions=("1.0", "1.2"),
        handles="norms of query and key heads; head size of its own; tied embeddings",
    ),
    Family(
        "qwen3_moe",
        ("Qwen3MoeForCausalLM",),
        "qwen",
        without(_QWEN3, "gate", "up", "down") | _EXPERTS,
        versions=("1.0", "1.2"),
        handles="as qwen3; experts over tensor and expert parallel ranks; float32 router",
    ),
)
