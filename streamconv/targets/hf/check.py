"""What can be said of a quantized Hugging Face directory without its source: ours or another tool's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.checkpoint.limits import MAX_WEIGHT_MAP
from streamconv.checkpoint.untrusted import parse_json, read_file
from streamconv.errors import VerifyError, printable
from streamconv.natural import natural
from streamconv.targets.hf.check_scales import SCALES, SHARED, check_tensors, check_values
from streamconv.targets.hf.rules import default_reason, matches, partners
from streamconv.targets.hf.stated import stated_recipe

Shapes = Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
"""File -> tensor -> (dtype, shape)."""

LOADABLE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I16", "I32", "I64", "BOOL"}
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_WITHOUT_LIST = ("gptq", "awq")
"""Methods whose readers leave what has no codes as it is."""
_CODES = ("weight_packed", "qweight", "weight")


def tensor_files(folder: Path, problems: list[str]) -> list[str]:
    """The safetensors files of a directory, held against its index."""
    present = sorted(path.name for path in folder.iterdir() if path.name.endswith(".safetensors"))
    listed = _weight_map(folder, problems)
    if listed is None:
        if len(present) != 1 and present:
            problems.append(f"{len(present)} safetensors files and no {INDEX}")
        return present
    problems += [f"{printable(name)}, named in {INDEX}, is missing" for name in sorted(set(listed.values()) - set(present))]
    problems += [f"{printable(name)} is not named in {INDEX}: no loader reads it" for name in sorted(set(present) - set(listed.values()))]
    return [name for name in present if name in set(listed.values())]


def _weight_map(folder: Path, problems: list[str]) -> dict[str, str] | None:
    path = folder / INDEX
    if not path.exists():
        return None
    content = parse_json(read_file(path, MAX_WEIGHT_MAP, VerifyError), printable(str(path)), VerifyError)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        problems.append(f"{INDEX} has no weight_map")
        return None
    return listed


def check(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> tuple[list[str], list[str]]:
    """Problems and warnings: the index, the config against the tensors, partners, what is left out of `ignore`."""
    problems: list[str] = []
    warnings: list[str] = []
    tensors = {name: told for file in shapes.values() for name, told in file.items()}
    if sum(map(len, shapes.values())) != len(tensors):
        problems.append("a tensor is in two files")
    listed = _weight_map(folder, [])
    if listed is not None:
        held = {name: file for file, names in shapes.items() for name in names}
        odd = sorted((name for name in {*listed, *held} if listed.get(name) != held.get(name)), key=natural)
        problems += [f"{INDEX}: {printable(name)} is not where it says" for name in odd[:20]]
        problems += _total(folder, tensors)
    stated = config.get("quantization_config")
    codes = {name.rpartition(".")[0] for name in tensors if _is_code(name, tensors)}
    if not isinstance(stated, dict):
        bare = sorted(codes, key=natural)[:5]
        problems += [f"{printable(name)} is quantized, and config.json has no quantization_config" for name in bare]
        return problems, warnings
    if not codes:
        problems.append("config.json has a quantization_config, and no weight is quantized")
    format_stated = stated_recipe(stated)
    if format_stated is not None:
        told = check_tensors(codes, tensors, *format_stated)
        problems += told[0][:20]
        warnings += told[1]
    else:
        warnings.append("config.json states a format that is not known here: dtypes and shapes of its scales are not checked")
    problems += _scales(codes, tensors, format_stated is None)
    problems += check_values(folder, shapes)[:20]
    spellings = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
    ignore: Any = next((stated[key] for key in spellings if stated.get(key)), [])
    patterns = [str(pattern) for pattern in ignore] if isinstance(ignore, list) else []
    try:
        problems += [] if stated.get("quant_method") in _WITHOUT_LIST and not patterns else _ignored(codes, tensors, patterns, config)
    except re.error as error:
        problems.append(f"quantization_config: ignore holds what is no regular expression: {error}")
    problems += _partners(codes, tensors)
    quantized_by_modelopt = str(stated.get("quant_method", "")).startswith("modelopt")
    second = folder / "hf_quant_config.json"
    if quantized_by_modelopt != second.exists():
        problems.append(f"hf_quant_config.json {'is missing' if quantized_by_modelopt else 'is left over: TensorRT-LLM reads it first'}")
    return problems, warnings


def _total(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    from math import prod

    from streamconv.checkpoint.dtypes import DTYPES

    content = json.loads((folder / INDEX).read_bytes())
    metadata = content.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in tensors.values() if dtype in DTYPES)
    return [] if stated == total else [f"{INDEX}: total_size is {stated}, the tensors have {total} bytes"]


def _is_code(name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf in _CODES and tensors[name][0] not in _FLOATS and not module.endswith(("embed_tokens",))


def _scales(codes: set[str], tensors: Mapping[str, tuple[str, tuple[int, ...]]], unknown: bool) -> list[str]:
    lines = []
    for module in sorted(codes, key=natural):
        if unknown and not any(f"{module}.{leaf}" in tensors for leaf in SCALES):
            lines.append(f"{printable(module)} has codes and no scales")
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf in SCALES + SHARED and module not in codes:
            lines.append(f"{printable(name)} belongs to no quantized weight")
    return lines[:20]


def _ignored(
    codes: set[str], tensors: Mapping[str, tuple[str, tuple[int, ...]]], patterns: list[str], config: Mapping[str, Any]
) -> list[str]:
    lines = []
    for module in sorted(codes, key=natural):
        if matches(module, patterns):
            lines.append(f"{printable(module)} is quantized, and the config's ignore list covers it")
    for name, (dtype, shape) in tensors.items():
        module = name.removesuffix(".weight")
        linear = name.endswith(".weight") and len(shape) == 2 and dtype in _FLOATS
        if linear and default_reason(module) not in ("embedding", "not a linear layer") and not matches(module, patterns):
            lines.append(f"{printable(module)} is not quantized, and the config's ignore list does not name it: loaders take it for codes")
    if "lm_head" not in codes and not matches("lm_head", patterns):
        lines.append("the config's ignore list does not name lm_head, which is not quantized")
    return list(dict.fromkeys(lines))[:20]


def _partners(codes: set[str], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    lines = []
    for module in sorted(codes, key=natural):
        for other in partners(module):
            if other not in codes and f"{other}.weight" in tensors:
                lines.append(f"{printable(module)} is quantized and {printable(other)} is not: engines join them to one matrix")
    return lines[:20]
