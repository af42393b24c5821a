"""Write PyTorch zip checkpoints and Meta's layout without torch and without holding a tensor: for make_model.py."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

STORAGES = {"bf16": ("BFloat16Storage", 2), "fp16": ("HalfStorage", 2), "fp32": ("FloatStorage", 4)}

Tensors = list[tuple[str, tuple[int, ...]]]


def _whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _sizes(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_whole, values)) + b"t"


def state_pickle(tensors: Tensors, dtype: str) -> bytes:
    """data.pkl of a flat dict of contiguous tensors, tensor i in storage i, as torch.save would say it."""
    storage = STORAGES[dtype][0].encode()
    out = [b"\x80\x02}("]
    for number, (name, shape) in enumerate(tensors):
        strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
        out += [
            _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _text("storage") + b"ctorch\n" + storage + b"\n",
            _text(str(number)) + _text("cpu") + _whole(math.prod(shape)) + b"tQ" + _whole(0),
            _sizes(shape) + _sizes(strides) + b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*out, b"u."])


def write_torch(path: Path, tensors: Tensors, dtype: str, fill: Callable[[IO[bytes], str, tuple[int, ...]], None]) -> int:
    """One file that torch.load reads; `fill` writes the bytes of a tensor. Gives the bytes of all tensors."""
    itemsize, total = STORAGES[dtype][1], 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", state_pickle(tensors, dtype))
        archive.writestr(f"{path.stem}/byteorder", "little")
        for number, (name, shape) in enumerate(tensors):
            info = zipfile.ZipInfo(f"{path.stem}/data/{number}")
            info.file_size = math.prod(shape) * itemsize  # decides whether the entry needs 64-bit sizes
            total += info.file_size
            with archive.open(info, "w") as entry:
                fill(entry, name, shape)
        archive.writestr(f"{path.stem}/version", "3\n")
    return total


def meta_tensors(shape: Any, files: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of one of Meta's `files` files (Llama 3's cuts)."""
    hidden, query, key_value = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.tied or any(size % files for size in (shape.vocab, query, key_value, shape.intermediate)):
        raise SystemExit(f"--layout meta: sizes must be multiples of {files} files, and lm_head its own")
    yield "tok_embeddings.weight", (shape.vocab // files, hidden)
    for layer in range(shape.layers):
        at = f"layers.{layer}."
        yield at + "attention.wq.weight", (query // files, hidden)
        yield at + "attention.wk.weight", (key_value // files, hidden)
        yield at + "attention.wv.weight", (key_value // files, hidden)
        yield at + "attention.wo.weight", (hidden, query // files)
        yield at + "feed_forward.w1.weight", (shape.intermediate // files, hidden)
        yield at + "feed_forward.w2.weight", (hidden, shape.intermediate // files)
        yield at + "feed_forward.w3.weight", (shape.intermediate // files, hidden)
        yield at + "attention_norm.weight", (hidden,)
        yield at + "ffn_norm.weight", (hidden,)
    yield "norm.weight", (hidden,)
    yield "output.weight", (shape.vocab // files, hidden)


def meta_params(shape: Any) -> dict[str, Any]:
    """params.json of the model."""
    return {
        "dim": shape.hidden,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "hidden_dim": shape.intermediate,
        "vocab_size": shape.vocab,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
    }
