"""A pickle machine that can build nothing but numbers, texts, containers and records of tensors.

It knows the few opcodes and the few names that torch.save writes for weights; any other is an error that names it.
No import and no call ever follows from a pickle. It is not a subclass of pickle.Unpickler because the one in C takes
gigabytes for a five-byte LONG_BINPUT and overflows the stack on the hash of a deeply nested tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streamconv.checkpoint.limits import MAX_PICKLE_CALLS
from streamconv.checkpoint.torch_names import Name, Storage, allowed
from streamconv.errors import CheckpointError, printable

_MARK = object()


def read_pickle(data: bytes, shown: str, most_steps: int) -> Any:
    """What the pickle describes: dict, list, tuple, numbers, text, bytes, TensorView.

    Args:
        shown: file name for messages.
        most_steps: opcodes after which it is given up.

    Raises:
        CheckpointError: a name or opcode that weights do not need, or a broken pickle.
    """
    import pickletools  # slow to load, and no other format needs it

    machine, at = _Machine(shown), 0
    try:
        for steps, (opcode, argument, place) in enumerate(pickletools.genops(data)):
            at = place or 0
            if steps >= most_steps:
                raise CheckpointError(f"{shown}: data.pkl takes more than {most_steps} steps, streamconv's own limit")
            if opcode.name in _VALUES:
                machine.stack.append(argument)
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](machine, argument)
            elif opcode.name != "STOP":
                raise machine.refused(f"the pickle opcode {opcode.name}")
        (value,) = machine.stack
    except (IndexError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{shown}: data.pkl is broken at byte {at} ({type(error).__name__})", hint="is the download complete?"
        ) from None
    return value


class _Machine:
    """Stack and memo; one method for each group of opcodes."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.calls = 0

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.shown}: data.pkl uses {what}, which weights do not need; nothing was executed",
            hint="save the state dict alone, better still as .safetensors",
        )

    # ---- stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError
        return value

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        values = [self.pop() for _ in range(count)]
        return tuple(reversed(values))

    def remember(self, key: int) -> None:
        if self.stack[-1] is _MARK:
            raise ValueError
        self.memo[key] = self.stack[-1]

    def long(self, value: int) -> None:
        if value.bit_length() > 128:
            raise self.refused("a whole number of more than 128 bits")
        self.push(value)

    # ---- containers

    def dict_of(self, flat: list[Any]) -> None:
        self.push({})
        self.set_items(flat)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(flat) % 2:
            raise TypeError
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int, bool, float, type(None)):  # hashing a nested key could take for ever
                raise self.refused(f"a {type(key).__name__} as a key")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(values)

    # ---- names

    def name(self, module: Any, name: Any) -> None:
        if type(name) is not str or type(module) is not str:
            raise TypeError
        known = allowed(module, name)
        if known is None:
            raise self.refused(printable(f"{module}.{name}"))
        self.push(known)

    def instance(self, named: str) -> None:
        self.name(*named.split(" ", 1))
        raise self.refused("the pickle opcode INST")

    def reduce(self) -> None:
        arguments, target = self.pop(), self.pop()
        if type(arguments) is not tuple or not isinstance(target, Name):
            raise TypeError
        if target.build is None:
            raise self.refused(f"a call of {target.name}")
        self.calls += 1
        if self.calls > MAX_PICKLE_CALLS:
            raise CheckpointError(f"{self.shown}: data.pkl builds over {MAX_PICKLE_CALLS} objects, streamconv's own limit")
        self.push(target.build(arguments))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        # Only an OrderedDict of a module has state, its _metadata; it says nothing about weights.
        if type(state) is not dict or type(target) is not dict:
            raise self.refused("an object with a state")

    def persistent(self) -> None:
        kind, element, key, _, numel = self.pop()
        if kind != "storage" or type(key) is not str or type(numel) is not int or numel < 0:
            raise ValueError
        if not isinstance(element, Name) or not element.storage:
            raise TypeError
        self.push(Storage(element.dtype, key, numel))


def _protocol(machine: _Machine, version: int) -> None:
    if not 2 <= version <= 5:
        raise ValueError


_VALUES = {
    "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
"""Opcodes that push their argument."""

_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": _protocol,
    "FRAME": lambda m, size: None,
    "MARK": lambda m, _: m.push(_MARK),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.since_mark(),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "LONG1": _Machine.long,
    "LONG4": _Machine.long,
    "SHORT_BINSTRING": lambda m, text: m.push(text.encode("latin-1").decode()),
    "BINSTRING": lambda m, text: m.push(text.encode("latin-1").decode()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.push(m.last(1)),
    "TUPLE2": lambda m, _: m.push(m.last(2)),
    "TUPLE3": lambda m, _: m.push(m.last(3)),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "DICT": lambda m, _: m.dict_of(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items([*m.last(2)]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    "BINGET": lambda m, key: m.push(m.memo[key]),
    "LONG_BINGET": lambda m, key: m.push(m.memo[key]),
    "GLOBAL": lambda m, named: m.name(*named.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(*m.last(2)),
    "INST": _Machine.instance,
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persistent(),
}
