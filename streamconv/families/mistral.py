"""Mistral and Mistral-NeMo: Llama with its own head size; the sliding window leaves no trace."""

from streamconv.families.base import LLAMA_TENSORS, MLP_BIASES, Family, without

FAMILIES = (
    Family(
        "mistral",
        ("MistralForCausalLM",),
        "llama",
        without(LLAMA_TENSORS, *MLP_BIASES),
        handles="head size of its own (NeMo); the sliding window is dropped, as NVIDIA does",
    ),
)
