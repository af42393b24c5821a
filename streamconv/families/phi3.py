"""Phi-3 and Phi-3.5 mini and medium: fused QKV and fused gate/up."""

from streamconv.families.base import BARE_LLAMA, Family, without

FAMILIES = (
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        "phi3",
        without(BARE_LLAMA, "q", "k", "v", "gate", "up")
        | {
            "qkv": ("model.layers.{layer}.self_attn.qkv_proj.weight",),
            "gate_up": ("model.layers.{layer}.mlp.gate_up_proj.weight",),
        },
        pipeline=False,
        handles="fused QKV and gate/up, split over ranks; long RoPE; no pipeline stages",
    ),
)
