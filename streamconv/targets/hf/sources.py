"""The weights of a source, whatever they are stored as: plain tensors, or codes with scales that are decoded on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from streamconv.checkpoint.derived_rows import turned
from streamconv.checkpoint.dtypes import FLOATS, I8, DType
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.quantized import SourceQuantization, stated_in, stated_quantization
from streamconv.checkpoint.rows import PackedTensor, SourceTensor, content, gptq_or_awq
from streamconv.checkpoint.source_tensors import SourceTensors
from streamconv.checkpoint.stored_codes import Code
from streamconv.errors import CheckpointError, printable
from streamconv.lazy import Array, np
from streamconv.quants.decoded_rows import DecodedAffine, DecodedTensor, TurnedMx
from streamconv.quants.stacked_rows import Stacked
from streamconv.targets.hf.stated import stated_bits

_Read = SourceTensor | DecodedTensor | DecodedAffine | TurnedMx
Weight = _Read | Stacked

_BESIDE = frozenset(
    ("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_shape", "weight_zero", "weight_g_idx",
     "input_scale", "input_global_scale", "k_scale", "v_scale", "weight_zero_point", "output_scale", "pre_quant_scale"),
)  # fmt: skip
"""What stands beside codes and says nothing of a float weight."""
PACKED = ("qweight", "qzeros", "scales", "g_idx")
"""Last names of the tensors of a GPTQ or AutoAWQ weight."""
READ = frozenset(("weight_scale_2", "weight_global_scale", "weight_shape", "pre_quant_scale"))
"""Last names of what is read to tell what a weight is: numbers that differ from weight to weight."""
_OF_STACKED = ("_weight_scale", "_weight_scale_2", "_input_scale")
STACKED = ("gate_up_proj", "down_proj")
"""Last names of tensors that hold all experts of a layer."""
_CODES = ("F8_E4M3", "I8", "U8")


@dataclass(frozen=True, slots=True)
class Reader:
    """How the tensors of a source become weights.

    Attributes:
        into: float type of what is decoded.
        facts: what config.json states of the quantization.
        block: rows and columns of a tile.
        sound: as of what is decoded.
    """

    index: Index
    into: DType
    tensors: SourceTensors
    facts: Mapping[str, Any]
    told: SourceQuantization | None
    block: tuple[int, int]
    sound: bool

    def weight(self, name: str) -> tuple[str, Weight] | None:
        """The weight that a tensor holds, codes as floats, and its name; None for what stands beside codes.

        Raises:
            CheckpointError: codes without scales, or in a form that is not read.
        """
        result = self._weight(name)
        if result is None or isinstance(result[1], SourceTensor) or not self.sound:
            return result
        return result[0], replace(result[1], sound=True)

    def _weight(self, name: str) -> tuple[str, _Read] | None:
        tensors = self.tensors
        module, _, leaf = name.rpartition(".")
        if leaf in PACKED and leaf != "qweight" and f"{module}.qweight" in tensors:
            return None
        if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in tensors:
            return None
        if leaf in _BESIDE and _has_codes(tensors, module):
            return None
        whole = next((name.removesuffix(ending) for ending in _OF_STACKED if name.endswith(ending)), "")
        if whole in tensors and tensors[whole].dtype.name in _CODES:
            return None
        tensor = tensors[name]
        if leaf in STACKED and len(tensor.shape) == 3 and tensor.dtype.name in _CODES:
            return name, _stacked_codes(tensor, tensors.get(f"{name}_weight_scale"), self.into)
        zeros = tensors.get(f"{name}_zero") if isinstance(tensor, PackedTensor) else None
        if zeros is not None and isinstance(tensor, PackedTensor):
            return name, DecodedAffine(name, self.into, tensor.shape, tensor, tensors[f"{name}_scale"], zeros)
        if leaf in ("weight", "weight_packed") and tensor.dtype.name in ("F8_E4M3", "I8", "U8", "I32"):
            return f"{module}.weight", self._decoded(module, tensor)
        if leaf == "qweight":
            weight = integers(tensors, module, self.told, self.into)
            if weight.order is None and self.told is not None and self.told.act_order:
                raise CheckpointError(f"missing tensor {printable(module)}.g_idx, which act order (desc_act) needs")
            return f"{module}.weight", weight
        if leaf.endswith("_blocks") and tensor.dtype.name == "U8":
            shown = name.removesuffix("_blocks")
            return shown, mx_experts(tensor, tensors.get(f"{shown}_scales"), shown, self.into)
        return name, tensor

    def _decoded(self, module: str, codes: SourceTensor) -> DecodedTensor:
        """A weight of codes [N, K] with scales beside them."""
        tensors = self.tensors
        scale = tensors.get(f"{module}.weight_scale_inv") or tensors.get(f"{module}.weight_scale")
        if scale is None:
            raise CheckpointError(
                f"{printable(codes.name)} holds {codes.dtype} codes, and this checkpoint has no scales for them",
                hint="convert the unquantized model, or a checkpoint that is complete",
            )
        code, shape = self._code(module, codes, scale)
        rows, cols = shape[-2], shape[-1]
        factor = tensors.get(f"{module}.weight_scale_2") or tensors.get(f"{module}.weight_global_scale")
        whole = (1.0, False) if factor is None else (self._number(factor), factor.name.endswith("_global_scale"))
        grid = _grid(scale.shape, rows, cols, self.block)
        if grid is None:
            message = f"{printable(scale.name)} has shape {list(scale.shape)}, which is no grid of scales for a weight [{rows}, {cols}]"
            raise CheckpointError(message)
        if code == "int8" and codes.dtype.name == "U8":
            codes = PackedTensor(codes.name, I8, (rows, cols), codes.pieces, 0, 4, "modelopt", module)
        zeros, inputs, order = (tensors.get(f"{module}.{leaf}") for leaf in ("weight_zero_point", "pre_quant_scale", "weight_g_idx"))
        words = (-(-rows * (4 if code == "uint4" else 8) // 32), grid.shape[1])
        if zeros is not None and (code not in ("uint4", "uint8") or zeros.dtype.name != "I32" or zeros.shape != words or grid.per_row != 1):
            message = f"{printable(zeros.name)} is {zeros.dtype} {list(zeros.shape)}: zero points of this form are not decoded here"
            raise CheckpointError(message, hint="convert the unquantized model")
        if inputs is not None and (inputs.shape != (cols,) or inputs.dtype.name not in FLOATS):
            message = f"{printable(inputs.name)} is {inputs.dtype} {list(inputs.shape)}, not a number for each of {cols} inputs"
            raise CheckpointError(message)
        if order is not None and (order.shape != (cols,) or order.dtype.name != "I32" or grid.per_row != 1):
            raise CheckpointError(f"{printable(order.name)} is {order.dtype} {list(order.shape)}: no group for each of {cols} inputs")
        scales = _as_matrix(scale, grid.shape)
        return DecodedTensor(f"{module}.weight", self.into, shape, codes, code, scales, *grid[:2], *whole, zeros, inputs, order)

    def _code(self, module: str, codes: SourceTensor, scale: SourceTensor) -> tuple[Code, tuple[int, ...]]:
        """How codes are read, and the shape of the weight."""
        if codes.dtype.name != "I32":
            if codes.dtype.name != "U8":
                return "e4m3" if codes.dtype.name == "F8_E4M3" else "int8", codes.shape
            if scale.dtype.name == "F32" and len(codes.shape) == 2:
                return "int8", (2 * codes.shape[0], codes.shape[1])
            return "e2m1", (*codes.shape[:-1], 2 * codes.shape[-1])
        if not codes.name.endswith("_packed") or len(codes.shape) != 2:
            raise CheckpointError(f"{printable(codes.name)}: int32 weights of this form are not read")
        bits = stated_bits(self.facts) or 4
        shape = self.tensors.get(f"{module}.weight_shape")
        cols = self._values(shape, "I64", 2, "two int64 numbers")[1] if shape is not None else codes.shape[1] * 32 // bits
        if bits not in (4, 8) or cols * bits != codes.shape[1] * 32:
            raise CheckpointError(f"{printable(codes.name)}: {bits} bits and {cols} columns do not fill its {codes.shape[1]} words")
        return ("uint4" if bits == 4 else "uint8"), (codes.shape[0], int(cols))

    def _number(self, tensor: SourceTensor) -> float:
        """The scale of a whole weight."""
        value = float(self._values(tensor, "F32", 1, "one float32 number")[0])
        if not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{printable(tensor.name)} is {value}, which is no scale")
        return value

    def _values(self, tensor: SourceTensor, dtype: str, count: int, reason: str) -> Array:
        if tensor.dtype.name != dtype or math.prod(tensor.shape) != count:
            raise CheckpointError(f"{printable(tensor.name)} must be {reason}, and is {tensor.dtype} {list(tensor.shape)}")
        return np.frombuffer(content(tensor, self.index.shards), {"F32": "<f4", "I64": "<i8"}[dtype])


def reader(index: Index, into: DType, sound: bool) -> Reader:
    """For weights of this source, decoded to floats of type `into`."""
    config = stated_in(index.config)
    facts: Mapping[str, Any] = config if isinstance(config, dict) else {}
    return Reader(index, into, SourceTensors(index), facts, stated_quantization(index.config, index.root), _block(facts), sound)


def _has_codes(tensors: SourceTensors, module: str) -> bool:
    place = tensors.place(f"{module}.weight")
    if place is not None:
        return tensors.rows_of(place).dtype in ("F8_E4M3", "I8", "U8") or f"{module}.weight_packed" in tensors
    if f"{module}.weight_packed" in tensors:
        return True
    return any(f"{module}.{part}.weight" in tensors or f"{module}.{part}.weight_packed" in tensors for part in ("k_proj", "v_proj"))


def _stacked_codes(codes: SourceTensor, scale: SourceTensor | None, into: DType) -> DecodedTensor:
    """Experts [E, ...] as ModelOpt stores those of Llama 4: FP8 with one scale, or one for each expert."""
    count, rows, cols = codes.shape
    if codes.dtype.name != "F8_E4M3" or scale is None or math.prod(scale.shape) not in (1, count):
        beside = "no scales" if scale is None else f"scales {scale.dtype} {list(scale.shape)}"
        message = f"{printable(codes.name)} holds {codes.dtype} codes of all experts with {beside}, which are not decoded here"
        raise CheckpointError(message, hint="convert the unquantized model")
    scales = math.prod(scale.shape)
    per_row = count * rows // scales
    return DecodedTensor(codes.name, into, codes.shape, codes, "e4m3", _as_matrix(scale, (scales, 1)), per_row, cols)


class _Grid(NamedTuple):
    """How scales lie over a weight: as a matrix of this shape, each for `per_row` x `per_col` values."""

    per_row: int
    per_col: int
    shape: tuple[int, int]


@cache
def _grid(shape: tuple[int, ...], rows: int, cols: int, block: tuple[int, int]) -> _Grid | None:
    """The grid that scales of this shape are for a weight [rows, cols], None if they are none."""
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        shape = (shape[0], shape[2])
    if math.prod(shape) == 1:
        return _Grid(rows, cols, (1, 1))
    if shape in ((rows,), (rows, 1)):
        return _Grid(1, cols, (rows, 1))
    if len(shape) != 2:
        return None
    if shape[0] == rows and shape[1] and cols % shape[1] == 0:
        return _Grid(1, cols // shape[1], (rows, shape[1]))
    tiles = (-(-rows // block[0]), -(-cols // block[1]))
    return _Grid(*block, tiles) if shape == tiles else None


def _block(facts: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block = facts.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block):
        return block[0], block[1]
    return 128, 128


def _as_matrix(scale: SourceTensor, shape: tuple[int, int]) -> SourceTensor:
    if scale.shape == shape:
        return scale
    piece = scale.pieces[0]._replace(rows=shape[0], cols=shape[1])
    return replace(scale, shape=shape, pieces=(piece,))


def integers(tensors: Mapping[str, SourceTensor], module: str, quantization: SourceQuantization | None, into: DType) -> DecodedTensor:
    """The weight of a module; the shapes tell GPTQ from AutoAWQ.

    Raises:
        CheckpointError: one is missing, or they do not fit together, or are of a form that is not read.
    """
    packed = {leaf: tensors.get(f"{module}.{leaf}") for leaf in PACKED}
    weight, zeros, scales, order = packed["qweight"], packed["qzeros"], packed["scales"], packed["g_idx"]
    if weight is None or zeros is None or scales is None:
        missing = next(leaf for leaf in ("qweight", "qzeros", "scales") if packed[leaf] is None)
        raise CheckpointError(f"missing tensor {printable(module)}.{missing}, which its quantized weight needs")
    shown, hint = printable(module), "convert the unquantized model"
    bits = quantization.bits if quantization is not None and quantization.bits else 4
    if bits not in (4, 8):
        raise CheckpointError(f"{shown}: {bits}-bit weights are not read", hint=hint)
    groups, n = scales.rows, scales.cols
    packing, k, fits = gptq_or_awq(weight, zeros, scales, bits)
    fits = fits and weight.dtype.name == zeros.dtype.name == "I32" and scales.dtype.name in FLOATS
    fits = fits and len(weight.shape) == len(scales.shape) == 2 and n * bits % 32 == 0
    fits = fits and (order is None or (order.dtype.name == "I32" and order.shape == (k,)))
    if not fits:
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (weight, zeros, scales))
        raise CheckpointError(f"{shown}: qweight, qzeros and scales {shapes} do not fit together at {bits} bits", hint=hint)
    form = quantization.format if quantization is not None else None
    if form not in (None, *(("gptq", "gptq_v2") if packing == "gptq" else ("gemm",))):
        raise CheckpointError(f"{shown}: the {packing} format {printable(form)} is not read", hint=hint)
    codes = PackedTensor(f"{module}.qweight", I8, (n, k), weight.pieces, 0, bits, packing, module)
    return DecodedTensor(
        f"{module}.weight", into, (n, k), codes, "int8", turned(scales), 1, k // groups, zeros=turned(zeros), order=order,
        shuffled=packing == "awq", lacking=1 if packing == "gptq" and form != "gptq_v2" else 0,
    )  # fmt: skip


def mx_experts(blocks: SourceTensor, scales: SourceTensor | None, name: str, into: DType) -> TurnedMx:
    """Experts [E, N, K] of gpt-oss, decoded to [E, K, N]: what transformers holds, and writes.

    Args:
        name: of the decoded parameter.

    Raises:
        CheckpointError: no scales for them, or of another shape.
    """
    if (
        scales is None
        or not (blocks.dtype.name == scales.dtype.name == "U8")
        or len(blocks.shape) != 4
        or blocks.shape[3] != 16
        or scales.shape != blocks.shape[:3]
    ):
        shown = f"U8 {list(blocks.shape[:3])}" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise CheckpointError(f"{printable(blocks.name)} {blocks.dtype} {list(blocks.shape)} does not fit to scales {shown}")
    experts, n, count, _ = blocks.shape
    return TurnedMx(name, into, (experts, 32 * count, n), blocks, scales)
