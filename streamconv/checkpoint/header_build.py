"""Exact writer of the safetensors header. Spec: checkpoint §1.2 (byte layout of a rank file)."""

from __future__ import annotations

import json
from collections.abc import Iterable

from streamconv.checkpoint.dtypes import DType
from streamconv.errors import printable

METADATA = "__metadata__"


def build_header(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]],
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file as the stock writer writes them without metadata (spec: checkpoint §1.2).

    Returns:
        The header with its length, and by name where in the file each tensor begins and ends.
    """
    ordered = sorted(entries, key=lambda entry: (-entry[1].order, entry[0].encode()))
    parts, spans, at = [], {}, 0
    for name, dtype, shape in ordered:
        if name in spans or name == METADATA:
            raise ValueError(f"tensor name {printable(name)} is used twice or reserved")
        size = dtype.itemsize
        for dim in shape:
            size *= dim
        spans[name] = at, at + size
        listed = ",".join(map(str, shape))
        quoted = json.dumps(name, ensure_ascii=False)
        parts.append(f'{quoted}:{{"dtype":"{dtype.name}","shape":[{listed}],"data_offsets":[{at},{at + size}]}}')
        at += size
    text = ("{" + ",".join(parts) + "}").encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: (start + begin, start + end) for name, (begin, end) in spans.items()}
    return len(text).to_bytes(8, "little") + text, places
