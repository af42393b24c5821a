"""Which tiles are encoded straight from a mapping of their source file, and which are read into the arena."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from streamconv.checkpoint import mapping
from streamconv.checkpoint.fault_guard import FaultGuard, known_platform
from streamconv.checkpoint.mapping import Window
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import UsageError
from streamconv.options import Read
from streamconv.planning.plan import RowRange
from streamconv.planning.reads import Reads

WORTH = 256 * 1024
"""Bytes from which on a mapping costs less than the copy that it saves."""


class Mapped:
    """Maps the rows of tiles.

    Args:
        always: also what is not in the page cache, and what is smaller than WORTH.
    """

    def __init__(self, guard: FaultGuard, always: bool) -> None:
        self._guard, self._always = guard, always
        self._local: dict[Shard, bool] = {}

    def window(self, shards: Sequence[Shard], span: RowRange, start: int, stop: int) -> Window | None:
        """Rows [start, stop) of the span's source, if they lie in a file just as they are encoded and mapping them is the better way.

        Raises:
            SourceChangedError: the file ended early.
        """
        place = _place(span, start, stop)
        if place is None:
            return None
        shard, begin, end = shards[place[0]], place[1], place[2]
        if shard not in self._local:
            self._local[shard] = mapping.is_local(shard)
        if not self._local[shard] or not (self._always or (end - begin >= WORTH and shard.cached(begin, end))):
            return None
        return mapping.window(shard, begin, end, self._guard)


@contextlib.contextmanager
def mapped(read: Read, reads: Reads, kernels: bool) -> Iterator[Mapped | None]:
    """What maps the tiles of a run; None if all are read.

    Args:
        kernels: the run has compiled kernels. Their compiler alone takes more memory than mapping is worth.

    Raises:
        UsageError: mapping was asked for, and faults cannot be caught here.
    """
    if read == "pread" or (read == "auto" and not (kernels and known_platform() and any(_is_large(span) for _, span in reads.spans()))):
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            if not known_platform():
                raise OSError("unknown platform")
            from streamconv.kernels.fault import handler

            guard = stack.enter_context(FaultGuard(*handler()))
        except (OSError, ImportError, AttributeError):
            if read == "map":
                why = "here a mapped file that somebody cuts off would end the process"
                raise UsageError(f"--read map: {why}", hint="leave it out") from None
            yield None
            return
        yield Mapped(guard, read == "map")


def _is_large(span: RowRange) -> bool:
    return (span.stop - span.start) * span.row_bytes >= WORTH and _place(span, span.start, span.start + 1) is not None


def _place(span: RowRange, start: int, stop: int) -> tuple[int, int, int] | None:
    """(shard, begin, end) of rows that lie in one run in one file and need nothing done to them; None if they do not."""
    source = span.source
    if not (isinstance(source, SourceTensor) and source.as_stored and span.op.kind == "none"):
        return None
    if source.axis != 0 and len(source.pieces) > 1:
        return None
    first = 0
    for piece in source.pieces:
        if first <= start and stop <= first + piece.rows:
            begin = piece.begin + (start - first) * span.row_bytes
            aligned = begin % source.dtype.itemsize == 0  # kernels are compiled for that
            return (piece.shard, begin, piece.begin + (stop - first) * span.row_bytes) if aligned and stop > start else None
        first += piece.rows
    return None
