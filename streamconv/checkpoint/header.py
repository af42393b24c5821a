"""The safetensors header: a strict parser and the writer's twin (checkpoint spec §1.2).

Whatever the stock reader rejects is rejected here; whatever is accepted here it reads the same. Only the header's bytes are
ever read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.checkpoint.dtypes import DTYPES, DType
from streamconv.errors import CheckpointError, HeaderError, printable

MAX_HEADER = 100_000_000
"""Longest header the stock reader takes, bytes."""

_MAX_DEPTH = 8
_MAX_NUMBER = 1 << 63


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a file; `begin` and `end` are absolute file offsets."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header; tensor data start at byte `data_start` of the file."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: str | Path) -> Header:
    """Parse the header of a file.

    Raises:
        HeaderError: the file is not a valid safetensors file.
        CheckpointError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot open {printable(str(path))}: {error.strerror}") from error
    try:
        return read_header_fd(fd, path)
    finally:
        os.close(fd)


def read_header_fd(fd: int, path: str | Path) -> Header:
    """`read_header` of an open file."""
    size = os.fstat(fd).st_size
    where = printable(str(path))
    length = os.pread(fd, 8, 0)
    if len(length) < 8:
        raise HeaderError(f"{where}: {size} bytes are too few for a safetensors file")
    count = int(struct.unpack("<Q", length)[0])
    if count > MAX_HEADER:
        raise HeaderError(f"{where}: header length {count} is over the limit of {MAX_HEADER}")
    if 8 + count > size:
        raise HeaderError(f"{where}: header length {count} reaches past the end of the file ({size} bytes)")
    data = os.pread(fd, count, 8)
    if len(data) != count:
        raise HeaderError(f"{where}: the file ended inside its header")
    return parse_header(data, size, path)


def parse_header(data: bytes, file_size: int, path: str | Path) -> Header:
    """Check and index header JSON.

    Args:
        data: the header without its 8-byte length.
        file_size: bytes of the whole file, against which offsets are checked.

    Raises:
        HeaderError: says which rule is broken, and by which tensor.
    """
    where = printable(str(path))

    def fail(text: str) -> HeaderError:
        return HeaderError(f"{where}: {text}")

    if not data.startswith(b"{"):
        raise fail("the header does not begin with '{'")
    _check_depth(data, where)
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Duplicate as error:
        raise fail(f"{printable(str(error))} appears twice in the header") from None
    except (ValueError, RecursionError) as error:
        raise fail(f"the header is not valid JSON: {printable(str(error), 120)}") from None
    metadata = content.pop("__metadata__", {})
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fail("__metadata__ is not an object of strings")
    start = 8 + len(data)
    tensors = {}
    spans = []
    for name, entry in content.items():
        begin, end, tensor = _entry(name, entry, start, fail)
        tensors[name] = tensor
        spans.append((begin, end, name))
    spans.sort()
    at = 0
    for begin, end, name in spans:
        if begin != at:
            what = "overlaps another tensor" if begin < at else "leaves a hole before it"
            raise fail(f"{printable(name)}: data_offsets [{begin}, {end}] {what}")
        at = end
    if start + at != file_size:
        what = "the file is truncated" if start + at > file_size else "bytes follow the last tensor"
        raise fail(f"the header describes {start + at} bytes and the file has {file_size}: {what}")
    return Header(tensors, metadata, start)


def _entry(name: str, entry: Any, start: int, fail: Any) -> tuple[int, int, TensorEntry]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"{printable(name)}: an entry must have exactly dtype, shape and data_offsets")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise fail(f"{printable(name)}: the name is not valid Unicode")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise fail(f"{printable(name)}: dtype {printable(str(entry['dtype']))} is not known")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise fail(f"{printable(name)}: shape is not a list of whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise fail(f"{printable(name)}: data_offsets is not a pair of whole numbers")
    begin, end = offsets
    size = dtype.itemsize
    for length in shape:
        size *= length
        if size >= _MAX_NUMBER:
            raise fail(f"{printable(name)}: shape {printable(str(shape), 80)} overflows")
    if end - begin != size:
        raise fail(f"{printable(name)}: shape and dtype mean {size} bytes, data_offsets {end - begin}")
    return begin, end, TensorEntry(name, dtype, tuple(shape), start + begin, start + end)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


class _Duplicate(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Duplicate(key)
            seen.add(key)
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _check_depth(data: bytes, where: str) -> None:
    """Refuse deep nesting before the parser recurses into it. Brackets inside names only make this stricter by depth."""
    if data.count(b"[") + data.count(b"{") < _MAX_DEPTH:
        return
    for run in (b"[" * _MAX_DEPTH, b"{" * _MAX_DEPTH, b'{"":' * 64):
        if run in data:
            raise HeaderError(f"{where}: the header is nested too deeply")


def build_header(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]],
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header that the stock writer would write for these tensors.

    Returns:
        The bytes (length included), and name -> (begin, end) as absolute file offsets.
    """
    listed = sorted(entries, key=lambda entry: (-entry[1].order, entry[0].encode()))
    content, at, ranges = {}, 0, []
    for name, dtype, shape in listed:
        size = dtype.itemsize
        for length in shape:
            size *= length
        content[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [at, at + size]}
        ranges.append((name, at, at + size))
        at += size
    if len(content) != len(listed):
        raise AssertionError("a tensor name appears twice in one file")
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: (start + begin, start + end) for name, begin, end in ranges}
