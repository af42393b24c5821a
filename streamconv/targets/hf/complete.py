"""Whether a source is the whole model that its config describes, as far as names and shapes of any model tell."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.errors import CheckpointError, printable
from streamconv.targets.hf.check_scales import SCALES

_OF = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.safetensors$")
_LAYER = re.compile(r"^(.*?\blayers?)\.(\d+)\.")
_GATED = ("gate_proj", "up_proj", "down_proj")
_FP8 = ("F8_E4M3", "F8_E5M2")
_SHOWN = 10


def check_complete(index: Index) -> None:
    """Compare the source with its own names and its config.

    Raises:
        CheckpointError: a shard, a layer, a projection or the scale of codes is missing, or two projections do not fit.
    """
    problems = [*_shards(index), *_layers(index), *_projections(index), *_head(index), *_bare_codes(index)]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError("; ".join(problems[:_SHOWN]) + more, hint="is the download complete?")


def _shards(index: Index) -> Iterator[str]:
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for shard in index.shards:
        if match := _OF.match(shard.path.name):
            found[match[1], int(match[3])].add(int(match[2]))
    for (stem, count), present in found.items():
        for number in range(1, min(count, 100_000) + 1):
            if number not in present:
                yield f"{printable(stem)}-{number:05d}-of-{count:05d}.safetensors is missing"


def _layers(index: Index) -> Iterator[str]:
    """A stack of layers that is as long as the config says; which one it is differs from model to model."""
    text = index.config.get("text_config")
    config: Mapping[str, Any] = text if isinstance(text, dict) and "num_hidden_layers" in text else index.config
    if "num_hidden_layers" not in config:
        return
    count = config["num_hidden_layers"]
    if type(count) is not int or not 0 <= count <= 100_000:
        yield f"config.json: num_hidden_layers is {printable(str(count)[:40])}, no number of layers"
        return
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in index.tensors:
        if match := _LAYER.match(name):
            stacks[match[1]].add(int(match[2][:9]))
    if not stacks or any(len(present) >= count and present.issuperset(range(count)) for present in stacks.values()):
        return
    language = [stem for stem in stacks if stem.endswith(("model.layers", "decoder.layers"))]
    stem = language[0] if language else max(stacks, key=lambda stem: len(stacks[stem]))
    missing = sorted({*range(count)} - stacks[stem])
    yield from (f"{printable(stem)}.{number} is missing, config.json tells of {count}" for number in missing)


def _projections(index: Index) -> Iterator[str]:
    """The two halves of a gated MLP and what follows them."""
    modules: dict[str, dict[str, tuple[int, ...] | None]] = defaultdict(dict)
    for name, record in index.tensors.items():
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in _GATED and (leaf.startswith(("weight", "qweight"))):
            plain = leaf == "weight" and len(record.shape) == 2
            modules[parent][last] = record.shape if plain else modules[parent].get(last)
    gated = {_sibling(parent) for parent, held in modules.items() if len(held) == len(_GATED)}
    for parent, held in modules.items():
        if {"down_proj", "gate_proj"} <= held.keys() and "up_proj" not in held:
            yield f"{printable(parent)}.up_proj is missing"
        if {"down_proj", "up_proj"} == held.keys() and _sibling(parent) in gated:
            yield f"{printable(parent)}.gate_proj is missing"
        gate, up = held.get("gate_proj"), held.get("up_proj")
        if gate is not None and up is not None and gate != up:
            yield f"{printable(parent)}: gate_proj is {list(gate)} and up_proj {list(up)}"


def _sibling(module: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", module)


def _head(index: Index) -> Iterator[str]:
    names = index.config.get("architectures")
    causal = isinstance(names, list) and any(isinstance(name, str) and name.endswith("ForCausalLM") for name in names)
    untied = index.config.get("tie_word_embeddings") is False and "model.embed_tokens.weight" in index.tensors
    if causal and untied and not any(name.split(".")[-2:-1] == ["lm_head"] for name in index.tensors):
        yield "lm_head.weight is missing, and config.json does not tie it to the embedding"


def _bare_codes(index: Index) -> Iterator[str]:
    """FP8 weights of a quantized model say nothing without their scales."""
    if not index.config.get("quantization_config"):
        return
    for name, record in index.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and record.dtype.name in _FP8 and not any(f"{module}.{scale}" in index.tensors for scale in SCALES):
            yield f"{printable(module)} has codes and no scales"
