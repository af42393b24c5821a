"""Codes and scales of the formats that Hugging Face directories hold, each in one pass over a row; numba is loaded at the first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.quants.base import Findings, Kernel


@cache
def fp8_block_kernel(
    source: DType, block: int, zero: float, floor: float, scale: DType, quotient: DType, multiply: bool
) -> Kernel:
    """`Fp8Block`; the arguments are its attributes."""

    def run(code: Any, codes: Any, flat: Any, at: tuple[int, int, int, int], outs: Sequence[Any]) -> int:
        kinds = (codes[source.name], codes[scale.name], codes[quotient.name])
        return int(code(flat, *at, outs[0], outs[1].view(scale.storage), *kinds, block, *_floats(zero, floor), multiply))

    return _launcher("fp8_block_rows", run)


@cache
def int_group_kernel(
    source: DType, bits: int, group: int, divisor: float, zero: float, floor: float, scale: DType, quotient: DType, packing: str
) -> Kernel:
    """`IntGroup`; the arguments are its attributes."""

    def run(code: Any, codes: Any, flat: Any, at: tuple[int, int, int, int], outs: Sequence[Any]) -> int:
        kinds = (codes[source.name], codes[scale.name], codes[quotient.name])
        numbers = _floats(divisor, zero, floor)
        form = ("bytes", "words", "pairs").index(packing)
        return int(code(flat, *at, outs[0], outs[1].view(scale.storage), *kinds, bits, group or at[3], *numbers, form))

    return _launcher("int_group_rows", run)


@cache
def mx_kernel(source: DType, element: str, exponent: str, read_as: DType) -> Kernel:
    """`Mx`; the arguments are its attributes."""

    def run(code: Any, codes: Any, flat: Any, at: tuple[int, int, int, int], outs: Sequence[Any]) -> int:
        kinds = (codes[source.name], codes[read_as.name])
        return int(code(flat, *at, outs[0], outs[1], *kinds, element == "fp4", exponent == "ceiling"))

    return _launcher("mx_rows", run)


def nvfp4_kernel(source: DType, rule: str, kind: DType, shared: float | None) -> Kernel:
    """`NvFp4`; the arguments are its attributes."""

    def run(code: Any, codes: Any, flat: Any, at: tuple[int, int, int, int], outs: Sequence[Any]) -> int:
        if shared is None:
            raise AssertionError("encoded before its reduction")
        kinds = (codes[source.name], codes[kind.name])
        return int(code(flat, *at, outs[0], outs[1], *kinds, *_floats(shared), rule == "divisor"))

    return _launcher("nvfp4_rows", run)


def _floats(*numbers: float) -> tuple[Any, ...]:
    import numpy as np

    return tuple(np.float32(number) for number in numbers)


def _launcher(name: str, run: Callable[..., int]) -> Kernel:
    def launch(flat: Any, start: int, stride: int, rows: int, cols: int, outs: Sequence[Any]) -> Findings:
        from streamconv.kernels import scaled_code, small_groups_code
        from streamconv.kernels.rows import CODES

        code = getattr(small_groups_code if name in ("mx_rows", "nvfp4_rows") else scaled_code, name)
        return Findings(run(code, CODES, flat, (start, stride, rows, cols), outs))

    return launch
