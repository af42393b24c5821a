"""The tensors of each quantized weight: what its format wants, their dtypes and shapes, and numbers that are no scales."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from streamconv.checkpoint.dtypes import FLOATS
from streamconv.checkpoint.shard import Shard
from streamconv.errors import printable
from streamconv.natural import natural
from streamconv.quants.factors import odd_scales
from streamconv.targets.hf.recipes import BLOCK
from streamconv.targets.hf.rules import partners
from streamconv.targets.hf.schemes import other_groups, wrong_order
from streamconv.targets.hf.stated import Statement
from streamconv.targets.hf.units import Tensors

SCALES = ("weight_scale", "weight_scale_inv", "scales")
WORDS = ("scales",)
"""Scales of integers in words: AutoRound's are negative where the smallest weight is the farthest from zero."""
SHARED = ("weight_global_scale", "weight_scale_2")
_OWN = (*SCALES, *SHARED, "weight_shape", "weight_zero_point", "weight", "weight_packed", "weight_g_idx", "qweight", "qzeros")
_CODES = ("weight_packed", "qweight", "weight")
INPUTS = ("input_scale", "input_global_scale", "activation_scale", "k_scale", "v_scale")
MULTIPLIERS = ("pre_quant_scale",)
_READ = frozenset((*SCALES, *SHARED, *INPUTS, *MULTIPLIERS, "weight_shape", "weight_g_idx", "qzeros", "g_idx"))
_WINDOW = 4 << 20


def codes_of(tensors: Tensors) -> set[str]:
    """The modules whose weights are codes."""
    modules = set()
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf in _CODES and tensors[name][0] not in (*FLOATS, "F64") and not module.endswith("embed_tokens"):
            modules.add(module)
    return modules


def check_tensors(codes: Iterable[str], tensors: Tensors, statement: Statement) -> tuple[list[str], list[str]]:
    """(problems, warnings) of the tensors beside each code."""
    odd, partial = dict[str, list[str]](), list[str]()
    own = _own(tensors)
    for module in codes:
        problems = odd.setdefault(module, [])
        group, shown = statement.scheme_of(module), printable(module)
        if group is None:
            problems.append(f"{shown} is quantized, and no target of the config's groups takes it: loaders take its codes for floats")
            continue
        scheme = group.scheme
        if scheme is None:
            continue
        expected, code = scheme.expected(module, tensors), tensors.get(f"{module}.{scheme.main}")
        if code is None or expected is None:
            code_text = f"{code[0]} {list(code[1])}" if code is not None else f"no {scheme.main}"
            problems.append(f"{shown}: {code_text} is no weight of {scheme.title}, which config.json states")
            continue
        for leaf, choices in expected.items():
            entry = tensors.get(f"{module}.{leaf}")
            if entry is None:
                problems.append(f"{shown} has codes and no {leaf}, which {scheme.title} needs")
            elif entry not in choices:
                dtype, shape = next((choice for choice in choices if choice[0] == entry[0]), choices[0])
                right = f"{dtype} {list(shape)}"
                problems.append(f"{shown}.{leaf} is {entry[0]} {list(entry[1])}, and must be {right}")
        if others := own.get(module, set()) - expected.keys():
            problems += [f"{shown}.{leaf} is no part of {scheme.title}, which config.json states" for leaf in _OWN if leaf in others]
        rows, cols = code[1]
        if ("cols" in scheme.tiled and cols % BLOCK) or ("rows" in scheme.tiled and rows > BLOCK and rows % BLOCK):
            partial.append(module)
    warnings = []
    if partial:
        partial.sort(key=natural)
        more = f" and {len(partial) - 1} more" if len(partial) > 1 else ""
        warnings.append(
            f"{printable(partial[0])}{more}: a size is no multiple of 128; engines that quantize activations in groups of 128 refuse such a"
            " layer, and transformers reads its tiles wrongly"
        )
    wrong = sorted((module for module, lines in odd.items() if lines), key=natural)  # slow: of those alone
    return [line for module in wrong for line in odd[module]], warnings


def _own(tensors: Tensors) -> dict[str, set[str]]:
    """Module -> the last names of what belongs to its weight."""
    leaves: dict[str, set[str]] = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf in _OWN:
            leaves.setdefault(module, set()).add(leaf)
    return leaves


