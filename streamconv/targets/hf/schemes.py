"""How the weights of some modules are stored: the tensors of a weight in each container; compressed-tensors' have a module of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import BF16, FLOATS
from streamconv.lazy import np
from streamconv.targets.hf.recipes import BLOCK, CodecOptions, Recipe
from streamconv.targets.hf.rules import partners
from streamconv.targets.hf.units import Entry, Tensors

Expected = dict[str, list[Entry]]
"""Last name -> the dtypes and shapes that the tensor may have."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A scheme of a container.

    Attributes:
        container: "compressed-tensors", "modelopt", "hf", "gptq" or "awq".
        title: for people.
        main: last name of the codes.
        expected: the tensors of a module; None if its codes are of another format.
        tiled: which sizes should be multiples of 128: "cols", "rows, cols", or none.
        bits: of integers.
        group: input features that share a scale; -1 for all, None where they are not in groups.
        ordered: act order: a tensor says which group a feature belongs to.
        middle: what every stored zero point must be; None if any.
    """

    container: str
    title: str
    main: str
    expected: Callable[[str, Tensors], Expected | None]
    tiled: str = ""
    bits: int = 8
    group: int | None = None
    ordered: bool = False
    middle: int | None = None


def tiles(height: int, width: int, static: bool) -> Scheme:
    """The container hf: tiles of height x width with a scale each, or one scale for all where the height is 0."""

    def expected(module: str, tensors: Tensors) -> Expected | None:
        code = tensors.get(f"{module}.weight")
        if code is None or code[0] != "F8_E4M3" or len(code[1]) != 2:
            return None
        name = "weight_scale" if f"{module}.weight_scale_inv" not in tensors and f"{module}.weight_scale" in tensors else "weight_scale_inv"
        rows, cols = code[1]
        shapes = [(-(-rows // height), -(-cols // width))] if height else [(), (1,), (1, 1)]
        kinds = (*FLOATS, "F8_E8M0", "U8") if height else FLOATS
        expected: Expected = {"weight": [code], name: [(kind, shape) for kind in kinds for shape in shapes]}
        if static:
            leaf = "activation_scale" if f"{module}.activation_scale" in tensors else "input_scale"
            expected[leaf] = [(kind, shape) for kind in FLOATS for shape in ((), (1,))]
        return expected

    title = f"fp8 in tiles of {height} x {width}" if height else "fp8 with one scale"
    return Scheme("hf", title, "weight", expected, "rows, cols" if height > 1 else "")


def modelopt(recipe: Recipe, group: int) -> Scheme:
    """A `quant_algo`, as the row of the formats table says."""
    main = next(iter(recipe.tensors.values()))

    def expected(module: str, tensors: Tensors) -> Expected | None:
        code, codec = tensors.get(f"{module}.{main}"), recipe.codec(CodecOptions(BF16, group, "float32", ""))
        first = codec.parts(256, 256)[0]
        if code is None or len(code[1]) != 2 or code[0] != first.dtype.name:
            return None
        down, across = (256 / size for size in first.shape)
        rows, cols = int(code[1][0] * down), int(code[1][1] * across)
        if rows % recipe.whole or cols % (recipe.unit or group):
            return None
        expected: Expected = {}
        for part in codec.parts(rows, cols):
            kinds = FLOATS if part.dtype.name in FLOATS else (part.dtype.name,)
            expected[recipe.tensors[part.role]] = [(kind, recipe.shape(part, rows, cols)) for kind in kinds]
        scalar: list[Entry] = [("F32", ())]
        if recipe.lone is not None and rows <= BLOCK and cols <= BLOCK:
            expected["weight_scale"] += scalar
        if recipe.shared is not None:
            expected[recipe.shared[0]] = scalar
        elif codec.needs:
            expected["weight_scale"] = scalar
        if recipe.pre_scales and not partners(module):
            expected[recipe.pre_scales] = [(kind, (cols,)) for kind in FLOATS]
        if recipe.input_scale is not None:
            expected[recipe.input_scale[0]] = [(kind, ()) for kind in FLOATS]
        return expected

    tiled = "cols" if recipe.tiles else ""
    return Scheme("modelopt", f"ModelOpt's {recipe.algo}", main, expected, tiled, group=group if recipe.grouped else None)


def words(method: str, bits: int, group: int, ordered: bool, middle: int | None) -> Scheme:
    """GPTQ or AutoAWQ."""

    def expected(module: str, tensors: Tensors) -> Expected | None:
        code = tensors.get(f"{module}.qweight")
        if code is None or code[0] != "I32" or len(code[1]) != 2:
            return None
        each = 32 // bits
        k, n = (code[1][0] * each, code[1][1]) if method == "gptq" else (code[1][0], code[1][1] * each)
        groups = -(-k // group) if group > 0 else 1
        expected: Expected = {"qweight": [code], "qzeros": [("I32", (groups, n // each))]}
        expected["scales"] = [(kind, (groups, n)) for kind in FLOATS]
        if f"{module}.g_idx" in tensors:
            expected["g_idx"] = [("I32", (k,))]
        return expected

    return Scheme(method, f"{method}, {bits} bits, groups of {group}", "qweight", expected, "", bits, group, ordered, middle)


def wrong_order(scheme: Scheme, data: bytes) -> str:
    """What of a GPTQ weight's g_idx cannot be, in words; "" if all is well."""
    order, group = np.frombuffer(data, np.int32), scheme.group or -1
    if scheme.ordered:
        return other_groups(data, group)
    plain = np.arange(len(order), dtype=np.int32) // np.int32(group if group > 0 else len(order))
    return "" if (order == plain).all() else "an order of its own, and config.json says no desc_act: engines leave it out"


def other_groups(data: bytes, group: int) -> str:
    """What of the group of each input feature, int32, cannot be, in words; "" if all is well.

    Args:
        group: features of a group; -1 for all.
    """
    order = np.frombuffer(data, np.int32)
    size = group if group > 0 else len(order)
    plain = np.arange(len(order), dtype=np.int32) // np.int32(size)
    return "" if (np.sort(order) == plain).all() else f"other groups than those of {size} input features that config.json states"
