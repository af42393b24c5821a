"""Writer of the safetensors header: the bytes of safetensors' own writer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from json.encoder import encode_basestring
from math import prod

from streamconv.checkpoint.dtypes import DType
from streamconv.errors import printable

METADATA = "__metadata__"
_ENTRY = re.compile(rb'[{,]("(?:[^"\\]|\\.)*"):\{"dtype":"(\w+)","shape":\[([0-9,]*)\]')


class HeaderBuilder:
    """A header that grows tensor by tensor, which come in `file_order`.

    Args:
        metadata: what `__metadata__` says; it comes first, as the stock writer puts it.
    """

    def __init__(self, metadata: Mapping[str, str] | None = None) -> None:
        self._text, self._at, self._last = bytearray(b"\0" * 8 + b"{"), 0, ""
        self._comma = ""
        if metadata:
            self._text += f'"{METADATA}":{json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))}'.encode()
            self._comma = ","
        self._forms: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}  # as they are spelled, and their bytes
        self.count = 0

    def add(self, name: str, dtype: DType, shape: tuple[int, ...]) -> int:
        """Append a tensor; gives where it begins, counted from the first data byte."""
        if name == METADATA or (name == self._last and self.count):
            raise ValueError(f"tensor name {printable(name)} is used twice or reserved")
        known = self._forms.get((dtype.name, shape))
        if known is None:
            spelled = f'{{"dtype":"{dtype.name}","shape":[{",".join(map(str, shape))}],"data_offsets":['
            known = self._forms[dtype.name, shape] = spelled, dtype.itemsize * prod(shape)
        form, size = known
        begin, comma = self._at, self._comma
        self._at += size
        self._comma = ","
        quoted = encode_basestring(name)  # json.dumps makes an encoder at each call
        self._text += f"{comma}{quoted}:{form}{begin},{self._at}]}}".encode()
        self._last, self.count = name, self.count + 1
        return begin

    def finish(self) -> tuple[bytes, int]:
        """The first bytes of the file, and the size of all of it."""
        self._text += b"}"
        self._text += b" " * (-(len(self._text) - 8) % 8)
        self._text[:8] = (len(self._text) - 8).to_bytes(8, "little")
        made = bytes(self._text)
        self._text.clear()
        return made, len(made) + self._at


def file_order(dtype: DType, name: str) -> tuple[int, bytes]:
    """Sorts tensors as the stock writer does."""
    return -dtype.order, name.encode()


def header_entries(header: bytes) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors in a header that was built here, in order."""
    at = 8
    if header[at + 1 :].startswith(f'"{METADATA}"'.encode()):
        at = header.index(b"}", at) + 1
    while found := _ENTRY.match(header, at):
        yield json.loads(found[1]), found[2].decode(), tuple(map(int, found[3].split(b","))) if found[3] else ()
        at = header.index(b"}", found.end()) + 1  # an entry holds neither texts with braces nor objects
