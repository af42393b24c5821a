"""What TensorRT-LLM's loader asks of a checkpoint folder: config.json, the set of rank files, tensors that ranks must hold alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import VerifyError, printable
from streamconv.natural import natural
from streamconv.targets.trtllm import expected

Shapes = Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
"""File -> tensor -> (dtype, shape)."""

LOADABLE = {"F16", "BF16", "F32", "I8", "I32", "I64", "BOOL", "F8_E4M3"}
_REQUIRED = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "mapping")


def tensor_files(folder: Path, config: Mapping[str, Any], problems: list[str]) -> list[str]:
    """The rank files that config.json speaks of and that are there, in order.

    Raises:
        VerifyError: config.json describes no ranks.
    """
    problems += [f"config.json: {key} is missing" for key in _REQUIRED if config.get(key) is None]
    for key in ("quant_mode", "quant_algo", "kv_dtype"):
        if key in config:
            problems.append(f"config.json: top-level {key} makes the loader fail")
    world = _world(config, problems)
    present = {path.name for path in folder.iterdir() if re.fullmatch(r"rank\d+\.safetensors", path.name)}
    wanted = {f"rank{number}.safetensors" for number in range(world)}
    problems += [f"{name} is missing" for name in sorted(wanted - present)]
    problems += [f"{name} belongs to no rank of config.json" for name in sorted(present - wanted)]
    return sorted(wanted & present, key=lambda text: int(text[4:-12]))


def check(config: Mapping[str, Any], shapes: Shapes, hashes: Mapping[tuple[str, str], str]) -> tuple[list[str], list[str]]:
    """Problems and warnings.

    Args:
        hashes: (file, tensor) -> hash of its bytes.
    """
    problems, warnings = expected.check(dict(config), {name: dict(held) for name, held in shapes.items()})
    problems += _replicas(config, shapes, hashes)
    return problems, warnings


def _world(config: Mapping[str, Any], problems: list[str]) -> int:
    mapping = config.get("mapping")
    if not isinstance(mapping, dict):
        raise VerifyError("config.json: mapping is not an object")
    try:
        tp, pp, cp = (int(mapping.get(key, 1)) for key in ("tp_size", "pp_size", "cp_size"))
        if tp * pp * cp != int(mapping.get("world_size", 1)):
            problems.append("config.json: mapping.world_size is not tp_size * pp_size * cp_size")
        if int(mapping.get("moe_tp_size", tp)) * int(mapping.get("moe_ep_size", 1)) not in (tp, 1, -1, -tp):
            problems.append("config.json: moe_tp_size * moe_ep_size is not tp_size")
    except (TypeError, ValueError, OverflowError) as error:
        raise VerifyError(f"config.json: mapping: {error}") from error
    if tp < 1 or pp < 1 or tp * pp > expected.MOST_RANKS:
        raise VerifyError(f"config.json: mapping: tp_size {tp} and pp_size {pp} cannot be")
    return tp * pp


def _replicas(config: Mapping[str, Any], shapes: Shapes, hashes: Mapping[tuple[str, str], str]) -> list[str]:
    """Tensors that every tensor parallel rank must hold alike."""
    problems: list[str] = []
    mapping = config["mapping"]
    tp, pp = int(mapping.get("tp_size", 1)), int(mapping.get("pp_size", 1))
    for stage in range(pp):
        names = [f"rank{stage * tp + rank}.safetensors" for rank in range(tp)]
        if not all(name in shapes for name in names):
            continue
        first = shapes[names[0]]
        for name in names[1:]:
            if set(first) != set(shapes[name]):
                odd = min(set(first) ^ set(shapes[name]), key=natural)
                problems.append(f"{names[0]} and {name} hold different tensors, for example {printable(odd)}")
        for tensor in first:
            whole = tensor.endswith(("norm.weight", "ln_f.weight", "router.weight", "scaling_factor")) and (
                "prequant" not in tensor and "weights_scaling" not in tensor
            )
            if whole and len({hashes.get((name, tensor)) for name in names}) > 1:
                problems.append(f"{printable(tensor)} differs between the ranks of stage {stage}")
    return problems
