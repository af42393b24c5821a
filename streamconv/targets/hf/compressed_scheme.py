"""compressed-tensors' `config_groups`: what the args of a scheme mean for the tensors of a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.dtypes import FLOATS
from streamconv.checkpoint.unknown_statements import FORMATS
from streamconv.checkpoint.untrusted import shown_value
from streamconv.errors import printable
from streamconv.targets.hf.schemes import Expected, Scheme
from streamconv.targets.hf.units import Entry, Tensors

_SCHEME = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGS = ("num_bits", "type", "symmetric", "dynamic", "strategy", "group_size", "block_structure", "scale_dtype", "zp_dtype", "observer",
         "observer_kwargs", "actorder")  # fmt: skip
_STRATEGIES = ("tensor", "channel", "token", "group", "tensor_group", "block", "attn_head")
_ORDERED = ("group", "dynamic", True)
"""Values of actorder with weight_g_idx, the group of each input feature; compressed-tensors reads them until mid-2026."""
_ORDERS = (None, False, "weight", "static", *_ORDERED)
_E4M3, _U8 = "torch.float8_e4m3fn", "torch.uint8"
_DTYPES = {_E4M3: "F8_E4M3", _U8: "U8"}


@dataclass(frozen=True, slots=True)
class _Form:
    """A format: name and dtype of the codes, and the args that it takes."""

    main: str
    dtype: str
    type: str
    bits: tuple[int, ...]
    strategies: tuple[str, ...]
    group: int | None = None
    scale: str | None = None


_INTEGERS = ("tensor", "channel", "group", "block")
_FORMS = {
    "float-quantized": _Form("weight", "F8_E4M3", "float", (8,), ("tensor", "channel", "group", "block")),
    "int-quantized": _Form("weight", "I8", "int", (4, 8), _INTEGERS),
    "pack-quantized": _Form("weight_packed", "I32", "int", (2, 3, 4, 5, 6, 7, 8), ("channel", "group", "tensor")),
    "nvfp4-pack-quantized": _Form("weight_packed", "U8", "float", (4,), ("tensor_group",), 16, "F8_E4M3"),
    "mxfp4-pack-quantized": _Form("weight_packed", "U8", "float", (4,), ("group",), 32, "U8"),
    "mxfp8-quantized": _Form("weight", "F8_E4M3", "float", (8,), ("group",), 32, "U8"),
}


@dataclass(frozen=True, slots=True)
class Args:
    """Quantization args with their defaults."""

    bits: int
    type: str
    symmetric: bool
    dynamic: bool | str
    strategy: str
    group: int | None
    block: tuple[int, int]
    scale: str | None
    ordered: bool = False


def _compressed(name: str, form: _Form, weights: Args, inputs: Args | None) -> Scheme:
    def expected(module: str, tensors: Tensors) -> Expected | None:
        code = tensors.get(f"{module}.{form.main}")
        if code is None or code[0] != form.dtype or len(code[1]) != 2:
            return None
        rows, bits = code[1][0], weights.bits
        cols = code[1][1] * {"I32": 32, "U8": 8}.get(code[0], bits) // bits
        grid = _grid(weights, rows, cols)
        if grid is None:
            return None
        kinds = FLOATS if weights.scale is None else (weights.scale,)
        expected: Expected = {form.main: [code], "weight_scale": [(kind, grid) for kind in kinds]}
        scalar: list[Entry] = [(kind, (1,)) for kind in FLOATS]
        if weights.ordered:
            expected["weight_g_idx"] = [("I32", (cols,))]
        if name == "pack-quantized":
            expected["weight_shape"] = [("I64", (2,))]
            expected |= {"weight_zero_point": [("I32", (-(-rows * bits // 32), grid[1]))]} if not weights.symmetric else {}
        elif not weights.symmetric:
            expected["weight_zero_point"] = [("I8", grid)]
        if name == "nvfp4-pack-quantized":
            expected["weight_global_scale"] = scalar
        if inputs is not None and inputs.dynamic is not True:
            leaf = "input_global_scale" if name == "nvfp4-pack-quantized" else "input_scale"
            expected[leaf] = [*scalar, *((kind, ()) for kind in FLOATS)]
            expected |= {"input_zero_point": [("I8", (1,))]} if not inputs.symmetric else {}
        return expected

    title, tiled = f"{name}, {weights.bits} bits, a scale for each {weights.strategy}", "cols" if weights.strategy == "block" else ""
    return Scheme("compressed-tensors", title, form.main, expected, tiled, weights.bits, weights.group, weights.ordered)


def _grid(weights: Args, rows: int, cols: int) -> tuple[int, ...] | None:
    """The shape of the scales of a weight [rows, cols], None if its columns do not divide into groups."""
    if weights.strategy == "tensor":
        return (1,)
    if weights.strategy == "channel":
        return rows, 1
    if weights.strategy == "block":
        return -(-rows // weights.block[0]), -(-cols // weights.block[1])
    group = weights.group or 0
    return (rows, cols // group) if group and cols % group == 0 else None


def compressed_groups(config: Mapping[str, Any], problems: list[str]) -> list[tuple[Sequence[str], Scheme | None]]:
    """(targets, scheme) of each group; None where the scheme is not known here. What no engine reads is added to `problems`."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        problems.append(f"quantization_config: config_groups is {shown_value(groups)}, no object with groups")
        return []
    result: list[tuple[Sequence[str], Scheme | None]] = []
    for name, scheme in list(groups.items())[:1000]:
        at = f"quantization_config: {printable(name, 40)}"
        if not isinstance(scheme, dict):
            problems.append(f"{at} is {shown_value(scheme)}, no scheme")
            continue
        problems += [f"{at}: {printable(key, 40)} is no part of a scheme: readers refuse it" for key in scheme if key not in _SCHEME][:3]
        targets = scheme.get("targets")
        if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
            problems.append(f"{at}: targets is {shown_value(targets)}, no list of modules")
            targets = []
        result += [(targets, one) for one in _scheme(at, scheme, config, problems)]
    return result


