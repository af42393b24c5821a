"""Run the plans of some outputs: workers take tiles in order, each through an arena of its own."""

from __future__ import annotations

import contextlib
import functools
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from streamconv import memory
from streamconv.checkpoint.shard import Shard
from streamconv.errors import BudgetError
from streamconv.lazy import Bytes, np
from streamconv.planning.memory_plan import MemoryPlan, TileCost
from streamconv.planning.reads import Reads
from streamconv.process import start_thread
from streamconv.run.cut import Tile, cut, tiles
from streamconv.run.mapped import Mapped
from streamconv.run.order import Stop
from streamconv.run.output_state import OutputState
from streamconv.run.tile import Tally, TileWorker

if TYPE_CHECKING:
    from streamconv.device.pipeline import WorkerBuffers

FLOOR = 64 * memory.MIB
"""While less than this is free, only one worker goes on."""
_LOOK = 0.25
"""Seconds between two looks at the free memory."""
_PATIENCE = 3.0
"""Seconds that an interrupted run waits for its workers and, in the last one, for the journals."""


class Pool:
    """Runs the plans of some outputs once.

    Args:
        reads: of the plans of `outputs`.
        shards: the source files the plans' pieces point into.
        memory_plan: workers and arena size.
        costs: tile cost of every read.
        tile_rows: bound on a tile's source rows (tests).
        progress: called after each tile with (source bytes read, bytes written) of it.
        devices: makes the device slot of a worker, by (worker number, arena bytes); None encodes on the CPU.
        consumed: called with (output, span, source rows) when these rows will not be read again.
        mapped: maps tiles that need not be read.

    Attributes:
        busy: a thread was still at work when an interruption stopped waiting for it; it may use the folders.
    """

    def __init__(
        self,
        reads: Reads,
        outputs: Sequence[OutputState],
        shards: Sequence[Shard],
        memory_plan: MemoryPlan,
        costs: Sequence[TileCost],
        tile_rows: int | None,
        progress: Callable[[int, int], None],
        devices: Callable[[int, int], WorkerBuffers] | None = None,
        consumed: Callable[[int, int, int], None] = lambda output, span, rows: None,
        mapped: Mapped | None = None,
    ) -> None:
        self.reads, self.outputs, self.shards, self.memory_plan = reads, outputs, shards, memory_plan
        self.progress, self.devices, self.consumed, self.mapped = progress, devices, consumed, mapped
        self.tally, self.busy = Tally(seconds={}), False
        self._rows: Callable[[int], int] = lambda read: costs[read].rows(memory_plan.arena, tile_rows)
        self._tiles: Iterator[Tile] = tiles(reads, [output.past for output in outputs], self._rows)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._stopped = False
        self._threads: list[threading.Thread] = []
        self._looked, self._short = 0.0, False

    def run(self) -> Tally:
        """Do all tiles.

        Raises:
            the first error any worker met; the others stop after their tile.
        """
        try:
            for output in self.outputs:
                output.begin(self.fail)
            for number in range(self.memory_plan.workers):
                started = start_thread(self._work, f"tile-{number}", number)
                if started is None:  # fewer give the same bytes
                    break
                self._threads.append(started)
            if not self._threads:
                raise BudgetError("no thread can be started", hint="raise the limit of processes (ulimit -u, the pids cgroup)")
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(0.2)  # in short steps: a signal must reach the main thread
            for output in self.outputs:
                while not output.recorded(0.2):
                    pass
        except BaseException:
            self._abandon()
            raise
        if self._error is not None:
            raise self._error
        for output in self.outputs:
            output.order.close()
        return self.tally

    def _abandon(self) -> None:
        """Interrupted: let the workers end their tiles and the journals note them, but only for so long."""
        self.fail(None)
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - 1 - time.monotonic()))
        self.busy = any(thread.is_alive() for thread in self._threads)
        for output in self.outputs:
            self.busy = not output.recorded(max(0.0, until - time.monotonic())) or self.busy

    def fail(self, error: BaseException | None) -> None:
        """No further tile is handed out; `run` raises `error`."""
        with self._lock:
            if self._error is None:
                self._error = error
            self._tiles, self._stopped = iter(()), True
        for output in self.outputs:
            output.stop()

    def _work(self, number: int) -> None:
        try:
            if self.devices is not None:
                slot = self.devices(number, self.memory_plan.arena)
                self._take_tiles(number, self._worker(slot.arena, slot, lambda *_: None))
                return
            # mapped and not allocated: all of it goes back to the system as soon as nothing refers to it
            mapped = mmap.mmap(-1, max(self.memory_plan.arena, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
                # beside a window, huge pages would bring more of the arena back than is used
                mapped.madvise(mmap.MADV_HUGEPAGE if self.mapped is None else mmap.MADV_NOHUGEPAGE)
            give_back = functools.partial(mapped.madvise, mmap.MADV_DONTNEED)
            self._take_tiles(number, self._worker(np.frombuffer(mapped, np.uint8), None, give_back))
        except Stop:
            pass
        except BaseException as error:
            _forget_frames(error)  # they would keep the arena mapped, and a device's memory taken
            self.fail(error)

    def _take_tiles(self, number: int, worker: TileWorker) -> None:
        while True:
            if number and self._pressed():
                worker.give_back()
                while self._pressed():
                    time.sleep(_LOOK / 2)
            with self._lock:
                tile = next(self._tiles, None)
            if tile is None:
                return
            if tile.tasks[0].done is None:
                self._do(tile, worker)
            elif not self._believe(tile, worker):
                for piece in cut(tile.read, [replace(task, done=None) for task in tile.tasks], self._rows(tile.read)):
                    self._do(piece, worker)

    def _pressed(self) -> bool:
        """Memory is short and there is work: all workers but the first wait."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= _LOOK:
                self._looked, self._short = now, memory.available() < FLOOR
            return self._short and not self._stopped and self._threads[0].is_alive()

    def _believe(self, tile: Tile, worker: TileWorker) -> bool:
        """Take the rows of a finished task as they are, if their bytes are still those that were recorded."""
        (task,) = tile.tasks
        if task.done is None or not self.outputs[task.share.output].verify_resumed_tile(task.done, worker.arena):
            return False
        self.consumed(task.share.output, task.share.span, task.stop - task.start)
        self.progress(self._due(tile), 0)
        return True

    def _do(self, tile: Tile, worker: TileWorker) -> None:
        tally = worker.run(tile)
        with self._lock:
            self.tally.add(tally)
        self.progress(self._due(tile), tally.bytes_written)

    def _due(self, tile: Tile) -> int:
        """Source bytes that count as done with a tile: those of all outputs together are the bytes of the read."""
        stored = self.reads.source(tile.read).stored_row_bytes
        return sum(task.stop - task.start for task in tile.tasks) * stored // len(self.reads[tile.read].outputs)

    def _worker(self, arena: Bytes, slot: WorkerBuffers | None, give_back: Callable[..., object]) -> TileWorker:
        return TileWorker(self.reads, self.shards, self.outputs, arena, slot, give_back, self.mapped, self.consumed)


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
