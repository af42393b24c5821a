"""Strict reader of the safetensors header; header_build.py writes it.

A file is an 8-byte little-endian length, a JSON object of that length (header_parse.py), and the data. The reader is stricter
than the stock one: whatever it accepts, stock reads the same.
"""

from __future__ import annotations

import os
from pathlib import Path

from streamconv.checkpoint.header_parse import SPLIT, Header, HeaderParser
from streamconv.checkpoint.limits import MAX_HEADER, STOCK_MAX_HEADER
from streamconv.checkpoint.untrusted import open_regular, refuse_lfs_pointer
from streamconv.errors import CheckpointError, HeaderError, printable
from streamconv.memory import check_room

_FIRST_READ = 1 << 16
_TAKES = 5
"""Bytes of memory that a byte of a long header takes while it is read."""


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read just the header of a file.

    Raises:
        HeaderError: the header breaks a rule of the format.
        CheckpointError: the file cannot be opened or read, or is no regular file.
    """
    fd = open_regular(Path(path))
    try:
        return header_of(fd, path)
    finally:
        os.close(fd)


def header_of(fd: int, path: str | os.PathLike[str]) -> Header:
    """As `read_header`, of an open file that messages call `path`."""
    shown = printable(path)
    try:
        size = os.fstat(fd).st_size
        first = os.pread(fd, _FIRST_READ, 0)
        stop = _data_start(first, size, shown)  # refuses what is no header before the rest is read
        if len(first) >= stop:
            return parse_header(first, size, path)
        check_room(_TAKES * stop, f"reading the header of {shown}")
        data, at = bytearray(stop), 0  # read into its place: never two copies of a long header
        while at < stop:
            got = os.preadv(fd, [memoryview(data)[at : at + (1 << 24)]], at)
            if not got:
                raise HeaderError(f"{shown}: the file ends inside its header")
            at += got
    except OSError as error:
        raise CheckpointError(f"cannot read {shown}: {error.strerror}") from error
    return parse_header(data, size, path)


def _data_start(data: bytes | bytearray | memoryview, file_size: int, where: str) -> int:
    refuse_lfs_pointer(data, where, HeaderError)
    if file_size < 8 or len(data) < 8:
        raise HeaderError(f"{where}: {min(file_size, len(data))} bytes are too short for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > STOCK_MAX_HEADER:
        raise HeaderError(f"{where}: header length {length} is above the limit of {STOCK_MAX_HEADER}; no safetensors file?")
    if length > MAX_HEADER:
        raise HeaderError(f"{where}: a header of {length} bytes is above streamconv's own limit of {MAX_HEADER}", hint=SPLIT)
    if 8 + length > file_size:
        raise HeaderError(f"{where}: header length {length} reaches past the end of the file ({file_size} bytes)")
    if length < 2 or data[8:9] != b"{":
        raise HeaderError(f"{where}: the header does not start with '{{'; no safetensors file?")
    return 8 + length


def parse_header(data: bytes | bytearray | memoryview, file_size: int, path: str | os.PathLike[str] = "header") -> Header:
    """Check and parse the first bytes of a file.

    Args:
        data: at least the whole header with its length; more does not matter.
        file_size: of the whole file; the tensors must fill it exactly.

    Raises:
        HeaderError: names the file and, where there is one, the tensor.
    """
    shown = printable(path)
    stop = _data_start(data, file_size, shown)
    if len(data) < stop:
        raise HeaderError(f"{shown}: the file ends inside its header")
    text = data if len(data) == stop and not isinstance(data, memoryview) else bytes(data[:stop])
    return HeaderParser(text, file_size, shown).run()
