"""Headers of safetensors files, written by the package's own builder."""

from __future__ import annotations

from collections.abc import Iterable

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.header_build import HeaderBuilder, file_order


def build_header(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]],
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file as the stock writer writes them without metadata.

    Returns:
        The header with its length, and by name where in the file each tensor begins and ends.
    """
    builder, spans = HeaderBuilder(), dict[str, tuple[int, int]]()
    for name, dtype, shape in sorted(entries, key=lambda entry: file_order(entry[1], entry[0])):
        if name in spans:
            raise ValueError(f"tensor name {name} is used twice or reserved")
        begin = builder.add(name, dtype, shape)
        size = dtype.itemsize
        for dim in shape:
            size *= dim
        spans[name] = begin, begin + size
    header, _ = builder.finish()
    return header, {name: (len(header) + begin, len(header) + end) for name, (begin, end) in spans.items()}
