"""The way of a tile: read -> for each task: encode -> hash -> write -> record."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from streamconv.checkpoint.mapping import Window
from streamconv.checkpoint.shard import Shard
from streamconv.errors import DataError, printable
from streamconv.lazy import Bytes
from streamconv.planning.plan import RowRange
from streamconv.planning.reads import Reads
from streamconv.quants.base import EncodeStats
from streamconv.run.cut import Task, Tile
from streamconv.run.encode import Encoded, encoded, read_rows, reduced
from streamconv.run.mapped import Mapped
from streamconv.run.output_state import OutputState

if TYPE_CHECKING:
    from streamconv.device.pipeline import WorkerBuffers

PHASES = ("read", "compute", "hash", "write")
"""What a worker does with a tile; waiting for its turn in a matrix counts as hash."""


@dataclass(slots=True)
class Tally:
    """What tiles took.

    Attributes:
        bytes_read: of the source, as it is stored; `bytes_mapped` of them were encoded where the page cache holds them.
        seconds: of workers, in each of PHASES.
    """

    bytes_read: int = 0
    bytes_mapped: int = 0
    bytes_written: int = 0
    tiles: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _since: float = field(default_factory=time.monotonic)

    def add(self, other: Tally) -> None:
        self.bytes_read += other.bytes_read
        self.bytes_mapped += other.bytes_mapped
        self.bytes_written += other.bytes_written
        self.tiles += other.tiles
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def lap(self, phase: str) -> None:
        """The time since the last lap went into `phase`."""
        now = time.monotonic()
        self.seconds[phase], self._since = self.seconds[phase] + now - self._since, now


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a read from `start` on: uint8 [rows * row_bytes], and the memory that is free beside them."""

    start: int
    data: Bytes
    free: Bytes
    window: Window | None

    def of(self, task: Task, span: RowRange) -> Bytes:
        """Those of a task."""
        first, last = (span.op.out_rows(row - self.start) * span.row_bytes for row in (task.start, task.stop))
        return self.data[first:last]

    def check(self) -> None:
        """What was encoded was made of the file's own bytes.

        Raises:
            SourceChangedError: it was cut off or replaced while it was mapped.
        """
        if self.window is not None:
            self.window.check()


@dataclass(frozen=True, slots=True)
class TileWorker:
    """Takes tiles through the memory of one worker.

    Attributes:
        arena: uint8; holds a tile from read to write.
        slot: of a device; None encodes on the CPU.
        give_back: gives the memory of the arena back to the system, or (first byte, bytes) of it.
        mapped: maps tiles that need not be read; not for devices, which copy from pinned memory.
        consumed: told of (output, span, source rows) that will not be read again.
    """

    reads: Reads
    shards: Sequence[Shard]
    outputs: Sequence[OutputState]
    arena: Bytes
    slot: WorkerBuffers | None
    give_back: Callable[..., object]
    mapped: Mapped | None
    consumed: Callable[[int, int, int], None]

    def run(self, tile: Tile) -> Tally:
        """Read the rows of a tile; encode, hash, write and record those of each task."""
        tally = Tally(tiles=1)
        with self._rows(tile, tally) as rows:
            for task in tile.tasks:
                output, stats, hashes, before = self.outputs[task.share.output], EncodeStats(), [], tally.bytes_written
                errors: list[tuple[float, ...]] = []
                span, (start, stop) = output.plan.spans[task.share.span], task.rows()
                count, skipped = span.op.out_rows(stop - start), span.op.out_rows(start - span.start)
                if span.reduce is not None:
                    maxima = reduced(span, count, rows.of(task, span), output.results, self.slot)
                    rows.check()
                    output.results.add(span.reduce.key, count, maxima)
                    tally.lap("compute")
                    continue
                tasks = output.tasks(task.share.span)
                for result in encoded(tasks, span, count, rows.of(task, span), rows.free, output.results, self.slot):
                    self._judge(output, span, result)
                    stats.add(result.stats)
                    if output.check is not None:
                        errors.append(output.check.tile(span, result, rows.of(task, span), count, output.results))
                    tally.lap("compute")
                    hashes.append(tuple(xxhash.xxh3_128(part.data).hexdigest() for part in result.parts))
                    for dest in result.dests:
                        output.order.take(dest.matrix, dest.row + skipped, count, result.parts)
                        tally.lap("hash")
                        tally.bytes_written += output.write(dest, dest.row + skipped, count, result.parts)
                        tally.lap("write")
                rows.check()
                output.record(task, tuple(hashes), stats, tuple(errors), tally.bytes_written - before)
        return tally

    def _judge(self, output: OutputState, span: RowRange, result: Encoded) -> None:
        """Values that would ruin the checkpoint stop the conversion: the error names the file, too."""
        try:
            output.judge(span, result)
        except DataError as error:
            if span.source.pieces:
                error.about(printable(self.shards[span.source.pieces[0].shard].path.name))
            raise

    @contextlib.contextmanager
    def _rows(self, tile: Tile, tally: Tally) -> Iterator[Rows]:
        """The source rows of a tile, read into the arena or mapped."""
        reader = self.reads[tile.read].reader
        span = self.outputs[reader.output].plan.spans[reader.span]
        start, stop = tile.start - reader.shift, tile.stop - reader.shift
        window = self.mapped.window(self.shards, span, start, stop) if self.mapped is not None and self.slot is None else None
        size, scratch = (stop - start) * span.row_bytes, (stop - start) * span.scratch_row_bytes
        tally.bytes_read = (stop - start) * span.stored_row_bytes
        if window is None:
            data = read_rows(self.shards, span, start, stop, self.arena, self.arena[size : size + scratch])
            free = self.arena[-(-(size + scratch) // 64) * 64 :]
        else:  # what is mapped takes the place of as much of the arena
            taken = -(-window.data.size // mmap.PAGESIZE) * mmap.PAGESIZE
            self.give_back(max(self.arena.size // mmap.PAGESIZE * mmap.PAGESIZE - taken, 0), taken)
            data, free, tally.bytes_mapped = window.data, self.arena, tally.bytes_read
        tally.lap("read")
        if window is None:
            self._drop(span, start, stop)
        for task in tile.tasks:
            self.consumed(task.share.output, task.share.span, task.stop - task.start)
        with window or contextlib.nullcontext():
            yield Rows(tile.start, data, free, window)
        if window is not None:
            self._drop(span, start, stop)

    def _drop(self, span: RowRange, start: int, stop: int) -> None:
        if span.reduce is None:  # else a later pass reads them again
            span.source.drop_page_cache(self.shards, start, stop)
