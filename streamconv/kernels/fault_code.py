"""What runs when a page of a mapped file is gone (SIGBUS). It is compiled: no interpreter may run in a signal handler.

Only calls that are safe there: mmap, sigaction, raise, and the handler that was installed before. Everything it needs lies in a
table of machine words of its own; `on_fault` with signal number 0 gives that table's address.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streamconv.checkpoint.fault_guard import MOST, Slot, Table

_MMAP, _SIGACTION, _THROW, _OLD, _DEFAULT, _ONCE, _PAGE, _SLOTS = (
    getattr(Table, name).offset for name in ("mmap", "sigaction", "throw", "old", "default", "once", "page", "slots")
)
_BEGIN, _END, _HIT, _SLOT = Slot.begin.offset, Slot.end.offset, Slot.hit.offset, ctypes.sizeof(Slot)  # type: ignore[attr-defined]
_ACCESS, _KIND = 0x1 | 0x2, 0x02 | 0x10 | 0x20
"""PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS of Linux, on every processor that the guard knows."""
_CODE, _ADDRESS = 8, 16
"""Where a siginfo_t holds what happened (32 bits) and the address; what a process sent has a code of 0 or below, and no address."""
_WORD = ir.IntType(64)
_intrinsic: Any = intrinsic


@_intrinsic
def _table(typing: Any) -> Any:
    """Address of the table, zeroed memory of this module."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, name = ir.ArrayType(_WORD, ctypes.sizeof(Table) // 8), "streamconv_fault_table"
        known = builder.module.globals.get(name)
        if known is None:
            known = ir.GlobalVariable(builder.module, kind, name)
            known.linkage, known.initializer = "internal", ir.Constant(kind, None)
        return builder.ptrtoint(known, _WORD)

    return types.uint64(), code


def _at(builder: Any, args: Any) -> Any:
    return builder.inttoptr(builder.add(args[0], args[1]), _WORD.as_pointer())


@_intrinsic
def _load(typing: Any, address: Any, offset: Any) -> Any:
    return types.uint64(types.uint64, types.uint64), lambda context, builder, signature, args: builder.load(_at(builder, args))


@_intrinsic
def _store(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _at(builder, args))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), code


@_intrinsic
def _call(typing: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    """Call a C function of up to six arguments: all are registers, which a function that takes fewer does not look at."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD] * 6)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.uint64(*[types.uint64] * 7), code


SIGNATURE = types.void(types.int32, types.uint64, types.uint64)


def on_fault(number: int, info: int, context: int) -> None:
    table = _table()
    if number == 0:
        _store(info, 0, table)
        return
    address, page = _load(info, _ADDRESS), _load(table, _PAGE)
    sent = not 0 < _load(info, _CODE) & types.uint64(0xFFFFFFFF) < 0x80000000
    for i in range(0 if sent else MOST):
        slot = table + types.uint64(_SLOTS + i * _SLOT)
        if _load(slot, _BEGIN) <= address < _load(slot, _END):
            start = address & ~(page - types.uint64(1))
            _store(slot, _HIT, start)  # first: whoever sees the zeros sees this
            if _call(_load(table, _MMAP), start, page, _ACCESS, _KIND, -1, 0) == start:
                return
    old = _load(table, _OLD)
    if old > types.uint64(1):
        if _load(table, _ONCE):
            _store(table, _OLD, types.uint64(0))
        _call(old, number, info, context, 0, 0, 0)
        return
    if sent and old == types.uint64(1):
        return
    _call(_load(table, _SIGACTION), number, _load(table, _DEFAULT), 0, 0, 0, 0)
    _call(_load(table, _THROW), number, 0, 0, 0, 0, 0)  # waits until we return
