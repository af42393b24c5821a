"""A tiny Hugging Face Llama written with the stock safetensors writer, for tests that do not need golden answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INTER, HEADS, KV, LAYERS, VOCAB = 128, 256, 4, 2, 2, 160


def config(**changes: Any) -> dict[str, Any]:
    """config.json of the tiny model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    } | changes


def tensors(seed: int = 1, dtype: str = "float16") -> dict[str, np.ndarray[Any, Any]]:
    """Random weights by Hugging Face name."""
    random = np.random.default_rng(seed)
    size = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (HIDDEN,),
            at + "self_attn.q_proj.weight": (HEADS * size, HIDDEN),
            at + "self_attn.k_proj.weight": (KV * size, HIDDEN),
            at + "self_attn.v_proj.weight": (KV * size, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, HEADS * size),
            at + "post_attention_layernorm.weight": (HIDDEN,),
            at + "mlp.gate_proj.weight": (INTER, HIDDEN),
            at + "mlp.up_proj.weight": (INTER, HIDDEN),
            at + "mlp.down_proj.weight": (HIDDEN, INTER),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: random.normal(0, 0.05, shape).astype(dtype) for name, shape in shapes.items()}


def layers(names: Iterable[str]) -> int:
    """The number of layers that tensors of these names are of."""
    return 1 + max((int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))), default=0)


def write(
    folder: Path, weights: dict[str, np.ndarray[Any, Any]] | None = None, settings: dict[str, Any] | None = None
) -> Path:
    """Write the model; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors() if weights is None else weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config() if settings is None else settings))
    return folder
