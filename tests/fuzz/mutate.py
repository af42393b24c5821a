"""Valid safetensors files, index files, configs and pickles, and what an adversary makes of them. All from a seed."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from streamconv.checkpoint.dtypes import DTYPES

_NAMES = ("a", "b", "model.layers.0.mlp.up_proj.weight", "é", "😀", "a\nb", 'q"', "\\", "\x7f", "lm_head.weight", "x" * 300, "")
_NUMBERS = (
    *("0", "1", "2", "3", "4", "8", "-1", "-0", "02", "1.0", "2e0", "1e400", "0x2", "255", "4294967296", "true", "null"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "9" * 30, '"2"', "[2]", "NaN"),
)
_VALUES = (
    *("{}", "[]", "null", "true", '"x"', '"U8"', '"u8"', '"F4"', '"C64"', '"F16"', '"BF16"', '"\\u00558"', "[[0]]", "[" * 500),
    *("[0,0]", "[0,2]", '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}', '{"a":' * 40 + "1" + "}" * 40, "[" * 60 + "]" * 60),
)
_BAD_TEXT = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\0", b"\x1f", b"\\ud800", b"\\u0061", b"\\x", b"\\")
_MARKS = b'{}[]:,"0123456789 -\\.etfn'
_SEPARATORS = (", ", ",", " ,\n\t")


def pack(header: bytes, data: bytes) -> bytes:
    """A file of a header and its data."""
    return struct.pack("<Q", len(header)) + header + data


def safetensors(random: Random) -> tuple[bytes, bytes]:
    """Header and data of a valid file: some tensors of any dtype, with or without metadata, in any layout of the JSON."""
    at, entries = 0, {}
    for name in random.sample(_NAMES, random.randrange(5)):
        dtype = random.choice(list(DTYPES.values()))
        shape = [random.choice((0, 1, 1, 2, 3)) for _ in range(random.randrange(4))]
        size = math.prod(shape) * dtype.itemsize
        fields = [("dtype", dtype.name), ("shape", shape), ("data_offsets", [at, at + size])]
        if random.random() < 0.3:
            random.shuffle(fields)
        entries[name] = dict(fields)
        at += size
    items: list[tuple[str, Any]] = list(entries.items())
    if random.random() < 0.3:
        random.shuffle(items)
    if random.random() < 0.3:
        items.insert(random.randrange(len(items) + 1), ("__metadata__", {"format": "pt", "k\n": '{"é": 1}'}))
    separators = (random.choice(_SEPARATORS), random.choice((":", ": ")))
    text = json.dumps(dict(items), separators=separators, ensure_ascii=random.random() < 0.5)
    return text.encode() + b" " * random.choice((0, 0, 1, 7)), random.randbytes(at)


def weight_map(random: Random, files: tuple[str, ...]) -> bytes:
    """A valid index file over these files."""
    names = {random.choice(_NAMES) + str(number): random.choice(files) for number in range(1, random.randrange(2, 6))}
    whole = {"metadata": {"total_size": random.randrange(99)}, "weight_map": names}
    return json.dumps(whole, indent=random.choice((None, 2)), ensure_ascii=random.random() < 0.5).encode()


# ---- changes of a text


def _flip(random: Random, text: bytearray) -> None:
    at = random.randrange(len(text))
    text[at] ^= 1 << random.randrange(8)


def _mark(random: Random, text: bytearray) -> None:
    at = random.randrange(len(text))
    text[at : at + random.randrange(2)] = bytes([random.choice(_MARKS)])


def _piece(pattern: bytes, others: tuple[str, ...]) -> Callable[[Random, bytearray], None]:
    found = re.compile(pattern)

    def apply(random: Random, text: bytearray) -> None:
        places = [match.span() for match in found.finditer(text)]
        if places:
            begin, end = random.choice(places)
            text[begin:end] = random.choice(others).encode()

    return apply


def _nudge(random: Random, text: bytearray) -> None:
    """One number a little larger or smaller: holes, overlaps, sizes that do not fit."""
    places = list(re.finditer(rb"[0-9]{1,18}", text))
    if places:
        match = random.choice(places)
        text[match.start() : match.end()] = str(max(0, int(match[0]) + random.choice((-2, -1, 1, 2, 8)))).encode()


def _bad_text(random: Random, text: bytearray) -> None:
    at = random.randrange(len(text))
    text[at:at] = random.choice(_BAD_TEXT)


def _cut(random: Random, text: bytearray) -> None:
    begin = random.randrange(len(text))
    del text[begin : begin + random.choice((1, 2, 5, 20))]


def _twice(random: Random, text: bytearray) -> None:
    """A run between two marks once more, with a comma: duplicate keys and entries."""
    marks = [match.start() for match in re.finditer(rb"[,{}\[\]]", text)]
    if len(marks) > 1:
        begin, end = sorted(random.sample(marks, 2))
        again = bytes(text[begin:end])
        text[end:end] = again if again.startswith(b",") else b"," + again.lstrip(b"{[")


def _swap(random: Random, text: bytearray) -> None:
    places = [match.span() for match in re.finditer(rb'"[^"]*"|\d+|\[[^\]]*\]', text)]
    if len(places) > 1:
        (a, b), (c, d) = sorted(random.sample(places, 2))
        if b <= c:
            text[a:d] = text[c:d] + text[b:c] + text[a:b]


_TEXT = (
    *(_flip, _mark, _bad_text, _cut, _twice, _twice, _swap, _nudge, _nudge),
    _piece(rb"-?[0-9]+", _NUMBERS),
    _piece(rb'"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\}', _VALUES),
    _piece(rb'"[A-Z0-9_]{2,8}"', tuple(f'"{name}"' for name in (*DTYPES, "F6_E2M3", "F4", "C64", "I128", "f32", ""))),
    _piece(rb'"[^"]*"(?=\s*:)', tuple(json.dumps(name) for name in (*_NAMES, "dtype", "shape", "__metadata__", "data_offsets", "x"))),
)


def mutate_text(random: Random, text: bytes) -> bytes:
    """One to three changes of a JSON text."""
    changed = bytearray(text)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if changed:
            random.choice(_TEXT)(random, changed)
    return bytes(changed)


def mutated_file(random: Random) -> bytes:
    """A safetensors file; about one in ten is left whole."""
    header, data = safetensors(random)
    kind = random.randrange(10)
    if kind < 6:
        header = mutate_text(random, header)
    elif kind == 6:  # the data do not fit
        data = data[: random.randrange(len(data) + 1)] if random.random() < 0.5 else data + random.randbytes(random.randrange(1, 9))
    file = pack(header, data)
    if kind == 7:  # the length lies
        near, far = (len(header) - 1, len(header) + 1, len(file)), (1 << 40, (1 << 64) - 1, 100_000_001)
        length = random.choice((0, 1, 2, *near, *far, random.randrange(99)))
        file = struct.pack("<Q", max(0, length)) + file[8:]
    elif kind == 8:  # anything, anywhere
        changed = bytearray(file)
        for _ in range(random.randrange(1, 4)):
            changed[random.randrange(len(changed))] = random.randrange(256)
        file = bytes(changed)
        file = file[: random.randrange(len(file) + 1)] if random.random() < 0.3 else file
    return file


def mutated_index(random: Random, files: tuple[str, ...]) -> bytes:
    """An index file; about one in ten is left whole."""
    text = weight_map(random, files)
    return text if random.random() < 0.1 else mutate_text(random, text)
