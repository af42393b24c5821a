"""Kernels: compiled by numba for the types of their arguments, kept on the disk, and called without numba from then on."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache, cached_property, update_wrapper
from typing import Any

import numpy as np
from llvmlite import binding

from streamconv.kernels.cache import Code, kept

Array = np.ndarray[Any, Any]
_WORD, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_C = {"int": _WORD, "bool": ctypes.c_bool, "float": ctypes.c_double} | {
    name: getattr(ctypes, f"c_{name}") for name in (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
}
_C |= {"float32": ctypes.c_float, "float64": ctypes.c_double}
_lock = threading.RLock()


@cache
def _engine() -> Any:
    """What puts machine code into memory; what kernels allocate with is there."""

    def compile_it() -> Code:
        from streamconv.kernels import compiler

        return compiler.compile_allocation()

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), binding.Target.from_default_triple().create_target_machine(jit=True))
    engine.add_object_file(binding.ObjectFileRef.from_data(kept("allocation", "", compile_it).machine))
    return engine


def address(name: str, types: str, compile_it: Callable[[], Code]) -> tuple[int, Code]:
    """Where a compiled function lies, and what it is; for good."""
    with _lock:
        code = kept(name, types, compile_it)
        _engine().add_object_file(binding.ObjectFileRef.from_data(code.machine))
        _engine().finalize_object()
        return _engine().get_function_address(code.symbol), code


class Compiled:
    """A kernel; it releases the interpreter lock.

    Takes arrays, numbers and numpy's numbers; gives a number, a tuple of them, or nothing.

    Attributes:
        calls: the versions that are in memory, by the types of their arguments.

    Raises:
        MemoryError: there is no room for an array that the kernel makes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self._function = function
        self.calls: dict[tuple[Any, ...], Callable[[tuple[Any, ...]], Any]] = {}

    @cached_property
    def _dispatcher(self) -> Any:
        from streamconv.kernels import compiler

        return compiler.dispatcher(self._function)

    @property
    def _numba_type_(self) -> Any:
        """How numba sees this name in another kernel."""
        return self._dispatcher._numba_type_

    def __call__(self, *arguments: Any) -> Any:
        kinds = tuple([_kind(value) for value in arguments])
        call = self.calls.get(kinds)
        if call is None:
            call = self.calls[kinds] = self._load(kinds, arguments)
        return call(arguments)

    def _load(self, kinds: tuple[Any, ...], arguments: tuple[Any, ...]) -> Callable[[tuple[Any, ...]], Any]:
        def compile_it() -> Code:
            from streamconv.kernels import compiler

            return compiler.compile_kernel(self._dispatcher, arguments)

        where, code = address(f"{self._function.__module__.rpartition('.')[2]}.{self._function.__name__}", repr(kinds), compile_it)
        return _call(where, code, kinds)


def jit(function: Callable[..., Any]) -> Any:
    """Compile on first use, once for each list of types of arguments."""
    return Compiled(function)


def _kind(value: Any) -> Any:
    """What the machine code for an argument depends on."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.ndim, value.flags.num & _LAYOUT
    return value.dtype.name if isinstance(value, np.generic) else type(value).__name__


_LAYOUT = 0x1 | 0x2 | 0x100 | 0x400
"""numpy's C_CONTIGUOUS, F_CONTIGUOUS, ALIGNED, WRITEABLE."""


def _call(where: int, code: Code, kinds: tuple[Any, ...]) -> Callable[[tuple[Any, ...]], Any]:
    """Calls a function as numba's own code would: status f(place of the result, place of an exception, arguments...).

    An array is six things: its owner, its object, elements, bytes of one, address, shape, strides.
    """
    named = [code.returns] if isinstance(code.returns, str) else code.returns or []
    names = [f"r{number}" for number in range(len(named))]
    result: Any = type("Result", (ctypes.Structure,), {"_fields_": list(zip(names, map(_C.__getitem__, named), strict=True))})
    flat: list[Any] = []
    for kind in kinds:
        flat += [_C[kind]] if isinstance(kind, str) else [_ADDRESS, _ADDRESS, _WORD, _WORD, _ADDRESS, *[_WORD] * (2 * kind[1])]
    function = ctypes.CFUNCTYPE(ctypes.c_int32, _ADDRESS, _ADDRESS, *flat)(where)

    def call(arguments: tuple[Any, ...]) -> Any:
        given: list[Any] = []
        for value in arguments:
            if isinstance(value, np.ndarray):
                given += (None, None, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides)
            else:
                given.append(value.item() if isinstance(value, np.generic) else value)
        returned, error = result(), _ADDRESS()
        if function(ctypes.addressof(returned), ctypes.addressof(error), *given):
            raise MemoryError("no room for what a kernel works on")
        values = [getattr(returned, name) for name in names]
        return None if not values else values[0] if isinstance(code.returns, str) else tuple(values)

    return call


@jit
def float_of(bits: np.uint32) -> Any:
    """The float32 that has these bits."""
    return np.uint32(bits).view(np.float32)


@jit
def bits_of(value: np.float32) -> Any:
    """The bits of a float32."""
    return np.float32(value).view(np.uint32)
