"""Tiny random model checkpoints, always the same bytes for the same spec.

    python tests/golden/generate.py OUT [NAME ...]

`models.json` describes the models; one folder per model is written under OUT. The numbers come from numpy's frozen
`RandomState` integer stream, seeded per tensor name, so nothing depends on a library's initialiser or its version.
`digest` over all tensors is compared with the one in the spec: a generator that drifts is found here, and not as a
hundred wrong golden hashes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Spec = dict[str, Any]
Tensors = dict[str, torch.Tensor]

MODELS = Path(__file__).with_name("models.json")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
}


def load_specs() -> list[Spec]:
    """All model specs, in the order of the file."""
    models: list[Spec] = json.loads(MODELS.read_text())["models"]
    return models


def random_stream(seed: int, key: str) -> np.random.RandomState:
    """The integer stream that belongs to one tensor."""
    return np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))


def random_tensor(seed: int, key: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Float32 values of roughly normal distribution: the sum of four uniform integers."""
    count = int(np.prod(shape))
    total = random_stream(seed, key).randint(-32768, 32768, size=(4, count)).astype(np.int64).sum(0)
    values = (total.astype(np.float64) / 65536.0 * (std * 1.7320508)).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))


def add_quirks(key: str, weight: torch.Tensor) -> torch.Tensor:
    """Make a few rows awkward: all zero, exact rounding ties, nearly underflowing, one large outlier."""
    if weight.dim() != 2:
        return weight
    rows, columns = weight.shape
    if key.endswith(("up_proj.weight", "w3.weight")):
        weight[3 % rows] = 0.0
    if key.endswith(("down_proj.weight", "w2.weight", "k_proj.weight", "wk.weight")):
        k = torch.arange(columns)
        sign = (1 - 2 * (k % 2)).float()
        ties = ((2 * (k % 60) + 1).float() / 256.0) * sign
        ties[0] = 1.0
        ties[1] = -1.0
        coarse = k[2:columns:7]
        ties[2:columns:7] = ((2 * (coarse % 8) + 1).float() / 16.0) * (1 - 2 * (coarse % 2)).float()
        weight[5 % rows] = ties
    if key.endswith(("o_proj.weight", "wo.weight", "lm_head.weight")):
        weight[7 % rows] *= 2.0**-18
    if key.endswith(("q_proj.weight", "gate_proj.weight", "w1.weight", "wq.weight")):
        weight[1, columns // 2] = 7.5
    return weight


def make(spec: Spec, key: str, shape: tuple[int, ...], kind: str = "linear") -> torch.Tensor:
    """One tensor of the model, in the model's dtype."""
    seed = spec["seed"]
    if kind == "norm":
        weight = 1.0 + random_tensor(seed, key, shape, 0.15)
    elif kind == "bias":
        weight = random_tensor(seed, key, shape, 0.3)
    elif kind == "embedding":
        weight = random_tensor(seed, key, shape, 0.6)
    else:
        weight = random_tensor(seed, key, shape, spec.get("std", 0.05))
        if spec.get("quirks", True):
            weight = add_quirks(key, weight)
    return weight.to(DTYPES[spec["dtype"]]).contiguous()


def hf_config(spec: Spec) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    arch = spec["arch"]
    head_dim = spec.get("head_dim", spec["hidden"] // spec["heads"])
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": spec["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": spec["inter"],
        "max_position_embeddings": spec.get("max_pos", 64),
        "model_type": arch,
        "num_attention_heads": spec["heads"],
        "num_hidden_layers": spec["layers"],
        "num_key_value_heads": spec["kv"],
        "rms_norm_eps": spec.get("eps", 1e-05),
        "rope_theta": spec.get("theta", 10000.0),
        "tie_word_embeddings": bool(spec.get("tied", False)),
        "torch_dtype": spec["dtype"],
        "transformers_version": "4.46.3",
        "use_cache": True,
        "vocab_size": spec["vocab"],
    }
    if arch == "llama":
        config.update(
            attention_bias=bool(spec.get("attn_bias", False)),
            mlp_bias=False,
            pretraining_tp=1,
            rope_scaling=spec.get("rope_scaling"),
        )
    if arch in ("llama", "mistral") and "head_dim" in spec:
        config["head_dim"] = head_dim
    if arch in ("mistral", "mixtral"):
        config["sliding_window"] = spec.get("sliding_window")
    if arch == "mixtral":
        config.update(
            num_local_experts=spec["experts"],
            num_experts_per_tok=spec.get("topk", 2),
            output_router_logits=False,
            router_aux_loss_coef=0.02,
            router_jitter_noise=0.0,
        )
    if arch == "qwen2":
        config.update(
            max_window_layers=spec["layers"],
            sliding_window=None,
            use_sliding_window=False,
            rope_scaling=spec.get("rope_scaling"),
        )
    if arch == "gemma":
        config.update(
            attention_bias=False,
            head_dim=head_dim,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            pad_token_id=0,
        )
    if arch == "phi3":
        config.update(
            attention_bias=False,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            pad_token_id=3,
            sliding_window=spec.get("sliding_window", 2047),
            original_max_position_embeddings=spec.get("max_pos", 64),
            rope_scaling=None,
        )
    return {key: config[key] for key in sorted(config)}


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
        if spec["arch"] == "qwen2" or spec.get("attn_bias"):
            key = f"{prefix}self_attn.{name}_proj.bias"
            yield key, make(spec, key, (heads * head_dim,), "bias")


def _mlp_shapes(spec: Spec) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Name below the layer, shape and kind of each MLP weight."""
    hidden, inter = spec["hidden"], spec["inter"]
    if spec["arch"] == "mixtral":
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
        if spec.get("attn_bias"):
            add(prefix + "self_attn.o_proj.bias", (hidden,), "bias")
        add(prefix + "post_attention_layernorm.weight", (hidden,), "norm")
        for name, shape, kind in _mlp_shapes(spec):
            add(prefix + name, shape, kind)
    add("model.norm.weight", (hidden,), "norm")
    if not spec.get("tied", False):
        add("lm_head.weight", (spec["vocab"], hidden))
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


def _pack_rows(codes: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """Codes [rows, columns] packed along the rows into int32, lowest bits first."""
    rows, columns = codes.shape
    per_word = 32 // bits
    grouped = codes.reshape(rows // per_word, per_word, columns).astype(np.uint32)
    words = np.zeros((rows // per_word, columns), np.uint32)
    for j in range(per_word):
        words |= grouped[:, j] << np.uint32(bits * j)
    return torch.from_numpy(words.view(np.int32).copy())


def gptq_tensors(spec: Spec) -> Tensors:
    """A synthetic group-quantized file: random codes, zeros and scales instead of the layers' weights."""
    group, bits = spec["group_size"], spec.get("bits", 4)
    tensors: Tensors = {}
    for key, weight in hf_tensors({**spec, "dtype": "float16"}).items():
        if weight.dim() != 2 or "layers." not in key:
            tensors[key] = weight
            continue
        base = key.removesuffix(".weight")
        outputs, inputs = weight.shape
        stream = random_stream(spec["seed"], f"gptq:{base}")
        codes = stream.randint(0, 2**bits, size=(inputs, outputs))
        if spec.get("asym", True):
            zeros = stream.randint(0, 2**bits - 1, size=(inputs // group, outputs))
        else:
            zeros = np.full((inputs // group, outputs), 2 ** (bits - 1) - 1)
        scales = random_tensor(spec["seed"], base + ".scales", (inputs // group, outputs), 0.01)
        tensors[base + ".qweight"] = _pack_rows(codes, bits)
        tensors[base + ".qzeros"] = _pack_rows(zeros.T.copy(), bits).t().contiguous()
        tensors[base + ".scales"] = (scales.abs() + 0.001).to(torch.float16)
        tensors[base + ".g_idx"] = torch.arange(inputs, dtype=torch.int32) // group
    return tensors


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors."""
    state = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        state.update(key.encode())
        state.update(str(value.dtype).encode())
        state.update(str(tuple(value.shape)).encode())
        state.update(value.view(torch.uint8).numpy().tobytes() if value.dim() else b"")
    return state.hexdigest()


def write_hf(spec: Spec, out: Path, tensors: Tensors) -> None:
    """A Hugging Face folder: config.json, one file or several with their index."""
    (out / "config.json").write_text(json.dumps(hf_config(spec), indent=2) + "\n")
    shards = spec.get("shards", 1)
    if spec.get("gptq") or shards == 1:
        name = "gptq_model.safetensors" if spec.get("gptq") else "model.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        return
    keys = list(tensors)
    if spec.get("scatter"):  # neighbours land in different files
        groups = [keys[i::shards] for i in range(shards)]
    else:
        per_shard = -(-len(keys) // shards)
        groups = [keys[i * per_shard : (i + 1) * per_shard] for i in range(shards)]
    weight_map: dict[str, str] = {}
    total = 0
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({key: tensors[key] for key in group}, out / name, metadata={"format": "pt"})
        for key in group:
            weight_map[key] = name
            total += tensors[key].numel() * tensors[key].element_size()
    index = {"metadata": {"total_size": total}, "weight_map": {key: weight_map[key] for key in sorted(weight_map)}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_meta(spec: Spec, out: Path, tensors: Tensors) -> None:
    """A Meta folder: params.json and one consolidated file per model-parallel rank."""
    params = {
        "dim": spec["hidden"],
        "n_layers": spec["layers"],
        "n_heads": spec["heads"],
        "norm_eps": spec.get("eps", 1e-05),
        "vocab_size": spec["vocab"],
        "multiple_of": spec.get("multiple_of", 64),
    }
    if spec["kv"] != spec["heads"] or spec.get("write_kv"):
        params["n_kv_heads"] = spec["kv"]
    for key in ("ffn_dim_multiplier", "rope_theta", "use_scaled_rope"):
        if key in spec:
            params[key] = spec[key]
    (out / "params.json").write_text(json.dumps(params))
    shards = spec.get("shards", 1)
    for rank in range(shards):
        part: Tensors = {}
        for key, value in tensors.items():
            if "norm" in key:
                part[key] = value.clone()
                continue
            axis = 1 if any(name in key for name in ("wo.", "w2.")) else 0
            if "tok_embeddings" in key:
                axis = spec.get("tok_dim", 0)
            part[key] = torch.chunk(value, shards, axis)[rank].clone()
        # As a string: torch.save takes the name inside the zip from it.
        torch.save(part, str(out / f"consolidated.{rank:02d}.pth"))


def generate(spec: Spec, out: Path) -> None:
    """Write the model of `spec` into `out/<name>` and check its digest."""
    folder = out / spec["name"]
    folder.mkdir(parents=True)
    if spec["arch"] == "meta":
        tensors = meta_tensors(spec)
        write_meta(spec, folder, tensors)
    else:
        tensors = gptq_tensors(spec) if spec.get("gptq") else hf_tensors(spec)
        write_hf(spec, folder, tensors)
    found = digest(tensors)
    if found != spec["tensor_digest"]:
        raise ValueError(f"{spec['name']}: generated digest {found}, expected {spec['tensor_digest']}")


def main(arguments: list[str]) -> int:
    """Write the named models, or all."""
    out, names = Path(arguments[0]), set(arguments[1:])
    for spec in load_specs():
        if not names or spec["name"] in names:
            generate(spec, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
