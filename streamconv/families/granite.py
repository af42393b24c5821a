"""Granite dense: Llama whose multipliers live in config.json; 1.2 only, as 0.16 would ignore them."""

from streamconv.families.base import LLAMA_TENSORS, Family

FAMILIES = (
    Family(
        "granite",
        ("GraniteForCausalLM",),
        "llama",
        LLAMA_TENSORS,
        versions=("1.0", "1.2"),
        handles="dense models; the multipliers of embedding, attention, residual and logits",
    ),
)
