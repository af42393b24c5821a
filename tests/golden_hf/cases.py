"""The golden cases: what llm-compressor, ModelOpt, transformers and compressed-tensors' dequantizers made of tiny models, as hashes.

`cases.json` has one case a line. `tensors` is {prefix: {module: {last name: hash}}}, of the tensors that are not the source's own; a case
that is `like` another one has its tensors. A hash is of dtype, shape and bytes, see `short_hash`. Arithmetic "llm-compressor-cpu" are the
bytes of that tool on a CPU; float32 those of the same tool for a float32 copy of the model. Where a tool is known to be wrong, the
right answer is stored: W4A16_AWQ has its pre-scales, Mixtral its own names, layers that do not divide by 128 are left.
`configs.json` holds what the tools say in config.json, less what says nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Content = dict[str, tuple[str, list[int], bytes]]
"""Tensor -> dtype, shape, bytes."""

_SILENT = {"version", "observer", "global_compression_ratio", "observer_kwargs", "transform_config", "sparsity_config",
           "quantization_status", "actorder", "producer", "fmt", "scale_fmt", "dequantize", "expert_dtype"}  # fmt: skip
_LISTS = ("ignore", "modules_to_not_convert")


@dataclass(frozen=True)
class Case:
    """One conversion with its right answer.

    Attributes:
        model: of models.json, or the case whose output is the source.
        config: name of what config.json says; None if nothing is asked for.
        tensors: name -> hash, of those that are not the source's own.
    """

    name: str
    model: str
    arguments: tuple[str, ...]
    config: str | None
    tensors: Mapping[str, str] = field(repr=False)

    def __str__(self) -> str:
        return self.name


@functools.cache
def load() -> dict[str, Case]:
    """The cases by name."""
    found: dict[str, Case] = {}
    for held in json.loads((HERE / "cases.json").read_text()):
        if "like" in held:
            tensors = found[held["like"]].tensors
        else:
            tensors = {
                f"{prefix}.{module}.{leaf}": value
                for prefix, modules in held["tensors"].items()
                for module, leaves in modules.items()
                for leaf, value in leaves.items()
            }
        found[held["case"]] = Case(held["case"], held["model"], tuple(held["arguments"]), held.get("config"), tensors)
    return found


@functools.cache
def configs() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((HERE / "configs.json").read_text())
    return made


def short_hash(dtype: str, shape: list[int], data: bytes) -> str:
    """The form of cases.json."""
    return hashlib.sha256(f"{dtype} {shape} {hashlib.sha256(data).hexdigest()}".encode()).hexdigest()[:16]


def read(path: Path) -> Content:
    """The tensors of a safetensors file, read without any library."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    content = memoryview(data)[8 + size :]
    return {name: (told["dtype"], told["shape"], bytes(content[slice(*told["data_offsets"])])) for name, told in header.items()}


def read_all(folder: Path) -> tuple[Content, dict[str, str]]:
    """(the tensors of a folder, tensor -> file)."""
    tensors: Content = {}
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = read(path)
        assert not held.keys() & tensors.keys(), "a tensor is in two files"
        tensors |= held
        where |= dict.fromkeys(held, path.name)
    return tensors, where


def check(case: Case, source: Path, out: Path) -> None:
    """Everything that the case says of an output.

    Raises:
        AssertionError: names what is wrong.
    """
    before, _ = read_all(source)
    tensors, where = read_all(out)
    made = {name.rpartition(".")[0] for name in case.tensors}
    replaced = ("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_global_scale", "weight_shape")
    gone = {f"{module}.{leaf}" for module in made for leaf in replaced}
    kept = {name for name in before if name not in gone and not name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert sorted(tensors) == sorted({*case.tensors, *kept})
    wrong = [(name, *tensors[name][:2]) for name in case.tensors if short_hash(*tensors[name]) != case.tensors[name]]
    wrong += [(name, *tensors[name][:2]) for name in kept if tensors[name] != before[name]]
    assert not wrong, f"{len(wrong)} tensors differ: {wrong[:5]}"
    for name, file in where.items():
        module = name.rpartition(".")[0]
        assert all(where[f"{module}.{leaf}"] == file for leaf in ("weight", "weight_packed") if f"{module}.{leaf}" in where), name
    _check_index(out, tensors, where)
    _check_config(case, json.loads((source / "config.json").read_text()), out, tensors)


def _check_index(out: Path, tensors: Content, where: dict[str, str]) -> None:
    path = out / "model.safetensors.index.json"
    if not path.exists():
        assert set(where.values()) == {"model.safetensors"}
        return
    index = json.loads(path.read_text())
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())


def _check_config(case: Case, source: dict[str, Any], out: Path, tensors: Content) -> None:
    config = json.loads((out / "config.json").read_text())
    stated = config.pop("quantization_config", None)
    source.pop("quantization_config", None)
    if "--dtype" not in case.arguments:
        assert config == source
    second = out / "hf_quant_config.json"
    if "none" in case.arguments:
        assert stated is None and not second.exists()
        return
    listed = {name for key in _LISTS for name in stated.get(key, ())}
    assert listed == left_unquantized(tensors)
    if case.config is not None:
        wanted = configs()[case.config]
        assert meaning(stated) == {key: value for key, value in wanted.items() if key != "hf_quant_config"}
        assert second.exists() == ("hf_quant_config" in wanted)
        if second.exists():
            told = json.loads(second.read_text())["quantization"]
            assert set(told.pop("exclude_modules")) == listed
            assert told == wanted["hf_quant_config"]


def left_unquantized(tensors: Content) -> set[str]:
    """Every linear layer that is not quantized, and lm_head, which a tied model has without a tensor."""
    plain = {name.removesuffix(".weight") for name, (dtype, shape, _) in tensors.items()
             if name.endswith(".weight") and dtype in ("BF16", "F16", "F32") and len(shape) == 2}  # fmt: skip
    return {name for name in plain if not re.search(r"embed_tokens$|norm$", name)} | {"lm_head"}


def meaning(stated: dict[str, Any]) -> dict[str, Any]:
    """A quantization_config without what says nothing, and without names of groups and modules."""
    found = {key: value for key, value in _said(stated).items() if key not in ("config_groups", *_LISTS)}
    schemes = []
    for group in (stated.get("config_groups") or {}).values():
        scheme = {"format": stated["format"]} if "format" in stated else {}
        scheme |= _said(group)
        for part in ("weights", "input_activations"):
            if part in scheme:
                scheme[part] = {"symmetric": True, "dynamic": False} | scheme[part]
        schemes.append(scheme)
    return found | {"schemes": schemes}


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _said(inner) for key, inner in value.items() if key not in _SILENT}
        return {key: inner for key, inner in kept.items() if inner not in (None, {}, [], "")}
    return [_said(inner) for inner in value] if isinstance(value, list) else value
