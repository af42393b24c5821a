"""The compiled kernels as codecs call them; numba is loaded when one is first called.

A kernel takes source rows as a flat array with their start and stride, and the bytes of each part that it makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import F16, F32, DType
from streamconv.lazy import Array, np
from streamconv.quants.base import EncodeStats, ErrorKernel, Errors, Kernel, ReduceKernel
from streamconv.quants.layout import FAMILIES

_Arguments = Callable[[Mapping[str, int], Sequence[Any], int], tuple[Any, ...]]


def _launch(code: str, arguments: _Arguments, found: Callable[[Any], EncodeStats] = lambda bad: EncodeStats(int(bad or 0))) -> Kernel:
    """A kernel of the compiled function MODULE.FUNCTION.

    Args:
        arguments: (numbers of the float types, parts as bytes, columns) -> what follows the rows.
        found: of what the function gives: how many values were not finite, unless told otherwise.
    """
    module, _, function = code.partition(".")

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> EncodeStats:
        from streamconv.kernels.rows import CODES

        compiled = getattr(importlib.import_module(f"streamconv.kernels.{module}"), function)
        return found(compiled(flat, start, stride, rows, *arguments(CODES, outs, cols)))

    return run


def _overflow(lost: Any) -> EncodeStats:
    return EncodeStats(overflow=int(lost))


def _floats(*numbers: float) -> tuple[Any, ...]:
    return tuple(np.float32(number) for number in numbers)


def _known(reduced: float | None) -> float:
    if reduced is None:
        raise AssertionError("encoded before its reduction")
    return reduced


# ---- casts


@cache
def cast_kernel(source: DType, target: DType, via: DType | None = None) -> Kernel:
    """Casts `source` to `target`, by way of `via` (all of F32, F16, BF16)."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        return cols, outs[0].view(target.storage), codes[source.name], codes[target.name], 0 if via is None else codes[via.name]

    return _launch("cast_code.cast_rows", arguments, _overflow)


# ---- integers in a mixed-GEMM layout


@cache
def weight_only_kernel(source: DType, dtype: DType, bits: int, family: str) -> Kernel:
    """Cast to the model dtype, absmax, scale, round, reorder, bias, pack in one pass over each row."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        scales, kinds = outs[1].view(dtype.storage), (codes[source.name], codes[dtype.name])
        return cols, outs[0].view("u2"), scales, *kinds, FAMILIES.index(family)

    return _launch(f"weight_only_code.int{bits}_rows", arguments, lambda told: EncodeStats(int(told[0]), int(told[1])))


_HALF_ULP = {"BF16": (2.0**-9, 2.0**-134), "F16": (2.0**-12, 2.0**-25), "F32": (2.0**-25, 2.0**-150)}
"""Half a unit in the last place of a model dtype: as a part of the value, and the least there is."""


@cache
def weight_only_errors(source: DType, dtype: DType, bits: int, family: str) -> ErrorKernel:
    """Holds what `weight_only_kernel` stores against its source."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, parts: Sequence[Any]) -> Errors:
        from streamconv.checkpoint.stored_codes import as_float
        from streamconv.kernels.rows import CODES
        from streamconv.kernels.weight_only_error_code import integer_errors

        half, (relative, least) = 1 << (bits - 1), _HALF_ULP[dtype.name]
        # the casts of the weight, of the scale (which counts `half` times), and of this kernel's own arithmetic
        limits = np.array([half, 3 * relative + 2.0**-20, (2 * half + 1) * least], np.float32)
        sums, scales = np.zeros(4), as_float(parts[1], dtype.name)
        kinds = CODES[source.name], bits, FAMILIES.index(family)
        wrong = integer_errors(flat, start, stride, rows, cols, parts[0].view("u2"), scales, *kinds, limits, sums)
        noise, signal, largest, peak = map(float, sums)
        return Errors(noise, signal, largest, peak, int(wrong))

    return run


