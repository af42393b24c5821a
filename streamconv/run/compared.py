"""In the place of an output folder: what a conversion would write is held against the files that are there, byte for byte."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.header_parse import Header
from streamconv.checkpoint.shard import Shard
from streamconv.lazy import np
from streamconv.planning.plan import Plan
from streamconv.quants.factors import nonfinite
from streamconv.quants.gptq import PackedWeight

BUFFER = 128 << 10
"""Bytes of a file that a worker holds beside its tile."""


@dataclass(slots=True)
class Difference:
    """Where a tensor is not what it should be.

    Attributes:
        bytes: how many bytes differ; `first` is the lowest of them, counted from the tensor's start.
        places: byte ranges of the tensor with differences in them, as they were met.
    """

    bytes: int = 0
    first: int = 1 << 62
    places: list[tuple[int, int]] = field(default_factory=list)


class Compared:
    """The sink of a pool whose plan has the places of these files.

    Args:
        files: of the plan, in its order.

    Attributes:
        differences: (file, tensor) -> where it differs.
        odd: (file, tensor) -> values of the output that are NaN or infinite, where they mean themselves.
    """

    def __init__(self, plan: Plan, files: Sequence[Shard], headers: Sequence[Header]) -> None:
        self.plan = plan
        self.differences: dict[tuple[str, str], Difference] = {}
        self.odd: dict[tuple[str, str], int] = {}
        self._lock, self._local = threading.Lock(), threading.local()
        self._files = {file.name: shard for file, shard in zip(plan.files, files, strict=True)}
        self._headers = {file.name: header for file, header in zip(plan.files, headers, strict=True)}
        self._packed = {place.tensor for matrix in plan.matrices if isinstance(matrix.codec, PackedWeight) for place in matrix.places}

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Hold `data` against the bytes of a file from `offset` on; all of them belong to one tensor."""
        header = self._headers[name]
        number = bisect.bisect_right(header.begins, offset, 0, len(header.names)) - 1
        tensor, (dtype, _) = header.names[number], header.forms[header.form[number]]
        new = np.frombuffer(data, np.uint8)
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty(BUFFER, np.uint8)
        for at in range(0, new.size, BUFFER):
            want = new[at : at + BUFFER]
            old = self._local.buffer[: want.size]
            self._files[name].read_into(offset + at, old.data)
            self._hold((name, tensor), dtype, offset + at - header.begins[number], want, old)

    def _hold(self, key: tuple[str, str], dtype: DType, at: int, want: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> None:
        odd = nonfinite(dtype, got) if key[1] not in self._packed else 0
        same = np.array_equal(want, got)
        if same and not odd:
            return
        with self._lock:
            if odd:
                self.odd[key] = self.odd.get(key, 0) + odd
            if same:
                return
            where = np.flatnonzero(want != got)
            difference = self.differences.setdefault(key, Difference())
            difference.bytes += where.size
            difference.first = min(difference.first, at + int(where[0]))
            begin, end = at + int(where[0]), at + int(where[-1]) + 1
            if difference.places and difference.places[-1][1] == at:  # goes on
                begin = difference.places.pop()[0]
            difference.places.append((begin, end))
