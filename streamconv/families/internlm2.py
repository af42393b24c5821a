"""InternLM2, whose wqkv is grouped by KV head."""

from streamconv.families.base import Family

FAMILIES = (
    Family(
        "internlm2",
        ("InternLM2ForCausalLM",),
        "internlm2",
        {
            "embedding": ("model.tok_embeddings.weight",),
            "lm_head": ("output.weight",),
            "final_norm": ("model.norm.weight",),
            "input_norm": ("model.layers.{layer}.attention_norm.weight",),
            "post_norm": ("model.layers.{layer}.ffn_norm.weight",),
            "qkv_grouped": ("model.layers.{layer}.attention.wqkv.weight",),
            "o": ("model.layers.{layer}.attention.wo.weight",),
            "gate": ("model.layers.{layer}.feed_forward.w1.weight",),
            "up": ("model.layers.{layer}.feed_forward.w3.weight",),
            "down": ("model.layers.{layer}.feed_forward.w2.weight",),
        },
        rope_tables=False,
        runs_as="llama",
        handles="wqkv grouped by KV head",
    ),
)
