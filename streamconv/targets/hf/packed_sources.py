"""GPTQ and AutoAWQ weights, and the MXFP4 experts of gpt-oss, as a source stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import FLOATS, I8, DType
from streamconv.checkpoint.quantized import SourceQuantization
from streamconv.checkpoint.rows import PackedTensor, SourceTensor
from streamconv.errors import CheckpointError, printable
from streamconv.quants.decoded_rows import DecodedIntegers, TurnedMx

PACKED = ("qweight", "qzeros", "scales", "g_idx")
"""Last names of the tensors of a GPTQ or AutoAWQ weight."""


@dataclass(frozen=True, slots=True)
class Integers:
    """A GPTQ or AutoAWQ weight.

    Attributes:
        codes: signed int8 [N, K].
        scales: [K / group, N].
        zeros: int32 [K / group, N * bits / 32].
        order: g_idx, int32 [K], if it is stored.
        group: input features that share a scale.
        offset: what the stored zero points lack: 1 in GPTQ v1.
    """

    codes: PackedTensor
    scales: SourceTensor
    zeros: SourceTensor
    order: SourceTensor | None
    group: int
    offset: int

    def decoded(self, name: str, into: DType) -> DecodedIntegers:
        """The weight as floats."""
        return DecodedIntegers(name, into, self.codes.shape, self.codes, self.scales, self.zeros, self.order, self.offset)


def integers(tensors: Mapping[str, SourceTensor], module: str, stated: SourceQuantization | None) -> Integers:
    """The tensors of a module put together; the shapes tell GPTQ from AutoAWQ.

    Raises:
        CheckpointError: one is missing, or they do not fit together, or are of a form that is not read.
    """
    found = {leaf: tensors.get(f"{module}.{leaf}") for leaf in PACKED}
    weight, zeros, scales, order = found["qweight"], found["qzeros"], found["scales"], found["g_idx"]
    if weight is None or zeros is None or scales is None:
        missing = next(leaf for leaf in ("qweight", "qzeros", "scales") if found[leaf] is None)
        raise CheckpointError(f"missing tensor {printable(module)}.{missing}, which its quantized weight needs")
    shown, hint = printable(module), "convert the unquantized model"
    bits = stated.bits if stated is not None and stated.bits else 4
    if bits not in (4, 8):
        raise CheckpointError(f"{shown}: {bits}-bit weights are not read", hint=hint)
    groups, n = scales.rows, scales.cols
    packing = "gptq" if weight.cols == n else "awq"
    k = weight.rows * (32 // bits if packing == "gptq" else 1)
    fits = weight.dtype.name == zeros.dtype.name == "I32" and scales.dtype.name in FLOATS and len(weight.shape) == len(scales.shape) == 2
    fits = fits and groups > 0 and k % groups == 0 and zeros.shape == (groups, n * bits // 32) and n * bits % 32 == 0
    fits = fits and (packing == "gptq" or (bits == 4 and weight.cols * 8 == n))
    fits = fits and (order is None or (order.dtype.name == "I32" and order.shape == (k,)))
    if not fits:
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (weight, zeros, scales))
        raise CheckpointError(f"{shown}: qweight, qzeros and scales {shapes} do not fit together at {bits} bits", hint=hint)
    form = stated.format if stated is not None else None
    if form not in (None, *(("gptq", "gptq_v2") if packing == "gptq" else ("gemm",))):
        raise CheckpointError(f"{shown}: the {packing} format {printable(str(form))} is not read", hint=hint)
    codes = PackedTensor(f"{module}.qweight", I8, (n, k), weight.pieces, 0, bits, packing, module)
    offset = 1 if packing == "gptq" and form != "gptq_v2" else 0
    return Integers(codes, scales, zeros, order, k // groups, offset)


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
        told = f"U8 {list(blocks.shape[:3])}" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise CheckpointError(f"{printable(blocks.name)} {blocks.dtype} {list(blocks.shape)} does not fit to scales {told}")
    experts, n, count, _ = blocks.shape
    return TurnedMx(name, into, (experts, 32 * count, n), blocks, scales)
