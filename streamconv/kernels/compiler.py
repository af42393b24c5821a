"""Numba, loaded only where a kernel is not on the disk yet: it takes half a second and 80 MiB."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir

from streamconv.kernels.cache import Code

_CONFIG = ".numba_config.yaml"


def _import_numba() -> None:
    """Numba takes settings from the current folder, at its import and later, and that may be a downloaded model."""
    here = os.open(os.curdir, os.O_RDONLY | os.O_DIRECTORY) if os.path.lexists(_CONFIG) else None
    try:
        if here is not None:
            os.chdir(os.sep)
        importlib.import_module("numba.core.config").__dict__["_config_fname"] = os.devnull
    finally:
        if here is not None:
            os.fchdir(here)
            os.close(here)


_import_numba()

import numba  # noqa: E402
from numba.core.ccallback import CFunc  # noqa: E402

_ALLOCATE, _FREE = "NRT_MemInfo_alloc_aligned", "NRT_MemInfo_call_dtor"
"""What numba's arrays ask for: memory behind a header, and that it is freed."""
_PLAIN, _RAW, _FREE_RAW = "NRT_MemInfo_alloc", "NRT_Allocate", "NRT_Free"
"""The same without an alignment; and memory without a header, for the shapes of a view."""
_ALIGNMENT = 32
_LDEXP = "numba_ldexp"
"""`math.ldexp`: of the C library."""
_njit: Any = numba.njit
_unliteral: Any = numba.types.unliteral
_HEADER = 64
"""At least numba's header: count of references, two words, the place of the memory, two words."""


def dispatcher(function: Callable[..., Any]) -> Any:
    """What numba compiles a function with; without the part that Python would call."""
    return _njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def compile_kernel(dispatcher: Any, arguments: tuple[Any, ...]) -> Code:
    """Compile for the types of these arguments."""
    types = tuple(map(numba.typeof, arguments))
    dispatcher.compile(types)
    compiled = dispatcher.overloads[types]._asdict()
    given: Any = _unliteral(compiled["fndesc"].restype)
    returns = [str(kind) for kind in given] if hasattr(given, "__iter__") else str(given)
    return _code(compiled["library"], compiled["fndesc"].llvm_func_name, None if returns == "none" else returns)


def compile_callback(signature: Any, function: Callable[..., Any]) -> Code:
    """Compile a C function that never enters the interpreter."""
    callback: Any = CFunc(function, (signature.args, signature.return_type), {}, {"error_model": "numpy"})
    callback.compile()
    return _code(callback._library, callback.native_name, None)


def _code(library: Any, symbol: str, returns: list[str] | str | None) -> Code:
    _, _, (machine, _) = library.serialize_using_object_code()
    asked = {function.name for function in library._final_module.functions if function.is_declaration}
    asked -= {_ALLOCATE, _FREE, _PLAIN, _RAW, _FREE_RAW, _LDEXP}
    here = ctypes.CDLL(None)
    return Code(symbol, returns, machine, all(name.startswith("llvm.") or hasattr(here, name) for name in asked))


def compile_allocation() -> Code:
    """`_ALLOCATE` and `_FREE` by the C library, in place of numba's own, which need numba."""
    byte, word, module = ir.IntType(8).as_pointer(), ir.IntType(64), ir.Module()
    malloc = ir.Function(module, ir.FunctionType(byte, [word]), "malloc")
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte]), "free")
    allocate = ir.Function(module, ir.FunctionType(byte, [word, ir.IntType(32)]), _ALLOCATE)
    build = ir.IRBuilder(allocate.append_basic_block())
    size, align = allocate.args[0], build.zext(allocate.args[1], word)
    header = build.call(malloc, [build.add(size, build.add(align, word(_HEADER)))])
    with build.if_then(build.icmp_unsigned("!=", header, byte(None))):
        after = build.add(build.ptrtoint(header, word), build.add(align, word(_HEADER)))
        words = build.bitcast(header, word.as_pointer())
        for place, value in enumerate((word(1), word(0), word(0), build.sub(after, build.urem(after, align)), size, word(0))):
            build.store(value, build.gep(words, [word(place)]))
    build.ret(header)
    for name, allocator, more in ((_PLAIN, allocate, [ir.IntType(32)(_ALIGNMENT)]), (_RAW, malloc, [])):
        function = ir.Function(module, ir.FunctionType(byte, [word]), name)
        build = ir.IRBuilder(function.append_basic_block())
        build.ret(build.call(allocator, [function.args[0], *more]))
    double, exponent = ir.DoubleType(), ir.IntType(32)
    ldexp, function = (ir.Function(module, ir.FunctionType(double, [double, exponent]), name) for name in ("ldexp", _LDEXP))
    build = ir.IRBuilder(function.append_basic_block())
    build.ret(build.call(ldexp, function.args))
    for name in (_FREE, _FREE_RAW):
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte]), name)
        build = ir.IRBuilder(function.append_basic_block())
        build.call(free, function.args)
        build.ret_void()
    machine = binding.Target.from_default_triple().create_target_machine(reloc="pic", jit=True)
    return Code(_ALLOCATE, None, machine.emit_object(binding.parse_assembly(str(module))))
