"""Lost pages of mapped files are noticed, and do not end the process.

A page of a mapped file that someone cut off, or that its disk cannot read, gives SIGBUS when it is touched. While a guard is
installed, a compiled handler (kernels/fault_code.py) puts a page of zeros there and notes it; whoever read the mapping asks
`Slot.hit` before believing what was read. A SIGBUS of anything else goes to the handler that was there before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
import threading
from types import TracebackType

_ACTION = struct.Struct("@P128siP")
"""struct sigaction of the C libraries of Linux on the processors below: handler, mask, flags, restorer."""
_PROCESSORS = ("x86_64", "aarch64")
_SIGINFO, _ONSTACK = 0x4, 0x08000000
MOST = 2048
"""Mappings that are guarded at a time."""


class Slot(ctypes.Structure):
    """A guarded mapping.

    Attributes:
        begin, end: its addresses; `end` is 0 while the slot is free.
        hit: address of the last page that was missing, 0 if none was.
    """

    _fields_ = (("begin", ctypes.c_uint64), ("end", ctypes.c_uint64), ("hit", ctypes.c_uint64))
    begin: int
    end: int
    hit: int


class Table(ctypes.Structure):
    """All that the handler knows, in plain memory: a handler can wait for no lock.

    Attributes:
        mmap, sigaction, throw: addresses of the C library's mmap, sigaction and raise.
        old: the handler that was there before, or SIG_DFL (0) or SIG_IGN (1).
        default: address of a struct sigaction that means SIG_DFL.
        once: the old handler may come back to ours: after its first call the system is next.
        page: bytes of a page.
    """

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("mmap", "sigaction", "throw", "old", "default", "once", "page")),
        ("slots", Slot * MOST),
    )
    mmap: int
    sigaction: int
    throw: int
    old: int
    default: int
    once: int
    page: int
    slots: ctypes.Array[Slot]


_libc = ctypes.CDLL(None, use_errno=True)
_lock = threading.Lock()
_guards = 0
_linked = False
"""A handler that came later could not be asked to forget ours."""
_taken: set[int] = set()
_old = ctypes.create_string_buffer(_ACTION.size)
"""The action before ours."""
_default = ctypes.create_string_buffer(_ACTION.size)


def known_platform() -> bool:
    """The layout of what signal handling passes around is known here."""
    return sys.platform == "linux" and os.uname().machine in _PROCESSORS and struct.calcsize("P") == 8


class FaultGuard:
    """Installs the handler for as long as any guard is entered or anything guarded; guards of one process share it.

    Args:
        handler: address of the compiled handler.
        table: address of its table.
    """

    def __init__(self, handler: int, table: int) -> None:
        self._handler, self._table = handler, Table.from_address(table)

    def __enter__(self) -> FaultGuard:
        """Raises OSError where the system does not take the handler."""
        global _guards
        with _lock:
            if not _guards:
                self._install()
            _guards += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _guards
        with _lock:
            _guards -= 1
            self._leave()

    def take(self, begin: int, end: int) -> Slot | None:
        """Guard the addresses [begin, end); None if too much is guarded already."""
        with _lock:
            number = next((number for number in range(MOST) if number not in _taken), None)
            if number is None:
                return None
            _taken.add(number)
        slot: Slot = self._table.slots[number]
        slot.hit, slot.begin = 0, begin
        slot.end = end  # last: from here on it counts
        return slot

    def release(self, slot: Slot) -> None:
        """The mapping goes; from now on its addresses are not ours."""
        slot.end = 0
        with _lock:
            _taken.discard((ctypes.addressof(slot) - ctypes.addressof(self._table.slots)) // ctypes.sizeof(Slot))
            self._leave()

    def _leave(self) -> None:
        """Put the old handler back once nobody needs ours; where another came later, it goes on to ours, and ours to the old one."""
        global _linked
        if _guards or _taken:
            return
        if _current() == self._handler:
            _swap(_old, None)
        else:
            _linked = True

    def _install(self) -> None:
        if _current() == self._handler:
            return
        _swap(None, _old)
        table = self._table
        table.old, table.default, table.page = _ACTION.unpack(_old)[0] or 0, ctypes.addressof(_default), mmap.PAGESIZE
        table.once = int(_linked)
        for name, function in (("mmap", _libc.mmap), ("sigaction", _libc.sigaction), ("throw", _libc["raise"])):
            setattr(table, name, ctypes.cast(function, ctypes.c_void_p).value)
        ours = ctypes.create_string_buffer(_ACTION.pack(self._handler, b"", _SIGINFO | _ONSTACK, 0), _ACTION.size)
        _swap(ours, None)


def _current() -> int:
    """The handler of SIGBUS."""
    now = ctypes.create_string_buffer(_ACTION.size)
    _swap(None, now)
    return int(_ACTION.unpack(now)[0] or 0)


def _swap(new: ctypes.Array[ctypes.c_char] | None, old: ctypes.Array[ctypes.c_char] | None) -> None:
    """Set the action of SIGBUS, or tell it."""
    if _libc.sigaction(signal.SIGBUS, new, old):
        raise OSError(ctypes.get_errno(), "sigaction failed")
