"""A pickle machine that can build nothing but numbers, texts, containers and records of tensors.

It knows the few opcodes and the few names that torch.save writes for weights; any other is an error that names it.
No import and no call ever follows from a pickle. It is not a subclass of pickle.Unpickler because the one in C takes
gigabytes for a five-byte LONG_BINPUT and overflows the stack on the hash of a deeply nested tuple.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from streamconv.checkpoint.limits import MAX_PICKLE_CALLS
from streamconv.checkpoint.torch_names import Name, Storage, allowed
from streamconv.errors import CheckpointError, printable


class _Mark:
    pass


_MARK = _Mark()

def read_pickle(data: bytes, shown: str, most_steps: int) -> Any:
    """What the pickle describes: dict, list, tuple, numbers, text, bytes, TensorView.

    Args:
        shown: file name for messages.
        most_steps: opcodes after which it is given up.

    Raises:
        CheckpointError: a name or opcode that weights do not need, or a broken pickle.
    """
    machine = _Machine(data, shown)
    try:
        return machine.run(most_steps)
    except (IndexError, struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{shown}: data.pkl is broken at byte {machine.at} ({type(error).__name__})", hint="is the download complete?"
        ) from None


class _Machine:
    """Stack, memo and position; one method for each group of opcodes."""

    def __init__(self, data: bytes, shown: str) -> None:
        self.data, self.shown, self.at = data, shown, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.calls = 0

    def run(self, most_steps: int) -> Any:
        table = _OPCODES
        for _ in range(most_steps):
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1:
                    raise ValueError
                return self.stack[0]
            step = table.get(code)
            if step is None:
                raise self.refused(f"the pickle opcode {_opcode_name(code)}")
            step(self)
        raise CheckpointError(f"{self.shown}: data.pkl takes more than {most_steps} steps, streamconv's own limit")

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.shown}: data.pkl uses {what}, which weights do not need; nothing was executed",
            hint="save the state dict alone, better still as .safetensors",
        )

    # ---- bytes

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise IndexError
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + 4096)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

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

    def remember(self, key: int) -> None:
        if self.stack[-1] is _MARK:
            raise ValueError
        self.memo[key] = self.stack[-1]

    # ---- containers

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

    def name(self, module: str, name: str) -> None:
        self.push(allowed(module, name) or self.fail_global(module, name))

    def fail_global(self, module: str, name: str) -> Name:
        raise self.refused(printable(f"{module}.{name}"))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        self.name(module, name)

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


def _tuple(machine: _Machine, size: int) -> None:
    values = [machine.pop() for _ in range(size)]
    machine.push(tuple(reversed(values)))


def _text(machine: _Machine, code: str) -> None:
    machine.push(machine.take(machine.number(code)).decode(errors="surrogatepass"))


def _bytes(machine: _Machine, code: str) -> None:
    machine.push(machine.take(machine.number(code)))


def _old_text(machine: _Machine, code: str) -> None:
    size = machine.number(code)
    if size < 0:
        raise ValueError
    machine.push(machine.take(size).decode())


def _long(machine: _Machine, code: str) -> None:
    size = machine.number(code)
    if not 0 <= size <= 16:
        raise machine.refused("a whole number of more than 128 bits")
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


def _protocol(machine: _Machine) -> None:
    if not 2 <= machine.number("B") <= 5:
        raise ValueError


def _dict(machine: _Machine) -> None:
    flat = machine.since_mark()
    machine.push({})
    machine.set_items(flat)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _instance(machine: _Machine) -> None:
    machine.name(machine.line(), machine.line())
    raise machine.refused("the pickle opcode INST")


def _opcode_name(code: int) -> str:
    import pickletools  # only for a message

    return next((op.name for op in pickletools.opcodes if ord(op.code) == code), f"0x{code:02x}")


_OPCODES: dict[int, Callable[[_Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": _protocol,
        "\x95": lambda m: m.number("Q") and None,  # FRAME
        "(": lambda m: m.push(_MARK),
        "0": lambda m: m.stack.pop() and None,
        "1": lambda m: m.since_mark() and None,
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "J": lambda m: m.push(m.number("i")),
        "K": lambda m: m.push(m.number("B")),
        "M": lambda m: m.push(m.number("H")),
        "\x8a": lambda m: _long(m, "B"),
        "\x8b": lambda m: _long(m, "i"),
        "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        "X": lambda m: _text(m, "I"),
        "\x8c": lambda m: _text(m, "B"),
        "\x8d": lambda m: _text(m, "Q"),
        "U": lambda m: _old_text(m, "B"),
        "T": lambda m: _old_text(m, "i"),
        "B": lambda m: _bytes(m, "I"),
        "C": lambda m: _bytes(m, "B"),
        "\x8e": lambda m: _bytes(m, "Q"),
        ")": lambda m: m.push(()),
        "\x85": lambda m: m.push((m.pop(),)),
        "\x86": lambda m: _tuple(m, 2),
        "\x87": lambda m: _tuple(m, 3),
        "t": lambda m: m.push(tuple(m.since_mark())),
        "]": lambda m: m.push([]),
        "l": lambda m: m.push(m.since_mark()),
        "a": lambda m: m.append([m.pop()]),
        "e": lambda m: m.append(m.since_mark()),
        "}": lambda m: m.push({}),
        "d": _dict,
        "s": _set_item,
        "u": lambda m: m.set_items(m.since_mark()),
        "q": lambda m: m.remember(m.number("B")),
        "r": lambda m: m.remember(m.number("I")),
        "\x94": lambda m: m.remember(len(m.memo)),
        "h": lambda m: m.push(m.memo[m.number("B")]),
        "j": lambda m: m.push(m.memo[m.number("I")]),
        "c": lambda m: m.name(m.line(), m.line()),
        "\x93": lambda m: m.stack_global(),
        "i": _instance,
        "R": lambda m: m.reduce(),
        "b": lambda m: m.build(),
        "Q": lambda m: m.persistent(),
    }.items()
}
