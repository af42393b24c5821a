"""The handler of lost pages (`fault_code`), in memory."""

from __future__ import annotations

import ctypes
import threading
from functools import cache

from streamconv.kernels.cache import Code
from streamconv.kernels.jit import address

_lock = threading.Lock()


def handler() -> tuple[int, int]:
    """(address of the handler, address of its table), the same at each call; loaded, or compiled, at the first."""
    with _lock:
        return _loaded()


@cache
def _loaded() -> tuple[int, int]:
    def compile_it() -> Code:
        from streamconv.kernels import compiler, fault_code  # in this order: `compiler` imports numba as it should be

        return compiler.compile_callback(fault_code.SIGNATURE, fault_code.on_fault)

    where, _ = address("fault_code.on_fault", "", compile_it)
    first = ctypes.c_uint64()
    ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(where)(0, ctypes.addressof(first), None)
    return where, first.value
