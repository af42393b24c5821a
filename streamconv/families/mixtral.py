"""Mixtral: experts in a grid of tensor and expert parallel ranks, router in float32."""

from streamconv.families.base import LLAMA_TENSORS, MLP_BIASES, Family, without

_EXPERTS = {
    "router": (
        "model.layers.{layer}.block_sparse_moe.gate.weight",
        "model.layers.{layer}.mlp.gate.weight",
    ),
    "expert_gate": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",),
    "expert_up": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",),
    "expert_down": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",),
    # transformers 5 may store all experts of a layer in one tensor
    "experts_gate_up": ("model.layers.{layer}.mlp.experts.gate_up_proj",),
    "experts_down": ("model.layers.{layer}.mlp.experts.down_proj",),
}

FAMILIES = (
    Family(
        "mixtral",
        ("MixtralForCausalLM",),
        "llama",
        without(LLAMA_TENSORS, *MLP_BIASES, "gate", "up", "down") | _EXPERTS,
        handles="experts over tensor and expert parallel ranks; float32 router; stacked experts of transformers 5",
    ),
)
