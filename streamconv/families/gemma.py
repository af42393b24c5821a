"""Gemma and Gemma-2: norms stored as value + 1, embeddings always tied."""

from streamconv.families.base import LLAMA_TENSORS, MLP_BIASES, QKV_BIASES, Family, without

_GEMMA = without(LLAMA_TENSORS, *MLP_BIASES, *QKV_BIASES, "o_bias")

FAMILIES = (
    Family(
        "gemma",
        ("GemmaForCausalLM",),
        "gemma",
        _GEMMA,
        qkv_bias="never",
        dense_bias="never",
        norm_add_one=True,
        rope_tables=False,
        limits=frozenset({"pp"}),
        handles="norms stored as value + 1; embedding split over ranks; no pipeline stages",
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        "gemma",
        _GEMMA
        | {
            "pre_ffn_norm": ("model.layers.{layer}.pre_feedforward_layernorm.weight",),
            "post_ffn_norm": ("model.layers.{layer}.post_feedforward_layernorm.weight",),
        },
        qkv_bias="never",
        dense_bias="never",
        norm_add_one=True,
        rope_tables=False,
        limits=frozenset({"pp"}),
        handles="as gemma; the norms around the MLP; soft caps",
    ),
)
