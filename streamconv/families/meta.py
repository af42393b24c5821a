"""Meta's own names for Llama, in consolidated.NN.pth. No config.json names it: the layout of the folder does."""

from streamconv.families.base import Family

_L = "layers.{layer}."

META = Family(
    "llama-meta",
    (),
    "llama",
    {
        "embedding": ("tok_embeddings.weight",),
        "lm_head": ("output.weight",),
        "final_norm": ("norm.weight",),
        "input_norm": (_L + "attention_norm.weight",),
        "post_norm": (_L + "ffn_norm.weight",),
        "q": (_L + "attention.wq.weight",),
        "k": (_L + "attention.wk.weight",),
        "v": (_L + "attention.wv.weight",),
        "o": (_L + "attention.wo.weight",),
        "gate": (_L + "feed_forward.w1.weight",),
        "up": (_L + "feed_forward.w3.weight",),
        "down": (_L + "feed_forward.w2.weight",),
    },
    ignored=("rope.freqs",),
    handles="consolidated.*.pth in any number of files; rotary pairs of Q and K put in order",
)

FAMILIES = (META,)
