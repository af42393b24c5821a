"""A Llama-shaped checkpoint with made-up weights, to measure with."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from streamconv.lazy import np

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES: dict[str, dict[str, int]] = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "llama-tiny": (256, 512, 2, 4, 2, 1024),
        "llama-1b": (2048, 8192, 16, 32, 8, 32768),
        "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    }.items()
}
"""Sizes as config.json has them; bfloat16: 5 MB, 2.2 GB and 16 GB."""
_BLOCK = 16 << 20
"""Weights that differ; every tensor begins at another place of them, since making numbers must not take longer than writing them."""


def tensors(sizes: dict[str, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each, in the order of the file."""
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    pairs = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    listed: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (sizes["vocab_size"], hidden))]
    for layer in range(sizes["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        heads = {"q": (hidden, hidden), "k": (pairs, hidden), "v": (pairs, hidden), "o": (hidden, hidden)}
        listed += [(f"{at}self_attn.{name}_proj.weight", shape) for name, shape in heads.items()]
        listed += [(f"{at}mlp.{name}_proj.weight", (wide, hidden)) for name in ("gate", "up")]
        listed += [(f"{at}mlp.down_proj.weight", (hidden, wide))]
        listed += [(f"{at}{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention")]
    return [*listed, ("model.norm.weight", (hidden,)), ("lm_head.weight", (sizes["vocab_size"], hidden))]


def write(folder: Path, shape: str) -> None:
    """Write the model of a shape; config.json comes last, so that a folder that has one is whole."""
    listed, header, at = tensors(SHAPES[shape]), dict[str, Any](), 0
    for name, size in listed:
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, at + 2 * prod(size)]}
        at += 2 * prod(size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = np.random.default_rng(0).standard_normal(_BLOCK // 2, dtype=np.float32) * np.float32(0.02)
    block = memoryview((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    ones = np.full(max(SHAPES[shape].values()), 0x3F80, np.uint16).tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (_, size) in enumerate(listed):
            left, begin = 2 * prod(size), number * 7919 * 64 % _BLOCK
            while left:
                part = ones[:left] if len(size) == 1 else block[begin : begin + left]
                left, begin = left - len(part), 0
                file.write(part)
    config = SHAPES[shape] | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu"}
    more = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config | more, indent=1))
