"""The tensors of each quantized weight: what its format wants, their dtypes and shapes, and numbers that are no scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.dtypes import BF16
from streamconv.checkpoint.shard import Shard
from streamconv.errors import printable
from streamconv.targets.hf.recipes import BLOCK, Recipe, Request
from streamconv.targets.hf.rules import partners

if TYPE_CHECKING:
    import numpy as np

Told = tuple[str, tuple[int, ...]]
Tensors = Mapping[str, Told]

FLOATS = ("F32", "F16", "BF16")
SCALES = ("weight_scale", "weight_scale_inv", "scales")
SHARED = ("weight_global_scale", "weight_scale_2")
_OWN = (*SCALES, *SHARED, "weight_shape", "weight_zero_point", "weight", "weight_packed")
_WINDOW = 4 << 20


def tensors_wanted(module: str, recipe: Recipe, group: int, code: Told) -> dict[str, list[Told]] | None:
    """Last name -> the dtypes and shapes that it may have, from the codes'; None if these are of another format.

    Scales that are floats may be of any float type: readers convert them.
    """
    codec = recipe.codec(Request(BF16, group, "float32", ""))
    first = codec.parts(256, 256)[0]
    if len(code[1]) != 2 or code[0] != first.dtype.name:
        return None
    down, across = (256 / size for size in first.shape)
    rows, cols = int(code[1][0] * down), int(code[1][1] * across)
    if rows % recipe.whole or cols % (recipe.unit or group):
        return None
    found: dict[str, list[Told]] = {}
    for part in codec.parts(rows, cols):
        own = recipe.shapes.get(part.role)
        shape = own(rows, cols) if own else part.shape
        kinds = FLOATS if part.dtype.name in FLOATS else (part.dtype.name,)
        found[recipe.tensors[part.role]] = [(kind, shape) for kind in kinds]
    scalar: list[Told] = [("F32", ())] if recipe.container == "modelopt" else [(kind, (1,)) for kind in FLOATS]
    if recipe.lone is not None and rows <= BLOCK and cols <= BLOCK:
        found["weight_scale"] += scalar
    if recipe.shared is not None:
        found[recipe.shared[0]] = scalar
    elif codec.needs:
        found["weight_scale"] = scalar
    if recipe.weight_shape:
        found["weight_shape"] = [("I64", (2,))]
    if recipe.pre_scales and not partners(module):
        found[recipe.pre_scales] = [(kind, (cols,)) for kind in FLOATS]
    if recipe.input_scale is not None:
        found[recipe.input_scale[0]] = [*scalar, *((kind, ()) for kind in FLOATS)]
    return found


def check_tensors(codes: Iterable[str], tensors: Tensors, recipe: Recipe, group: int) -> tuple[list[str], list[str]]:
    """(problems, warnings) of the tensors beside each code."""
    problems, partial = [], []
    main = next(iter(recipe.tensors.values()))
    for module in sorted(codes):
        code = tensors.get(f"{module}.{main}")
        wanted = tensors_wanted(module, recipe, group, code) if code is not None else None
        if code is None or wanted is None:
            shown = f"{code[0]} {list(code[1])}" if code is not None else f"no {main}"
            problems.append(f"{printable(module)}: {shown} is no weight of {recipe.quant}, which config.json states")
            continue
        for leaf, choices in wanted.items():
            told = tensors.get(f"{module}.{leaf}")
            if told is None:
                problems.append(f"{printable(module)} has codes and no {leaf}")
            elif told not in choices:
                right = f"{choices[0][0]} {list(choices[0][1])}"
                problems.append(f"{printable(f'{module}.{leaf}')} is {told[0]} {list(told[1])}, and must be {right}")
        problems += [
            f"{printable(f'{module}.{leaf}')} is no part of {recipe.quant}, which config.json states"
            for leaf in _OWN
            if leaf not in wanted and f"{module}.{leaf}" in tensors
        ]
        rows, cols = code[1]
        if recipe.tiles and (cols % BLOCK or (recipe.container == "hf" and rows > BLOCK and rows % BLOCK)):
            partial.append(module)
    warnings = []
    if partial:
        more = f" and {len(partial) - 1} more" if len(partial) > 1 else ""
        warnings.append(
            f"{printable(partial[0])}{more}: a size is no multiple of 128; engines that quantize activations in groups of 128 refuse such a"
            " layer, and transformers reads its tiles wrongly"
        )
    return problems, warnings


def check_values(folder: Path, shapes: Mapping[str, Tensors]) -> list[str]:
    """Scales that are NaN, infinite, zero or negative; shared scales that differ among partners."""
    problems, shared = [], {}
    for file, names in shapes.items():
        wanted = [name for name in names if name.rpartition(".")[2] in SCALES + SHARED]
        if not wanted:
            continue
        shard = Shard(folder / file)
        try:
            header = shard.header()
            for name in wanted:
                tensor = header.tensors[name]
                for at in range(tensor.begin, tensor.end, _WINDOW):
                    with shard.window(at, min(at + _WINDOW, tensor.end)) as window:
                        odd = _odd(bytes(window), tensor.dtype.name)
                    if odd:
                        problems.append(f"{file}: {printable(name)} holds {odd}")
                        break
                if name.endswith(SHARED) and tensor.end - tensor.begin == 4:
                    with shard.window(tensor.begin, tensor.end) as window:
                        shared[name] = bytes(window)
        finally:
            shard.close()
    return problems + list(_unequal(shared))


def _odd(data: bytes, dtype: str) -> str:
    """What numbers are no scales, in words; "" if all are."""
    import numpy as np

    if dtype in ("U8", "F8_E8M0"):
        return "an exponent byte of 255, which is NaN" if 255 in data else ""
    if dtype == "F8_E4M3":
        raw: np.ndarray[Any, Any] = np.frombuffer(data, np.uint8)
        nan, zero, negative = raw & 127 == 127, raw & 127 == 0, raw > 127
    elif dtype in FLOATS:
        if dtype == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, np.float32 if dtype == "F32" else np.float16)
        nan, zero, negative = ~np.isfinite(values), values == 0, values < 0
    else:
        return ""
    for found, text in ((nan, "NaN or infinity"), (zero, "0"), (negative, "a negative number")):
        if found.any():
            return f"{text}, which is no scale ({int(found.sum())} of {found.size})"
    return ""


def _unequal(shared: Mapping[str, bytes]) -> Iterator[str]:
    """Partners with scales of their own where engines take one for all."""
    for name, data in shared.items():
        module, _, leaf = name.rpartition(".")
        group = partners(module)
        first = next((f"{other}.{leaf}" for other in group if f"{other}.{leaf}" in shared), name)
        if shared[first] != data:
            yield f"{printable(name)} differs from {printable(first)}: engines join these weights, and use one scale for both"
