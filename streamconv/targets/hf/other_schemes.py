"""The tensors of a weight in the containers beside compressed-tensors: DeepSeek's FP8 tiles, ModelOpt's, GPTQ's and AutoAWQ's."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.checkpoint.dtypes import BF16, FLOATS
from streamconv.lazy import np
from streamconv.targets.hf.recipes import BLOCK, CodecOptions, Recipe
from streamconv.targets.hf.rules import partners
from streamconv.targets.hf.weights import Tensors, Told


@dataclass(frozen=True, slots=True)
class Tiles:
    """The container hf: tiles of rows x cols with a scale each, or one scale for all where rows is 0."""

    rows: int
    cols: int
    static: bool
    main: str = "weight"

    @property
    def title(self) -> str:
        return f"fp8 in tiles of {self.rows} x {self.cols}" if self.rows else "fp8 with one scale"

    @property
    def tiled(self) -> str:
        return "rows, cols" if self.rows > 1 else ""

    def wanted(self, module: str, tensors: Tensors) -> dict[str, list[Told]] | None:
        code = tensors.get(f"{module}.weight")
        if code is None or code[0] != "F8_E4M3" or len(code[1]) != 2:
            return None
        name = "weight_scale" if f"{module}.weight_scale_inv" not in tensors and f"{module}.weight_scale" in tensors else "weight_scale_inv"
        rows, cols = code[1]
        shapes = [(-(-rows // self.rows), -(-cols // self.cols))] if self.rows else [(), (1,), (1, 1)]
        kinds = (*FLOATS, "F8_E8M0", "U8") if self.rows else FLOATS
        found: dict[str, list[Told]] = {"weight": [code], name: [(kind, shape) for kind in kinds for shape in shapes]}
        if self.static:
            leaf = "activation_scale" if f"{module}.activation_scale" in tensors else "input_scale"
            found[leaf] = [(kind, shape) for kind in FLOATS for shape in ((), (1,))]
        return found


@dataclass(frozen=True, slots=True)
class Modelopt:
    """A `quant_algo`, as the row of the formats table says."""

    recipe: Recipe
    group: int

    @property
    def title(self) -> str:
        return f"ModelOpt's {self.recipe.algo}"

    @property
    def main(self) -> str:
        return next(iter(self.recipe.tensors.values()))

    @property
    def tiled(self) -> str:
        return "cols" if self.recipe.tiles else ""

    def wanted(self, module: str, tensors: Tensors) -> dict[str, list[Told]] | None:
        recipe, code = self.recipe, tensors.get(f"{module}.{self.main}")
        codec = recipe.codec(CodecOptions(BF16, self.group, "float32", ""))
        first = codec.parts(256, 256)[0]
        if code is None or len(code[1]) != 2 or code[0] != first.dtype.name:
            return None
        down, across = (256 / size for size in first.shape)
        rows, cols = int(code[1][0] * down), int(code[1][1] * across)
        if rows % recipe.whole or cols % (recipe.unit or self.group):
            return None
        found: dict[str, list[Told]] = {}
        for part in codec.parts(rows, cols):
            own = recipe.shapes.get(part.role)
            kinds = FLOATS if part.dtype.name in FLOATS else (part.dtype.name,)
            found[recipe.tensors[part.role]] = [(kind, own(rows, cols) if own else part.shape) for kind in kinds]
        scalar: list[Told] = [("F32", ())]
        if recipe.lone is not None and rows <= BLOCK and cols <= BLOCK:
            found["weight_scale"] += scalar
        if recipe.shared is not None:
            found[recipe.shared[0]] = scalar
        elif codec.needs:
            found["weight_scale"] = scalar
        if recipe.pre_scales and not partners(module):
            found[recipe.pre_scales] = [(kind, (cols,)) for kind in FLOATS]
        if recipe.input_scale is not None:
            found[recipe.input_scale[0]] = [(kind, ()) for kind in FLOATS]
        return found


@dataclass(frozen=True, slots=True)
class Words:
    """GPTQ or AutoAWQ.

    Attributes:
        group: input features that share a scale; -1 for all.
        ordered: act order: g_idx says which group a feature belongs to.
        middle: what every stored zero point must be; None if any.
    """

    method: str
    bits: int
    group: int
    ordered: bool
    middle: int | None
    main: str = "qweight"
    tiled: str = ""

    @property
    def title(self) -> str:
        return f"{self.method}, {self.bits} bits, groups of {self.group}"

    def wrong_order(self, data: bytes) -> str:
        """What of a g_idx cannot be, in words; "" if all is well."""
        order = np.frombuffer(data, np.int32)
        if self.ordered:
            return other_groups(data, self.group)
        plain = np.arange(len(order), dtype=np.int32) // np.int32(self.group if self.group > 0 else len(order))
        return "" if (order == plain).all() else "an order of its own, and config.json says no desc_act: engines leave it out"

    def wanted(self, module: str, tensors: Tensors) -> dict[str, list[Told]] | None:
        code = tensors.get(f"{module}.qweight")
        if code is None or code[0] != "I32" or len(code[1]) != 2:
            return None
        each = 32 // self.bits
        k, n = (code[1][0] * each, code[1][1]) if self.method == "gptq" else (code[1][0], code[1][1] * each)
        groups = -(-k // self.group) if self.group > 0 else 1
        found: dict[str, list[Told]] = {"qweight": [code], "qzeros": [("I32", (groups, n // each))]}
        found["scales"] = [(kind, (groups, n)) for kind in FLOATS]
        if f"{module}.g_idx" in tensors:
            found["g_idx"] = [("I32", (k,))]
        return found


def other_groups(data: bytes, group: int) -> str:
    """What of the group of each input feature, int32, cannot be, in words; "" if all is well.

    Args:
        group: features of a group; -1 for all.
    """
    order = np.frombuffer(data, np.int32)
    size = group if group > 0 else len(order)
    plain = np.arange(len(order), dtype=np.int32) // np.int32(size)
    return "" if (np.sort(order) == plain).all() else f"other groups than those of {size} input features that config.json states"
