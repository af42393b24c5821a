"""Llama and everything that is spelled like it."""

from streamconv.families.base import LLAMA_TENSORS, Family

FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM",),
        "llama",
        LLAMA_TENSORS,
        handles="MHA, GQA and MQA; attention and MLP biases; tied embeddings; RoPE scaling",
    ),
)