def unordered(codes: Iterable[str], tensors: Tensors, statement: Statement) -> Iterator[str]:
    """Weights with act order, and nothing that says which."""
    for module in sorted(codes, key=natural):
        group = statement.scheme_of(module)
        scheme = group.scheme if group is not None else None
        if scheme is not None and scheme.main == "qweight" and scheme.ordered and f"{module}.g_idx" not in tensors:
            yield f"{printable(module)} has no g_idx, and config.json states act order (desc_act)"


def check_values(folder: Path, shapes: Mapping[str, Tensors], tensors: Tensors, statement: Statement) -> list[str]:
    """Numbers that cannot be: scales, the shape beside packed weights, zero points of weights that are said to have none."""
    problems: list[str] = []
    shared: dict[str, bytes] = {}
    for file, names in shapes.items():
        scales = [name for name in names if has_values_to_check(name)]
        if not scales:
            continue
        shard = Shard(folder / file)
        try:
            entries = shard.header().tensors
            for name in scales:
                entry = entries[name]
                for at in range(entry.begin, entry.end, _WINDOW):
                    with shard.window(at, min(at + _WINDOW, entry.end)) as window:
                        odd = wrong_values(name, bytes(window), entry.dtype.name, tensors, statement)
                        if name.endswith(SHARED) and entry.end - entry.begin == 4:
                            shared[name] = bytes(window)
                    if odd:
                        problems.append(f"{file}: {printable(name)} holds {odd}")
                        break
        finally:
            shard.close()
    return problems + list(unequal(shared))


def has_values_to_check(name: str) -> bool:
    """Whether `wrong_values` looks at a tensor."""
    leaf = name.rpartition(".")[2]
    return leaf in _READ or leaf.endswith("_scales")


def wrong_scales(name: str, data: bytes, dtype: str) -> str:
    """What of a tensor's bytes is no scale, in words; "" if all is well, or the tensor holds none."""
    leaf = name.rpartition(".")[2]
    if leaf in SCALES + SHARED + INPUTS:
        return odd_scales(data, dtype, signed=leaf in WORDS)
    if leaf in MULTIPLIERS or (leaf.endswith("_scales") and dtype == "U8"):
        return odd_scales(data, dtype, signed=True, zero=True)
    return ""


def wrong_values(name: str, data: bytes, dtype: str, tensors: Tensors, statement: Statement) -> str:
    """What of a tensor's bytes cannot be, in words; "" if all is well."""
    module, _, leaf = name.rpartition(".")
    if odd := wrong_scales(name, data, dtype):
        return odd
    group = statement.scheme_of(module)
    scheme = group.scheme if group is not None else None
    if scheme is None:
        return ""
    compressed = scheme.container == "compressed-tensors"
    if leaf == "weight_g_idx":
        return other_groups(data, scheme.group or -1) if compressed else ""
    if leaf == "g_idx":
        return wrong_order(scheme, data) if scheme.container == "gptq" else ""
    if leaf == "qzeros":
        if scheme.middle is None:
            return ""
        each = sum(scheme.middle << shift for shift in range(0, 8, min(scheme.bits, 8)))
        return "" if data.count(each) == len(data) else "zero points, and config.json says sym: engines leave them out"
    code = tensors.get(f"{module}.weight_packed")
    if leaf != "weight_shape" or dtype != "I64" or len(data) != 16 or code is None or not compressed:
        return ""
    rows, cols = struct.unpack("<2q", data)
    fits = rows == code[1][0] and cols > 0 and -(-cols * scheme.bits // 32) == code[1][-1]
    return "" if fits else f"[{rows}, {cols}], and the codes are {code[0]} {list(code[1])}"


def unequal(shared: Mapping[str, bytes]) -> Iterator[str]:
    """Partners with scales of their own where engines take one for all."""
    for name, data in shared.items():
        module, _, leaf = name.rpartition(".")
        group = partners(module)
        first = next((f"{other}.{leaf}" for other in group if f"{other}.{leaf}" in shared), name)
        if shared[first] != data:
            yield f"{printable(name)} differs from {printable(first)}: engines join these weights, and use one scale for both"
