"""Write a Llama-shaped Hugging Face checkpoint of any size, in little memory.

    python benchmarks/make_model.py --out FOLDER [--layout hf|hf-bin|meta] [--layers 16] ... [--sparse]

The defaults are a model of 2.2 GB. Weights look like a real model's (normal, small), but come from one random block of
64 MB that every tensor starts to read at another place: making the numbers must not take longer than writing them.
With --sparse only the headers are written and the files get their full length as holes: a 405B model takes no room.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, from anywhere

from benchmarks.torch_files import meta_params, meta_tensors, write_torch

BLOCK_BYTES = 64 << 20
WEIGHT_STD = 0.02
DTYPES = {"bf16": ("BF16", "bfloat16", 2), "fp16": ("F16", "float16", 2), "fp32": ("F32", "float32", 4)}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shape:
    """What decides the tensors of the model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int
    dtype: str
    tied: bool = False


def hf_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the files."""
    hidden, query, key_value = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (query, hidden)
        yield prefix + "self_attn.k_proj.weight", (key_value, hidden)
        yield prefix + "self_attn.v_proj.weight", (key_value, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        yield prefix + "mlp.gate_proj.weight", (shape.intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (shape.intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, shape.intermediate)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, hidden)


def hf_config(shape: Shape) -> dict[str, Any]:
    """config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": DTYPES[shape.dtype][1],
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def to_dtype(values: Array, dtype: str) -> Array:
    """Float32 values as the bit patterns of `dtype`; numpy has no bfloat16, so that one is rounded by hand."""
    if dtype == "fp32":
        return values
    if dtype == "fp16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded: Array = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    return rounded


def random_block(dtype: str, seed: int) -> memoryview:
    """64 MB of weights, made in pieces so that the float32 values never exist all at once."""
    size = DTYPES[dtype][2]
    stream = np.random.default_rng(seed)
    block = bytearray(BLOCK_BYTES)
    piece = 1 << 20
    for start in range(0, BLOCK_BYTES, piece * size):
        count = min(piece, (BLOCK_BYTES - start) // size)
        values = stream.standard_normal(count, dtype=np.float32) * np.float32(WEIGHT_STD)
        block[start : start + count * size] = to_dtype(values, dtype).tobytes()
    return memoryview(block)


def write_weight(file: IO[bytes], block: memoryview, name: str, size: int, itemsize: int) -> None:
    """`size` bytes of the block, round and round, from a place that depends on the name."""
    at = zlib.crc32(name.encode()) % (len(block) // itemsize) * itemsize
    while size:
        part = block[at : at + min(size, len(block) - at)]
        file.write(part)
        size -= len(part)
        at = 0


def split_shards(tensors: list[tuple[str, tuple[int, ...]]], count: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Consecutive tensors in `count` groups of about the same number of bytes, none empty."""
    if not 1 <= count <= len(tensors):
        raise SystemExit(f"--shards {count}: the model has {len(tensors)} tensors")
    total = sum(math.prod(shape) for _, shape in tensors)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    done = 0
    for i, (name, shape) in enumerate(tensors):
        full = done >= total * len(groups) / count
        if groups[-1] and len(groups) < count and (full or len(tensors) - i <= count - len(groups)):
            groups.append([])
        groups[-1].append((name, shape))
        done += math.prod(shape)
    return groups


def write_tensor(block: memoryview, dtype: str, file: IO[bytes], name: str, shape: tuple[int, ...]) -> None:
    """The bytes of one tensor: a norm is all ones, as in a model that was just initialised."""
    if len(shape) == 1:
        file.write(to_dtype(np.ones(shape, np.float32), dtype).tobytes())
    else:
        itemsize = DTYPES[dtype][2]
        write_weight(file, block, name, math.prod(shape) * itemsize, itemsize)


def write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], dtype: str, block: memoryview | None
) -> int:
    """One safetensors file; holes instead of weights without a block. Gives the bytes of its tensors."""
    code, _, itemsize = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors:
        end = at + math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if block is None:
            file.truncate(8 + len(text) + at)
            return at
        for name, shape in tensors:
            write_tensor(block, dtype, file, name, shape)
    return at


def write_meta(out: Path, shape: Shape, *, files: int = 2, seed: int = 0) -> int:
    """Write Meta's layout: consolidated.NN.pth, each with its part of every tensor."""
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for number in range(files):
        fill = functools.partial(write_tensor, random_block(shape.dtype, seed + number), shape.dtype)
        tensors = list(meta_tensors(shape, files))
        total += write_torch(out / f"consolidated.{number:02d}.pth", tensors, shape.dtype, fill)
    (out / "params.json").write_text(json.dumps(meta_params(shape)) + "\n")
    return total


def write_model(
    out: Path, shape: Shape, *, shards: int = 3, seed: int = 0, sparse: bool = False, torch_files: bool = False
) -> int:
    """Write the checkpoint folder, in safetensors or PyTorch's .bin; gives the bytes of all tensors."""
    out.mkdir(parents=True, exist_ok=True)
    stem, ending = ("pytorch_model", "bin") if torch_files else ("model", "safetensors")
    groups = split_shards(list(hf_tensors(shape)), shards)
    block = None if sparse else random_block(shape.dtype, seed)
    weight_map: dict[str, str] = {}
    total = 0
    for i, group in enumerate(groups):
        name = f"{stem}.{ending}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}"
        if torch_files:
            assert block is not None
            total += write_torch(out / name, group, shape.dtype, functools.partial(write_tensor, block, shape.dtype))
        else:
            total += write_shard(out / name, group, shape.dtype, block)
        weight_map |= dict.fromkeys((tensor for tensor, _ in group), name)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    # Last, so that a folder with a config.json is a whole model.
    (out / "config.json").write_text(json.dumps(hf_config(shape), indent=2) + "\n")
    return total


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a Llama-shaped checkpoint of any size.")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, help="hidden / heads, unless given")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--tied", action="store_true", help="no lm_head")
    parser.add_argument("--shards", type=int, help="files: 3 unless given, Meta 2")
    parser.add_argument("--sparse", action="store_true", help="headers only, the weights are holes")
    parser.add_argument("--layout", choices=["hf", "hf-bin", "meta"], default="hf")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = Shape(
        hidden=args.hidden,
        layers=args.layers,
        intermediate=args.intermediate,
        heads=args.heads,
        kv_heads=args.kv_heads,
        vocab=args.vocab,
        head_dim=args.head_dim or args.hidden // args.heads,
        dtype=args.dtype,
        tied=args.tied,
    )
    shards = args.shards or (2 if args.layout == "meta" else 3)
    if args.sparse and args.layout != "hf":
        raise SystemExit("--sparse goes with --layout hf only")
    if args.layout == "meta":
        total = write_meta(args.out, shape, files=shards, seed=args.seed)
    else:
        torch_files = args.layout == "hf-bin"
        total = write_model(
            args.out, shape, shards=shards, seed=args.seed, sparse=args.sparse, torch_files=torch_files
        )
    print(f"{args.out}: {total / 1e9:.2f} GB in {shards} files{', sparse' if args.sparse else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