@cache
def packed_kernel(bits: int, family: str) -> Kernel:
    """Signed integers of a quantized source into a layout: reorder, bias, pack."""
    return _launch(f"packed_code.int{bits}_rows", lambda _, outs, cols: (cols, outs[0].view("u2"), FAMILIES.index(family)))


@cache
def paired_kernel() -> Kernel:
    """As `packed_kernel`, in ModelOpt's orientation: two channels in a byte."""
    return _launch("packed_code.paired_rows", lambda _, outs, cols: (cols, outs[0]))


@cache
def group_scales_kernel(source: DType, dtype: DType, bits: int, shuffled: bool, middle: int) -> Kernel:
    """Scales and zeros of packed sources for a model dtype of two bytes: unpack, cast, multiply in one pass over each group.

    Args:
        bits, shuffled, middle: as in `GroupScales`.
    """

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        scales, zeros = (out.view(dtype.storage) for out in outs)
        channels = 8 * cols // (bits + 8 * source.itemsize)
        return channels, scales, zeros, codes[source.name], codes[dtype.name], bits, shuffled, middle

    return _launch("group_scales_code.group_rows", arguments, _overflow)


# ---- FP8 and the formats of Hugging Face directories; the arguments are attributes of the codecs


@cache
def fp8_kernel(source: DType, model: DType, lo: float, hi: float, floor: float, zero: float, scale: DType, quotient: DType) -> Kernel:
    """`Fp8Rowwise`, rounded to `model` first."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        kinds = (codes[kind.name] for kind in (source, model, scale, quotient))
        return cols, outs[0], outs[1].view(scale.storage), *kinds, *_floats(lo, hi, floor, zero)

    return _launch("fp8_code.fp8_rows", arguments)


def fp8_tensor_kernel(source: DType, scale: float | None) -> Kernel:
    """`Fp8Tensor`, with the scale of the whole matrix."""
    return _launch("fp8_code.fp8_tensor_rows", lambda codes, outs, cols: (cols, outs[0], codes[source.name], *_floats(_known(scale))))


def weight_maximum(source: DType) -> ReduceKernel:
    """The largest finite magnitude, float32 []."""

    def run(flat: Any, rows: int, cols: int) -> Array:
        from streamconv.kernels.fp8_code import finite_maximum
        from streamconv.kernels.rows import CODES

        kind = CODES[source.name]
        top = np.array([finite_maximum(flat[: rows * cols], kind)], np.uint32)
        if kind == 1:
            return top.astype(np.uint16).view(np.float16).astype(np.float32).reshape(())
        return (top << np.uint32(16 if kind == 2 else 0)).view(np.float32).reshape(())

    return run


@cache
def fp8_block_kernel(source: DType, block: int, zero: float, floor: float, scale: DType, quotient: DType, multiply: bool) -> Kernel:
    """`Fp8Block`."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        kinds = (codes[kind.name] for kind in (source, scale, quotient))
        return cols, outs[0], outs[1].view(scale.storage), *kinds, block, *_floats(zero, floor), multiply

    return _launch("scaled_code.fp8_block_rows", arguments)


@cache
def int_group_kernel(
    source: DType, bits: int, group: int, divisor: float, zero: float, floor: float, scale: DType, quotient: DType, packing: str
) -> Kernel:
    """`IntGroup`."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        kinds = (codes[kind.name] for kind in (source, scale, quotient))
        form = ("bytes", "words", "pairs").index(packing)
        return cols, outs[0], outs[1].view(scale.storage), *kinds, bits, group or cols, *_floats(divisor, zero, floor), form

    return _launch("int_group_code.int_group_rows", arguments)


@cache
def awq_kernel(source: DType, group: int, scale: DType, divisor: float, least: float, symmetric: bool) -> Kernel:
    """`AwqWords`."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        kinds = (codes[source.name], codes[scale.name])
        return cols, *outs[:2], outs[2].view("u2"), *kinds, group, *_floats(divisor, least), symmetric

    return _launch("awq_words_code.awq_rows", arguments, lambda told: EncodeStats(int(told[0]), int(told[1])))


