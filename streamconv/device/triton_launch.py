"""Which codecs have a fused device kernel, and how it is launched."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from streamconv.cache_folder import cache_folder
from streamconv.checkpoint.dtypes import F16, DType
from streamconv.lazy import torch
from streamconv.quants.base import Codec
from streamconv.quants.fp8_rowwise import FLOOR, Fp8Rowwise
from streamconv.quants.plain import Plain
from streamconv.quants.smoothquant import SmoothWeight
from streamconv.quants.weight_only import WeightOnly

Launch = Callable[["torch.Tensor", Sequence["torch.Tensor"], "torch.Tensor"], None]
"""launch(block, outs, counts): encode the rows of `block` [r, cols], whose columns lie side by side, into the 1-D uint8 tensors
`outs`, one for each part, on the current stream; add the nonfinite and overflown elements to `counts`, int32 [2]. Nothing is waited for.
"""

Kernel = Callable[[Any], Launch]
_FLOATS = frozenset({"F32", "F16", "BF16"})
_CAST_BLOCK, _ROW_BLOCK = 4096, 1024
_lock = threading.Lock()
"""Triton compiles a kernel at its first launch; two threads must not do that at once."""


class Unfused(Exception):
    """A fused kernel could not be compiled or launched. The torch definition can do the same."""


def has_kernel(codec: Codec, source: DType) -> bool:
    """Arithmetic only; a kernel may still turn out not to work on a device."""
    if isinstance(codec, Fp8Rowwise) and codec != Fp8Rowwise(codec.lo, codec.hi, codec.model):
        return False  # other rules for scales
    return type(codec) in _KERNELS and source.name in _FLOATS and _stored(codec) <= _FLOATS


def kernel_of(codec: Codec, source: DType) -> Launch | None:
    """What encodes rows of this dtype on a CUDA device, or None where the torch definition must."""
    return _KERNELS[type(codec)](codec) if has_kernel(codec, source) else None


def works(device: torch.device) -> str | None:
    """Why there are no fused kernels on a device, None if there are: tries one."""
    if "TRITON_CACHE_DIR" not in os.environ and (folder := cache_folder("triton")) is not None:
        os.environ["TRITON_CACHE_DIR"] = str(folder)  # Triton's own is as open as the umask
    try:
        block = torch.tensor([[1.5, -2.25]], dtype=torch.bfloat16, device=device)
        out = torch.empty(4, dtype=torch.uint8, device=device)
        _cast(Plain(F16))(block, [out], torch.zeros(2, dtype=torch.int32, device=device))
        good = out.view(torch.float16).tolist() == [1.5, -2.25]
    except Exception as error:  # no triton, no compiler, a device it does not know
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return None if good else "Triton gives wrong results"


def _stored(codec: Codec) -> set[str]:
    dtype = getattr(codec, "dtype", None)
    return {dtype.name} if isinstance(dtype, DType) else set()


def _cast(codec: Any) -> Launch:
    def launch(block: torch.Tensor, outs: Sequence[torch.Tensor], counts: torch.Tensor) -> None:
        target = _torch(codec.dtype)
        summed = torch.float32 if codec.add_one and block.dtype == torch.bfloat16 else block.dtype
        total, cols = block.numel(), block.shape[1]
        _run("cast", -(-total // _CAST_BLOCK), block, outs[0].view(target), counts, total, cols, block.stride(0),
             MODEL=codec.dtype.name, ADD_ONE=codec.add_one, VIA_HALF=codec.via_half,
             COUNT=target != summed or codec.via_half, BLOCK=_CAST_BLOCK)  # fmt: skip

    return launch


def _weight_only(codec: Any) -> Launch:
    layout = codec.layout
    table = layout.table

    def launch(block: torch.Tensor, outs: Sequence[torch.Tensor], counts: torch.Tensor) -> None:
        rows, cols = block.shape
        order = _kept(table, block.device, lambda torch: torch.tensor(table, dtype=torch.int32))
        _run("weight_only", rows, block, outs[0], outs[1].view(_torch(codec.dtype)), counts, order, cols, block.stride(0),
             MODEL=codec.dtype.name, BITS=codec.bits, BIASED=layout.biased, PERIOD=len(table), SHARED=layout.interleave,
             RUN=layout.tile * codec.bits // 8, BLOCK=_ROW_BLOCK)  # fmt: skip

    return launch


def _fp8_rowwise(codec: Any) -> Launch:
    def launch(block: torch.Tensor, outs: Sequence[torch.Tensor], counts: torch.Tensor) -> None:
        rows, cols = block.shape
        _run("fp8_rowwise", rows, block, outs[0], outs[1].view(torch.float32), counts, cols, block.stride(0),
             float(codec.lo), float(codec.hi), FLOOR,
             MODEL=codec.model.name if codec.model else "", BLOCK=_ROW_BLOCK)  # fmt: skip

    return launch


def _smooth(codec: Any) -> Launch:
    from streamconv.quants.smoothing import output_scale, weight_scale

    bound = codec.bound

    def launch(block: torch.Tensor, outs: Sequence[torch.Tensor], counts: torch.Tensor) -> None:
        rows, cols = block.shape
        first, last = codec.keep or (0, cols)
        factors = _kept(bound.smoother, block.device, lambda torch: torch.as_tensor(bound.smoother, dtype=torch.float64))
        vector = len(outs) > 1
        scales = outs[1].view(torch.float32) if vector else counts.view(torch.float32)  # not touched
        scale = 0.0 if bound.largest is None else float(weight_scale(torch.as_tensor(bound.largest, dtype=torch.float16).reshape(1)))
        output = 0.0 if codec.outputs is None else float(output_scale(codec.outputs))
        _run("smooth", rows, block, factors, outs[0].view(torch.int8), scales, counts, cols, block.stride(0), first, last - first,
             scale, float(bound.activation), output,
             MODEL=codec.dtype.name, GIVEN=bound.largest is not None, DIVIDE=bound.largest is not None and codec.divide,
             SINGLE=bound.largest is not None and codec.single, VECTOR=vector,
             TOKEN=codec.outputs is None, BLOCK=_ROW_BLOCK)  # fmt: skip

    return launch


_KERNELS: dict[type, Kernel] = {Plain: _cast, WeightOnly: _weight_only, Fp8Rowwise: _fp8_rowwise, SmoothWeight: _smooth}


def _run(name: str, programs: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel where its first tensor lies. Raises Unfused; what the device itself says (no memory, lost) as it is."""
    with _lock, _current(args[0].device):
        try:
            from streamconv.device import triton_kernels as kernels

            getattr(kernels, name)[(programs,)](*map(_plain, args), **constants, num_warps=4, enable_fp_fusion=False)
        except Exception as error:
            if "CUDA error" in str(error) or "out of memory" in str(error).lower():
                raise
            raise Unfused(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}") from error


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the thread's current device and stream, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _plain(value: Any) -> Any:
    """bfloat16 as int16."""
    return value.view(torch.int16) if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def _torch(dtype: DType) -> Any:
    return getattr(torch, dtype.torch)


def abandon() -> None:
    """A device is gone: torch would ask it before it frees what is kept here, and end the process."""
    with _lock:
        for _, kept in _copies.values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        _copies.clear()


_copies: dict[tuple[Any, Any], tuple[Any, torch.Tensor]] = {}
_MOST = 64


def _kept(owner: Any, device: torch.device, make: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """make(torch) on the device, copied there once for as long as `owner` lives (tuples: for ever)."""
    constant = isinstance(owner, tuple)
    key = (owner if constant else id(owner), device)
    with _lock:
        copy = _copies.get(key)
        if copy is None or (not constant and copy[0]() is not owner):
            if len(_copies) >= _MOST:
                for old in [other for other, entry in _copies.items() if entry[0]() is None]:
                    del _copies[old]
            tensor = make(torch).to(device)  # from pageable memory: there when this returns
            copy = _copies[key] = ((lambda: owner) if constant else weakref.ref(owner), tensor)
    if device.type == "cuda":
        copy[1].record_stream(torch.cuda.current_stream(device))
    return copy[1]
