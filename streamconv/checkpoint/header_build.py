"""Writer of the safetensors header: the bytes of safetensors' own writer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from json.encoder import encode_basestring
from math import prod
from typing import NamedTuple, Protocol

from streamconv.checkpoint.dtypes import DType
from streamconv.errors import RefusedError, printable

METADATA = "__metadata__"
_PIECE = 1 << 12
"""Entries that are spelled at a time."""
_ENTRY = re.compile(rb'[{,]("(?:[^"\\]|\\.)*"):\{"dtype":"(\w+)","shape":\[([0-9,]*)\]')


class Form(Protocol):
    """What `build_header` knows of a tensor; asked for once for each object."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Shaped(NamedTuple):
    """A form that is nothing more."""

    dtype: DType
    shape: tuple[int, ...]


class BuiltHeader(NamedTuple):
    """The first bytes of a file, and where its tensors lie.

    Attributes:
        size: of the whole file.
        order: numbers of the tensors, in the order of their data: by dtype, then by name, as the stock writer has them.
        begins: where each of these begins, counted from the first data byte.
    """

    text: bytes
    size: int
    order: list[int]
    begins: list[int]


def build_header(names: Sequence[str], forms: Sequence[Form], metadata: Mapping[str, str] | None = None) -> BuiltHeader:
    """The header of a file with these tensors, a column for each fact.

    Args:
        metadata: what `__metadata__` says; it comes first, as the stock writer puts it.

    Raises:
        RefusedError: a name is there twice, or reserved.
    """
    if METADATA in names or len(set(names)) < len(names):
        twice = next(name for name, many in Counter([METADATA, *names]).items() if many > 1)
        raise RefusedError(f"tensor name {printable(twice)} is used twice or reserved")
    known = {id(form): form for form in forms}  # hashing one takes longer
    ranks, sizes, spelled = dict[int, int](), dict[int, int](), dict[int, str]()
    for key, form in known.items():
        ranks[key], sizes[key] = -form.dtype.order, form.dtype.itemsize * prod(form.shape)
        spelled[key] = f'{{"dtype":"{form.dtype.name}","shape":[{",".join(map(str, form.shape))}],"data_offsets":['
    keys = [*map(id, forms)]
    order = sorted(range(len(names)), key=names.__getitem__)  # code points sort as their UTF-8 does
    order.sort(key=[*map(ranks.__getitem__, keys)].__getitem__)
    ends = [*accumulate([sizes[keys[at]] for at in order])]
    begins = [0, *ends][: len(ends)]
    text, comma = bytearray(b"\0" * 8 + b"{"), ""
    if metadata:
        text += f'"{METADATA}":{json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))}'.encode()
        comma = ","
    for at in range(0, len(order), _PIECE):
        columns = zip(*(column[at : at + _PIECE] for column in (order, begins, ends)), strict=True)
        entries = [f"{encode_basestring(names[n])}:{spelled[keys[n]]}{begin},{end}]}}" for n, begin, end in columns]
        text += f"{comma}{','.join(entries)}".encode()
        comma = ","
    text += b"}"
    text += b" " * (-(len(text) - 8) % 8)
    text[:8] = (len(text) - 8).to_bytes(8, "little")
    return BuiltHeader(bytes(text), len(text) + (ends[-1] if ends else 0), order, begins)


def header_entries(header: bytes) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors in a header that was built here, in order."""
    at = 8
    if header[at + 1 :].startswith(f'"{METADATA}"'.encode()):
        at = header.index(b"}", at) + 1
    while entry := _ENTRY.match(header, at):
        yield json.loads(entry[1]), entry[2].decode(), tuple(map(int, entry[3].split(b","))) if entry[3] else ()
        at = header.index(b"}", entry.end()) + 1  # an entry holds neither texts with braces nor objects
