"""Whether rank files are of one conversion: ranks of a stage hold some tensors alike, and no two ranks hold the same parts of the others.

What is alike in all of NVIDIA's conversions is taken for alike here (`tests/unit/test_rank_peers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from streamconv.checkpoint.header_parse import TensorEntry
from streamconv.checkpoint.shard import Shard
from streamconv.errors import printable

_ALIKE = ("norm.weight", "ln_f.weight", "router.weight", "clamp_val", "scale_to_int", "act_scale", "scaling_factor")
_OWN = ("weights_scaling_factor", "prequant_scaling_factor")
"""What ends like a tensor that is alike, and is each rank's own."""
_CUT = tuple(f"{module}.weight" for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj", "lm_head"))
_SMALL_CUT = ("qkv.bias", "smoother")
_EMBEDDING = "vocab_embedding.weight"
_WHOLE, _SAMPLE, _MOST = 1 << 20, 4096, 64 << 20
"""Bytes up to which a tensor is read whole when a checkpoint is opened, of a sample of a larger one, and of one held against a manifest."""


class RankFile(NamedTuple):
    """A rank file and what it holds."""

    shard: Shard
    tensors: Mapping[str, TensorEntry]


Digest = Callable[[str, str], str]
"""(file, tensor) -> hash of it; empty if it tells nothing."""


def is_alike(config: Mapping[str, Any], tensor: str) -> bool:
    """Whether all tensor parallel ranks hold the same of this tensor."""
    if tensor.endswith(_EMBEDDING):
        return not config.get("use_parallel_embedding")
    if tensor.endswith((".dense.bias", ".proj.bias")):  # of packed weights the first rank alone has it, the others zeros
        algo = (config.get("quantization") or {}).get("quant_algo")
        return not any(name in str(algo) for name in ("AWQ", "GPTQ"))
    return tensor.endswith(_ALIKE) and not tensor.endswith(_OWN)


def problems(config: Mapping[str, Any], files: Mapping[str, Sequence[str]], digest: Digest, copies: bool = True) -> Iterator[str]:
    """Why rank files cannot be those of one conversion.

    Args:
        files: "rankN.safetensors" -> names of its tensors.
        copies: look for files that hold the same weights, too.
    """
    tp = int((config.get("mapping") or {}).get("tp_size", 1))
    stages: dict[int, list[str]] = {}
    for name in files:
        stages.setdefault(int(name[4:-12]) // tp, []).append(name)
    for stage, names in stages.items():
        first = min(names, key=lambda name: int(name[4:-12]))
        for name in names:
            alike = [tensor for tensor in files[name] if is_alike(config, tensor) and tensor in files[first]]
            other = [tensor for tensor in alike if digest(name, tensor) != digest(first, tensor)]
            if other:
                more = f" and {len(other) - 1} more tensors differ" if len(other) > 1 else " differs"
                why = f"{printable(other[0])}{more} between the ranks of stage {stage}, which hold it alike in every conversion"
                yield f"{name} is of another model or conversion than {first}: {why}"
    if copies:
        for names in _copies(files, digest):
            yield f"{' and '.join(names)} hold the same parts of every weight: one is a copy of the other"


def _copies(files: Mapping[str, Sequence[str]], digest: Digest) -> Iterator[list[str]]:
    """Groups of files whose weights are equal, all of them."""
    cut_names = {name: tuple(tensor for tensor in tensors if tensor.endswith(_CUT)) for name, tensors in files.items()}
    by_names: dict[tuple[str, ...], list[str]] = {}
    for name, cut in cut_names.items():
        by_names.setdefault(cut, []).append(name)
    for cut, names in by_names.items():
        groups, warned = [names], False
        for tensor in cut:
            split: dict[tuple[int, str], list[str]] = {}
            for number, group in enumerate(groups):
                for name in group if len(group) > 1 else ():
                    split.setdefault((number, digest(name, tensor)), []).append(name)
            warned = warned or any(text for _, text in split)
            groups = [group for group in split.values() if len(group) > 1]
        yield from groups if warned and cut else ()


def sampled(ranks: Mapping[str, RankFile]) -> Digest:
    """Hashes of small tensors, and of three samples of large ones. Of weights that are one number nothing is told."""

    def digest(file: str, tensor: str) -> str:
        shard, entry = ranks[file].shard, ranks[file].tensors[tensor]
        size = entry.end - entry.begin
        if size <= _WHOLE and not tensor.endswith(_CUT):
            return hash_of(shard, entry)
        starts = sorted({entry.begin, entry.begin + max(0, size - _SAMPLE) // 2, max(entry.begin, entry.end - _SAMPLE)})
        read = b"".join(_read(shard, at, min(at + _SAMPLE, entry.end)) for at in starts)
        return xxhash.xxh3_128(read).hexdigest() if read[8:] != read[:-8] else ""

    return digest


def small_tensors(config: Mapping[str, Any], rank: RankFile) -> list[TensorEntry]:
    """The smallest tensor of a rank that all hold alike, and the smallest that is its own: their hashes tell which rank it is."""
    entries = rank.tensors.values()
    alike = [entry for entry in entries if is_alike(config, entry.name)]
    cut = [entry for entry in entries if entry.name.endswith((*_CUT, *_SMALL_CUT)) and entry.end - entry.begin <= _MOST]
    return [min(each, key=lambda entry: entry.end - entry.begin) for each in (alike, cut) if each]


def hash_of(shard: Shard, entry: TensorEntry) -> str:
    """XXH3-128 (hex) of a tensor's bytes."""
    digest = xxhash.xxh3_128()
    for at in range(entry.begin, entry.end, 8 << 20):
        digest.update(_read(shard, at, min(at + (8 << 20), entry.end)))
    return digest.hexdigest()


def _read(shard: Shard, begin: int, end: int) -> bytes:
    with shard.window(begin, end) as data:
        return bytes(data)