@cache
def awq_given_kernel() -> Kernel:
    """`AwqCodes`."""
    return _launch("awq_words_code.awq_given_rows", lambda codes, outs, cols: (cols, outs[0]))


@cache
def awq_scale_kernel(source: DType) -> Kernel:
    """`AwqScales`."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        return cols, outs[0].view("u2"), outs[1], codes[source.name]

    return _launch("awq_words_code.awq_scale_rows", arguments, _overflow)


@cache
def mx_kernel(source: DType, element: str, exponent: str, read_as: DType) -> Kernel:
    """`Mx`."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        return cols, *outs[:2], codes[source.name], codes[read_as.name], exponent == "ceiling"

    return _launch("fp4_code.mx_fp4_rows" if element == "fp4" else "small_groups_code.mx_fp8_rows", arguments)


def nvfp4_kernel(source: DType, rule: str, kind: DType, shared: float | None) -> Kernel:
    """`NvFp4`."""

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        return cols, *outs[:2], codes[source.name], codes[kind.name], *_floats(_known(shared)), rule == "divisor"

    return _launch("fp4_code.nvfp4_rows", arguments)


# ---- SmoothQuant


def smooth_kernel(
    source: DType,
    model: DType,
    mode: int,
    smoother: Array,
    largest: float | None,
    keep: tuple[int, int] | None,
    outputs: float,
    activation: float,
) -> Kernel:
    """One matrix: cast, smooth, largest, scale, round.

    Args:
        mode: 0 multiplies by the scale, 1 divides by its inverse and rounds to float16, 2 multiplies and rounds to `model`.
        smoother: float64 [cols].
        largest: AW, None for a scale of each row.
        outputs: sy, 0 for the inverse of the weight scale.
        activation: sx.
    """

    def arguments(codes: Mapping[str, int], outs: Sequence[Any], cols: int) -> tuple[Any, ...]:
        scales = outs[1].view(np.float32) if len(outs) > 1 else np.empty(0, np.float32)
        with np.errstate(over="ignore"):  # an infinite one is refused when it is written
            numbers = _floats(outputs, activation)
        top = _floats(-1 if largest is None else largest)
        return codes[source.name], codes[model.name], smoother, mode, *top, *(keep or (0, cols)), outs[0], scales, *numbers

    return _launch("smooth_code.smooth_rows", arguments)


def input_channel_amax_kernel(source: DType) -> ReduceKernel:
    """The largest magnitude of each input channel, float16 [cols]."""

    def run(flat: Any, rows: int, cols: int) -> Array:
        from streamconv.kernels.rows import CODES, column_tops
        from streamconv.kernels.smooth_code import halves

        top, made = np.empty(cols, flat.dtype), np.empty(cols, np.uint16)
        column_tops(flat, 0, cols, rows, top)
        halves(top, CODES[source.name], made)
        return made.view(np.float16)

    return run


def divided_kernel(source: DType, model: DType, smoother: Array) -> Kernel:
    """float16(w / s) of one-row norms, then the model dtype."""

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> EncodeStats:
        half = np.empty(rows * cols, np.uint16)
        cast_kernel(source, F16)(flat, start, stride, rows, cols, [half.view(np.uint8)])
        with np.errstate(over="ignore", invalid="ignore"):
            quotient = half.view(np.float16).reshape(rows, cols).astype(np.float64) / smoother
            bits = quotient.astype(np.float32).view(np.uint32).reshape(-1)
        between = np.empty(rows * cols, np.uint16)
        cast_kernel(F32, F16)(bits, 0, cols, rows, cols, [between.view(np.uint8)])
        cast_kernel(F16, model)(between, 0, cols, rows, cols, [outs[0]])
        sign, infinite = 1 << (8 * flat.itemsize - 1), {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[source.name]
        before = sum(int(((flat[at : at + cols] & (sign - 1)) == infinite).sum()) for at in range(start, start + rows * stride, stride))
        return EncodeStats(overflow=int(((between & 0x7FFF) == 0x7C00).sum()) - before)

    return run
