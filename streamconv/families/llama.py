"""Llama and everything that is spelled like it: Mistral, Mixtral, Granite, InternLM."""

from streamconv.families.base import ATTENTION_BIASED, LLAMA_TENSORS, Family, without

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
LLAMA = Family(
    "llama",
    ("LlamaForCausalLM",),
    "llama",
    LLAMA_TENSORS,
    handles="MHA, GQA and MQA; attention and MLP biases; tied embeddings; RoPE scaling",
)

FAMILIES = (
    LLAMA,
    Family(
        "mistral",
        ("MistralForCausalLM",),
        "llama",
        ATTENTION_BIASED,
        handles="head size of its own (NeMo); the sliding window is dropped, as NVIDIA does",
    ),
    Family(
        "mixtral",
        ("MixtralForCausalLM",),
        "llama",
        without(ATTENTION_BIASED, "gate", "up", "down") | _EXPERTS,
        handles="experts over tensor and expert parallel ranks; float32 router; stacked experts of transformers 5",
    ),
    Family(
        "granite",
        ("GraniteForCausalLM",),
        "llama",
        LLAMA_TENSORS,
        versions=("1.0", "1.2"),  # 0.16 would ignore the multipliers
        handles="dense models; the multipliers of embedding, attention, residual and logits",
    ),
    Family("internlm", ("InternLMForCausalLM",), "llama", ATTENTION_BIASED, runs_as="llama", handles="attention biases"),
)
