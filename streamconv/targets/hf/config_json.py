"""The JSON files of the output, and which tensors its files take.

config.json is the source's own, with `quantization_config` added, replaced or taken out; ModelOpt has a second file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

from streamconv import __version__
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.quantized import inner_configs, without_statement
from streamconv.planning.draft import Draft
from streamconv.targets.hf.recipes import Recipe

_TYPE = ("torch_dtype", "dtype")
_PIECE = 1 << 12
"""Lines that are spelled at a time."""
_SHARD = 5 * 10**9
"""Bytes of a file where the source's files are cut in another way: what transformers takes."""
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""`kv_cache_scheme` of an FP8 KV cache."""


def quantization_config(recipe: Recipe, ignore: Sequence[str], group: int, kv_cache: bool = False) -> dict[str, Any]:
    """What config.json says of the weights.

    Args:
        ignore: full names of every linear-like module that is left as it is.
        kv_cache: FP8 scales of the KV cache are stored.
    """
    if recipe.stated:
        return recipe.stated | ({"group_size": group} if recipe.grouped else {}) | {recipe.leaves: list(ignore)}
    if recipe.container == "modelopt":
        section: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": recipe.algo, "ignore": list(ignore)}
        section["producer"] = {"name": "modelopt", "version": f"streamconv {__version__}"}
        section |= {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if kv_cache else {}
        groups = _modelopt_group(recipe)
        return section | ({"config_groups": {"group_0": groups}} if groups else {})
    weights = recipe.weights | ({"group_size": group} if recipe.grouped else {})
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": recipe.inputs, "format": recipe.form}
    section = compressed(recipe.form, {key: value for key, value in scheme.items() if value is not None}, ignore)
    return section | ({"kv_cache_scheme": dict(KV_CACHE)} if kv_cache else {})


def compressed(form: str, scheme: Mapping[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors, with one scheme for all that is not ignored."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": dict(scheme)},
        "ignore": list(ignore),
    }


def _modelopt_group(recipe: Recipe) -> dict[str, Any] | None:
    """`config_groups` as ModelOpt writes it, for the algorithms for which it does."""
    weights: dict[str, Any]
    if recipe.algo == "FP8":
        weights = {"dynamic": False, "num_bits": 8, "type": "float"}
    elif recipe.algo in ("NVFP4", "W4A16_NVFP4"):
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    else:
        return None
    inputs = {"input_activations": dict(weights)} if recipe.algo != "W4A16_NVFP4" else {}
    return inputs | {"weights": weights, "targets": ["Linear"]}


def hf_quant_config(recipe: Recipe, ignore: Sequence[str], group: int, kv_cache: bool = False) -> bytes:
    """ModelOpt's hf_quant_config.json, which TensorRT-LLM reads first."""
    quantization: dict[str, Any] = {"quant_algo": recipe.algo, "kv_cache_quant_algo": "FP8" if kv_cache else None}
    quantization |= {"group_size": group} if recipe.grouped else {}
    quantization |= recipe.extra | {"exclude_modules": list(ignore)}
    producer = {"name": "modelopt", "version": f"streamconv {__version__}"}
    return dump({"producer": producer, "quantization": quantization})


def output_config(source: Mapping[str, Any], quantization: Mapping[str, Any] | None, dtype: str | None) -> bytes:
    """config.json.

    Args:
        quantization: `quantization_config`; the source's own is taken out, wherever it stands.
        dtype: what the float tensors now are, if that changed.
    """
    config = {key: value for key, value in without_statement(source).items() if key != "quantization_config"}
    if dtype is not None:
        config = _typed(config, dtype)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return dump(config)


def kept_config(source: Mapping[str, Any]) -> bytes:
    """config.json of weights that stay what the source says: its statement stays where it is, that of the whole model as the last key."""
    section = source.get("quantization_config")
    config = {key: value for key, value in source.items() if key != "quantization_config"}
    return dump(config | ({"quantization_config": section} if isinstance(section, dict) else {}))


def _typed(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same with its dtype changed, in the configs of its parts too; under the key that the source uses."""
    typed = {key: dtype if key in _TYPE and isinstance(value, str) else value for key, value in config.items()}
    typed |= {part: _typed(inner, dtype) for part, inner in inner_configs(typed).items()}
    if not any(isinstance(config.get(key), str) for key in _TYPE):
        typed[next((key for key in _TYPE if key in config), "torch_dtype")] = dtype
    return typed


def dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def add_index(draft: Draft) -> None:
    """Add model.safetensors.index.json to an output of several files: every tensor of every file, and the sum of their bytes."""
    if draft.files == ["model.safetensors"]:
        return
    # what json.dumps gives with indent=2, ten times faster, and held once
    weight_map, files = draft.places(), [*map(encode_basestring_ascii, draft.files)]
    text, names, comma = io.BytesIO(), sorted(weight_map), ""
    text.write(f'{{\n  "metadata": {{\n    "total_size": {draft.tensor_bytes()}\n  }},\n  "weight_map": {{'.encode())
    for at in range(0, len(names), _PIECE):
        lines = [f"\n    {encode_basestring_ascii(name)}: {files[weight_map[name]]}" for name in names[at : at + _PIECE]]
        text.write(f"{comma}{','.join(lines)}".encode())
        comma = ","
    text.write(b"\n  }\n}\n")
    draft.side_file("model.safetensors.index.json", text.getvalue())


def shards_of(index: Index, tensors: Iterable[tuple[str, int, int]], most: int | None) -> dict[str, list[str]]:
    """Output file -> the tensors that it takes, in order.

    Args:
        tensors: name, number of the source's shard that holds it, and bytes.
        most: bytes of a file; None splits as the source does.
    """
    if index.views:
        most = most or _SHARD
    if most is None:
        names = output_names([shard.path.name for shard in index.shards])
        files: dict[str, list[str]] = {}
        for tensor, file, _ in tensors:
            files.setdefault(names[file], []).append(tensor)
        return dict(sorted(files.items()))
    shards: list[list[str]] = [[]]
    size = 0
    for tensor, _, nbytes in tensors:
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": part for n, part in enumerate(shards, 1)}


def output_names(names: list[str]) -> list[str]:
    """Names of the output's files for those of the source."""
    if len(names) == 1:
        return ["model.safetensors"]
    given = []
    for name in names:
        stem = name.rpartition(".")[0]
        given.append(("model" + stem.removeprefix("pytorch_model") if stem.startswith("pytorch_model") else stem) + ".safetensors")
    return given
