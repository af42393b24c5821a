"""Gemma and Gemma-2: norms stored as value + 1, embeddings always tied."""

from streamconv.families.base import BARE_LLAMA, Family

FAMILIES = (
    Family(
        "gemma",
        ("GemmaForCausalLM",),
        "gemma",
        BARE_LLAMA,
        norm_add_one=True,
        rope_tables=False,
        pipeline=False,
        handles="norms stored as value + 1; embedding split over ranks; no pipeline stages",
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        "gemma",
        {
            **BARE_LLAMA,
            "pre_ffn_norm": ("model.layers.{layer}.pre_feedforward_layernorm.weight",),
            "post_ffn_norm": ("model.layers.{layer}.post_feedforward_layernorm.weight",),
        },
        norm_add_one=True,
        rope_tables=False,
        pipeline=False,
        handles="as gemma; the norms around the MLP; soft caps",
    ),
)