def _scheme(at: str, scheme: Mapping[str, Any], config: Mapping[str, Any], problems: list[str]) -> list[Scheme | None]:
    """The scheme, None if it is not known here; nothing if no engine reads it, which has been told."""
    name = scheme.get("format") or config.get("format")
    if name in FORMATS:
        return [None]
    form = _FORMS.get(name) if isinstance(name, str) else None
    if form is None:
        problems.append(f"{at}: format is {shown_value(name)}, which no engine reads")
        return []
    weights, inputs = (_args(f"{at}: {part}", scheme.get(part), form, problems) for part in ("weights", "input_activations"))
    if weights is None:
        known_wrong = any(line.startswith(f"{at}: weights") for line in problems)
        problems += [] if known_wrong else [f"{at}: weights is null: no weight is quantized"]
        return []
    wrong = [] if weights.type == form.type else [f"type is {weights.type}"]
    wrong += [] if weights.bits in form.bits else [f"num_bits is {weights.bits}"]
    wrong += [] if weights.strategy in form.strategies else [f"strategy is {weights.strategy}"]
    wrong += [] if form.group in (None, weights.group) else [f"group_size is {weights.group}"]
    wrong += [] if weights.symmetric or form.type == "int" else ["symmetric is false"]
    wrong += [] if weights.dynamic is False else ["dynamic is true"]
    if wrong:
        problems.append(f"{at}: {', '.join(wrong)} of the weights, which {name} does not take")
        return []
    return [_compressed(str(name), form, weights, inputs)]


def _args(at: str, arguments: object, form: _Form, problems: list[str]) -> Args | None:
    """The args of a part; None if it has none, or if they are told to be wrong."""
    if arguments is None:
        return None
    if not isinstance(arguments, dict):
        problems.append(f"{at} is {shown_value(arguments)}, no args")
        return None
    wrong = [f"{printable(key, 40)} is no arg: readers refuse it" for key in arguments if key not in _ARGS]
    bits, kind, group = arguments.get("num_bits", 8), arguments.get("type", "int"), arguments.get("group_size")
    symmetric, dynamic, block = arguments.get("symmetric", True), arguments.get("dynamic", False), arguments.get("block_structure")
    strategy, order = arguments.get("strategy"), arguments.get("actorder")
    order = order.lower() if isinstance(order, str) else order
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    checks = {
        "num_bits": type(bits) is int and 0 < bits <= 32,
        "type": kind in ("int", "float"),
        "symmetric": type(symmetric) is bool,
        "dynamic": type(dynamic) is bool or dynamic == "local",
        "strategy": isinstance(strategy, str) and strategy in _STRATEGIES,
        "group_size": group is None or (type(group) is int and (group == -1 or 0 < group < 1 << 20)),
        "block_structure": block is None or _block(block) is not None,
        "actorder": any(order is known or (order == known and isinstance(order, str)) for known in _ORDERS),
    }
    wrong += [f"{key} is {shown_value(arguments.get(key))}" for key, right in checks.items() if not right]
    if wrong:
        problems += [f"{at}: {line}" for line in wrong[:3]]
        return None
    dtype = arguments.get("scale_dtype")
    scale = form.scale if dtype is None else _DTYPES.get(str(dtype))
    return Args(bits, kind, symmetric, dynamic, strategy, group, _block(block) or (128, 128), scale, order in _ORDERED)


def _block(structure: object) -> tuple[int, int] | None:
    """[rows, cols], or "128x128"."""
    sizes = [int(part) if part.isdecimal() else 0 for part in structure[:20].split("x")] if isinstance(structure, str) else structure
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and 0 < size < 1 << 20 for size in sizes):
        return sizes[0], sizes[1]
    return None
