"""Names and shapes of the golden models' tensors, under Hugging Face's and Meta's names."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.golden.random_numbers import Spec, Tensors, make


def _attention(spec: Spec, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Query, key and value projections of one layer."""
    hidden = spec["hidden"]
    head_dim = spec.get("head_dim", hidden // spec["heads"])
    if spec["arch"] == "phi3":
        key = prefix + "self_attn.qkv_proj.weight"
        yield key, make(spec, key, ((spec["heads"] + 2 * spec["kv"]) * head_dim, hidden))
        return
    for name, heads in (("q", spec["heads"]), ("k", spec["kv"]), ("v", spec["kv"])):
        key = f"{prefix}self_attn.{name}_proj.weight"
        if spec.get("dup_kv") and name != "q":
            half = heads // 2
            weight = make(spec, key, (half * head_dim, hidden)).reshape(half, 1, head_dim, hidden)
            yield key, weight.expand(half, 2, head_dim, hidden).reshape(heads * head_dim, hidden).contiguous()
        else:
            yield key, make(spec, key, (heads * head_dim, hidden))
        if spec["arch"] in ("qwen2", "internlm") or spec.get("attn_bias"):
            key = f"{prefix}self_attn.{name}_proj.bias"
            yield key, make(spec, key, (heads * head_dim,), "bias")


def _mlp_shapes(spec: Spec) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Name below the layer, shape and kind of each MLP weight."""
    hidden, inter = spec["hidden"], spec["inter"]
    if spec["arch"] == "qwen3_moe":
        width = spec["moe_inter"]
        yield "mlp.gate.weight", (spec["experts"], hidden), "embedding"
        for expert in range(spec["experts"]):
            prefix = f"mlp.experts.{expert}."
            yield prefix + "gate_proj.weight", (width, hidden), "linear"
            yield prefix + "up_proj.weight", (width, hidden), "linear"
            yield prefix + "down_proj.weight", (hidden, width), "linear"
    elif spec["arch"] == "mixtral":
        yield "block_sparse_moe.gate.weight", (spec["experts"], hidden), "embedding"
        for expert in range(spec["experts"]):
            prefix = f"block_sparse_moe.experts.{expert}."
            yield prefix + "w1.weight", (inter, hidden), "linear"
            yield prefix + "w2.weight", (hidden, inter), "linear"
            yield prefix + "w3.weight", (inter, hidden), "linear"
    elif spec["arch"] == "phi3":
        yield "mlp.gate_up_proj.weight", (2 * inter, hidden), "linear"
        yield "mlp.down_proj.weight", (hidden, inter), "linear"
    else:
        yield "mlp.gate_proj.weight", (inter, hidden), "linear"
        yield "mlp.up_proj.weight", (inter, hidden), "linear"
        yield "mlp.down_proj.weight", (hidden, inter), "linear"


def hf_tensors(spec: Spec) -> Tensors:
    """All tensors under their Hugging Face names. The order decides which shard holds what: keep it."""
    if spec["arch"] in ("internlm2", "exaone"):
        return _other_names(spec)
    hidden = spec["hidden"]
    head_dim = spec.get("head_dim", hidden // spec["heads"])
    tensors: Tensors = {}

    def add(key: str, shape: tuple[int, ...], kind: str = "linear") -> None:
        tensors[key] = make(spec, key, shape, kind)

    add("model.embed_tokens.weight", (spec["vocab"], hidden), "embedding")
    for layer in range(spec["layers"]):
        prefix = f"model.layers.{layer}."
        add(prefix + "input_layernorm.weight", (hidden,), "norm")
        tensors.update(_attention(spec, prefix))
        add(prefix + "self_attn.o_proj.weight", (hidden, spec["heads"] * head_dim))
        if spec["arch"] in ("qwen3", "qwen3_moe"):
            add(prefix + "self_attn.q_norm.weight", (head_dim,), "norm")
            add(prefix + "self_attn.k_norm.weight", (head_dim,), "norm")
        if spec["arch"] == "internlm" or spec.get("attn_bias"):
            add(prefix + "self_attn.o_proj.bias", (hidden,), "bias")
        add(prefix + "post_attention_layernorm.weight", (hidden,), "norm")
        if spec["arch"] == "gemma2":
            add(prefix + "pre_feedforward_layernorm.weight", (hidden,), "norm")
            add(prefix + "post_feedforward_layernorm.weight", (hidden,), "norm")
        for name, shape, kind in _mlp_shapes(spec):
            add(prefix + name, shape, kind)
    add("model.norm.weight", (hidden,), "norm")
    if not spec.get("tied", False) or spec.get("tied_with_head"):
        add("lm_head.weight", (spec["vocab"], hidden))
    return tensors


def _other_names(spec: Spec) -> Tensors:
    """InternLM2, whose wqkv is grouped by KV head, and Exaone."""
    hidden, inter = spec["hidden"], spec["inter"]
    heads, kv = spec["heads"], spec["kv"]
    size = spec.get("head_dim", hidden // heads)
    fused = spec["arch"] == "internlm2"
    tensors: Tensors = {}

    def add(key: str, shape: tuple[int, ...], kind: str = "linear") -> None:
        tensors[key] = make(spec, key, shape, kind)

    add("model.tok_embeddings.weight" if fused else "transformer.wte.weight", (spec["vocab"], hidden), "embedding")
    for layer in range(spec["layers"]):
        prefix = f"model.layers.{layer}." if fused else f"transformer.h.{layer}."
        add(prefix + ("attention_norm.weight" if fused else "ln_1.weight"), (hidden,), "norm")
        if fused:
            add(prefix + "attention.wqkv.weight", ((heads + 2 * kv) * size, hidden))
        for name, count in () if fused else (("q", heads), ("k", kv), ("v", kv)):
            add(f"{prefix}attn.attention.{name}_proj.weight", (count * size, hidden))
        add(prefix + ("attention.wo.weight" if fused else "attn.attention.out_proj.weight"), (hidden, heads * size))
        add(prefix + ("ffn_norm.weight" if fused else "ln_2.weight"), (hidden,), "norm")
        for name in ("feed_forward.w1", "feed_forward.w3") if fused else ("mlp.c_fc_0", "mlp.c_fc_1"):
            add(f"{prefix}{name}.weight", (inter, hidden))
        add(prefix + ("feed_forward.w2.weight" if fused else "mlp.c_proj.weight"), (hidden, inter))
    add("model.norm.weight" if fused else "transformer.ln_f.weight", (hidden,), "norm")
    add("output.weight" if fused else "lm_head.weight", (spec["vocab"], hidden))
    return tensors


def meta_tensors(spec: Spec) -> Tensors:
    """All tensors under Meta's names, before the split into consolidated files."""
    hidden, inter = spec["hidden"], spec["inter"]
    head_dim = hidden // spec["heads"]
    tensors: Tensors = {}

    def add(key: str, shape: tuple[int, ...], kind: str = "linear") -> None:
        tensors[key] = make(spec, key, shape, kind)

    add("tok_embeddings.weight", (spec["vocab"], hidden), "embedding")
    for layer in range(spec["layers"]):
        prefix = f"layers.{layer}."
        add(prefix + "attention.wq.weight", (spec["heads"] * head_dim, hidden))
        add(prefix + "attention.wk.weight", (spec["kv"] * head_dim, hidden))
        add(prefix + "attention.wv.weight", (spec["kv"] * head_dim, hidden))
        add(prefix + "attention.wo.weight", (hidden, spec["heads"] * head_dim))
        add(prefix + "feed_forward.w1.weight", (inter, hidden))
        add(prefix + "feed_forward.w2.weight", (hidden, inter))
        add(prefix + "feed_forward.w3.weight", (inter, hidden))
        add(prefix + "attention_norm.weight", (hidden,), "norm")
        add(prefix + "ffn_norm.weight", (hidden,), "norm")
    add("norm.weight", (hidden,), "norm")
    add("output.weight", (spec["vocab"], hidden))
    return tensors
