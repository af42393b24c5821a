"""The compiled kernels as codecs call them; numba is loaded when one is first called.

A kernel takes source rows as a flat array with their start and stride, and the bytes of each part that it makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import F16, F32, DType
from streamconv.lazy import Array, np
from streamconv.quants.base import EncodeStats, ErrorKernel, Errors, Kernel, ReduceKernel
from streamconv.quants.layout import FAMILIES


def fused(function: str, stored: Sequence[str], *arguments: Any) -> Kernel:
    """A kernel of the compiled MODULE.FUNCTION(flat, start, stride, rows, cols, *parts, *arguments).

    It gives nothing, how many values were not finite, or these and how many overflowed.

    Args:
        stored: the numpy type of each part; one that an output lacks is empty.
        arguments: integers and arrays as they are, floats as float32, a float type as its number; None for what a reduction tells.
    """
    module, _, name = function.partition(".")

    @cache
    def loaded() -> tuple[Any, list[Any]]:
        from streamconv.kernels.rows import CODES

        if any(argument is None for argument in arguments):
            raise AssertionError("encoded before its reduction")
        with np.errstate(over="ignore"):  # a scale that is infinite is refused when it is written
            given = [CODES[a.name] if isinstance(a, DType) else np.float32(a) if isinstance(a, float) else a for a in arguments]
        return getattr(importlib.import_module(f"streamconv.kernels.{module}"), name), given

    def run(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> EncodeStats:
        compiled, given = loaded()
        parts = [out.view(kind) for out, kind in zip(outs, stored, strict=False)]
        parts += [np.empty(0, kind) for kind in stored[len(outs) :]]
        counts = compiled(flat, start, stride, rows, cols, *parts, *given)
        return EncodeStats(*map(int, counts)) if isinstance(counts, tuple) else EncodeStats(int(counts or 0))

    return run


def cast_kernel(source: DType, target: DType, via: DType | None = None) -> Kernel:
    """Casts `source` to `target`, by way of `via` (all of F32, F16, BF16)."""
    return fused("cast_code.cast_rows", [target.storage], source, target, via or 0)


_HALF_ULP = {"BF16": (2.0**-9, 2.0**-134), "F16": (2.0**-12, 2.0**-25), "F32": (2.0**-25, 2.0**-150)}
"""Half a unit in the last place of a model dtype: as a part of the value, and the least there is."""


@cache
def weight_only_errors(source: DType, dtype: DType, bits: int, family: str) -> ErrorKernel:
    """Holds what a weight-only kernel stores against its source."""

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


def input_channel_amax_kernel(source: DType) -> ReduceKernel:
    """The largest magnitude of each input channel, float16 [cols]."""

    def run(flat: Any, rows: int, cols: int) -> Array:
        from streamconv.kernels.rows import CODES, column_tops
        from streamconv.kernels.smooth_code import halves

        top, amax = np.empty(cols, flat.dtype), np.empty(cols, np.uint16)
        column_tops(flat, 0, cols, rows, top)
        halves(top, CODES[source.name], amax)
        return amax.view(np.float16)

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
