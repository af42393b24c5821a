"""Exaone: Llama under other names."""

from streamconv.families.base import Family

_L = "transformer.h.{layer}."

FAMILIES = (
    Family(
        "exaone",
        ("ExaoneForCausalLM",),
        "llama",
        {
            "embedding": ("transformer.wte.weight",),
            "lm_head": ("lm_head.weight",),
            "final_norm": ("transformer.ln_f.weight",),
            "input_norm": (_L + "ln_1.weight",),
            "post_norm": (_L + "ln_2.weight",),
            "q": (_L + "attn.attention.q_proj.weight",),
            "k": (_L + "attn.attention.k_proj.weight",),
            "v": (_L + "attn.attention.v_proj.weight",),
            "o": (_L + "attn.attention.out_proj.weight",),
            "gate": (_L + "mlp.c_fc_0.weight",),
            "up": (_L + "mlp.c_fc_1.weight",),
            "down": (_L + "mlp.c_proj.weight",),
        },
        ignored=(_L + "attn.rotary.inv_freq", "transformer.rotary.inv_freq"),
        handles="GPT-style tensor names",
    ),
)
