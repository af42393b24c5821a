"""What TensorRT-LLM's loader asks of a checkpoint folder: config.json, the set of rank files, tensors that ranks must hold alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv.errors import VerifyError, printable
from streamconv.natural import natural
from streamconv.targets.trtllm import expected, rank_peers

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


def check(config: Mapping[str, Any], shapes: Shapes, hashes: Mapping[tuple[str, str], str], copies: bool) -> tuple[list[str], list[str]]:
    """Problems and warnings.

    Args:
        hashes: (file, tensor) -> hash of its bytes.
        copies: look for rank files that are copies of each other.
    """
    problems, warnings = expected.check(dict(config), {name: dict(held) for name, held in shapes.items()})
    problems += _peers(config, shapes, hashes, copies)
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


def _peers(config: Mapping[str, Any], shapes: Shapes, hashes: Mapping[tuple[str, str], str], copies: bool) -> list[str]:
    """Rank files that are not those of one conversion."""
    found, tp = list[str](), int(config["mapping"].get("tp_size", 1))
    for name in shapes:
        first = f"rank{int(name[4:-12]) // tp * tp}.safetensors"
        if first in shapes and (odd := set(shapes[first]) ^ set(shapes[name])):
            found.append(f"{first} and {name} hold different tensors, for example {printable(min(odd, key=natural))}")
    held = {name: tuple(tensors) for name, tensors in shapes.items()}
    return found + list(rank_peers.problems(config, held, lambda file, tensor: hashes.get((file, tensor), ""), copies))
