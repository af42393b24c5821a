"""Run a plan: workers take tiles in order; each reads, encodes and writes its tile inside its own arena."""

from __future__ import annotations

import contextlib
import functools
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from streamconv import memory
from streamconv.checkpoint.mapping import Window
from streamconv.checkpoint.shard import Shard
from streamconv.device.ring import Slot
from streamconv.device.step import Job
from streamconv.errors import BudgetError
from streamconv.planning.memory_plan import Shares, TileCost
from streamconv.planning.plan import Matrix, Plan, Span
from streamconv.process import start_thread
from streamconv.quants.base import Findings
from streamconv.run.encode import Request, encode, is_copy, requests, row_costs
from streamconv.run.journal import Done, Journal, Recorder
from streamconv.run.judge import judge
from streamconv.run.mapped import Mapped
from streamconv.run.order import Hashes, Order, Stop
from streamconv.run.output_folder import OutputFolder
from streamconv.run.read import read_rows, scratch_bytes_per_row
from streamconv.run.results import Results
from streamconv.run.resume import believe

if TYPE_CHECKING:
    import numpy as np


FLOOR = 64 * memory.MIB
"""While less than this is free, only one worker goes on."""
_LOOK = 0.25
"""Seconds between two looks at the free memory."""


class Sink(Protocol):
    """Takes encoded bytes of a rank file: the output folder, or what holds them against one. Called from worker threads."""

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None: ...


PHASES = ("read", "compute", "hash", "write")
"""What a worker does with a tile; waiting for its turn in a matrix counts as hash."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Source rows [start, stop) of a span; `done` if an earlier run recorded them as finished."""

    span: int
    start: int
    stop: int
    done: Done | None = None


@dataclass(slots=True)
class Outcome:
    """What a run did.

    Attributes:
        overflow: source tensor -> finite values that became infinite in the model dtype.
        nonfinite: source tensor -> NaN or infinite values that were quantized all the same.
        bytes_mapped: of bytes_read, those that were encoded where the page cache holds them.
        resumed: tiles of an earlier run that were believed, after a look at their bytes.
        seconds: worker seconds spent in each of PHASES, over all workers.
    """

    overflow: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_mapped: int = 0
    bytes_written: int = 0
    tiles: int = 0
    resumed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Pool:
    """Runs one plan once.

    Args:
        plan: what to do.
        shards: the source files the plan's pieces point into.
        folder: takes the bytes; for a conversion the rank files, at full size, headers written.
        shares: workers and arena size.
        costs: tile cost of every span, as in plan.spans.
        tile_rows: bound on a tile's source rows (tests).
        progress: called after each tile with (source bytes read, bytes written) of it.
        devices: makes the device slot of a worker, by (worker number, arena bytes); None encodes on the CPU.
        journal: told of every tile that is safely on the disk.
        past: span -> finished row ranges of an earlier run, ascending.
        consumed: called with (span, source rows) when these rows will not be read again.
        mapped: maps tiles that need not be read; not for devices, which copy from pinned memory.

    Attributes:
        hashes: of every tensor, once `run` is done.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[Shard],
        folder: Sink,
        shares: Shares,
        costs: Sequence[TileCost],
        tile_rows: int | None,
        progress: Callable[[int, int], None],
        devices: Callable[[int, int], Slot] | None = None,
        journal: Journal | None = None,
        past: Mapping[int, Sequence[Done]] | None = None,
        consumed: Callable[[int, int], None] = lambda span, rows: None,
        mapped: Mapped | None = None,
    ) -> None:
        self.plan, self.shards, self.folder, self.shares = plan, shards, folder, shares
        self.costs, self.tile_rows, self.progress, self.devices = costs, tile_rows, progress, devices
        self.past, self.consumed, self.mapped = past or {}, consumed, mapped
        self._recorder = Recorder(journal, folder, self.fail) if journal is not None and isinstance(folder, OutputFolder) else None
        self.outcome = Outcome()
        self.hashes = Hashes(plan.files)
        self._order = Order(plan.matrices, self.hashes)
        self.results = Results(plan.spans.reducing())
        self._tiles = self._cut()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._looked, self._short, self._idle = 0.0, False, True

    @property
    def busy(self) -> bool:
        """A thread was still at work when an interruption stopped waiting for it; it may use the folder."""
        return not self._idle

    def run(self) -> Outcome:
        """Do all tiles.

        Raises:
            the first error any worker met; the others stop after their tile.
        """
        import xxhash

        for constant in self.plan.constants:
            name = self.plan.files[constant.file].name
            self.folder.write(name, constant.offset, constant.data)
            self.hashes.put(constant.file, constant.position, xxhash.xxh3_128(constant.data).digest())
        for matrix in self.plan.matrices.unfilled():
            self._pad(matrix)
        try:
            if self._recorder is not None:
                self._recorder.start()
            for number in range(self.shares.workers):
                started = start_thread(self._work, f"tile-{number}", number)
                if started is None:  # fewer give the same bytes
                    break
                self._threads.append(started)
            if not self._threads:
                raise BudgetError("no thread can be started", hint="raise the limit of processes (ulimit -u, the pids cgroup)")
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(0.2)  # in short steps: a signal must reach the main thread
            while self._recorder is not None and not self._recorder.finish(0.2):
                pass
        except BaseException:
            self._abandon()
            raise
        if self._error is not None:
            raise self._error
        self._order.close()
        return self.outcome

    def _pad(self, matrix: Matrix) -> None:
        """Write the zero rows at the end of a matrix: no tile covers them, and an earlier run may have left other bytes there."""
        for place in matrix.places:
            begin, end = place.extent(matrix.filled, matrix.rows - matrix.filled)
            for at in range(begin, end, memory.MIB):
                self.folder.write(self.plan.files[matrix.file].name, at, bytes(min(memory.MIB, end - at)))

    def _abandon(self) -> None:
        """Interrupted: let the workers end their tiles and the journal note them, but only for so long."""
        self.fail(None)
        until = time.monotonic() + 3
        for thread in self._threads:
            thread.join(max(0.0, until - 1 - time.monotonic()))
        self._idle = not any(thread.is_alive() for thread in self._threads)
        if self._recorder is not None:
            self._idle = self._recorder.finish(max(0.0, until - time.monotonic())) and self._idle

    def _cut(self) -> Iterator[Tile]:
        for number, span in enumerate(self.plan.spans):
            at = span.start
            for done in self.past.get(number, ()):
                yield from self._pieces(number, at, done.start)
                yield Tile(number, done.start, done.stop, done)
                at = done.stop
            yield from self._pieces(number, at, span.stop)

    def _pieces(self, number: int, start: int, stop: int) -> Iterator[Tile]:
        step = self.costs[number].rows(self.shares.arena, self.tile_rows)
        for at in range(start, stop, step):
            yield Tile(number, at, min(at + step, stop))

    def fail(self, error: BaseException | None) -> None:
        """No further tile is handed out; `run` raises `error`."""
        with self._lock:
            if self._error is None:
                self._error = error
            self._tiles = iter(())
        self._order.stop()
        self.results.stop()

    def _work(self, number: int) -> None:
        import numpy as np

        try:
            if self.devices is not None:
                slot = self.devices(number, self.shares.arena)
                self._take_tiles(number, slot.arena, slot, lambda *_: None)
                return
            # mapped and not allocated: all of it goes back to the system as soon as nothing refers to it
            mapped = mmap.mmap(-1, max(self.shares.arena, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
                # beside a window, huge pages would bring more of the arena back than is used
                mapped.madvise(mmap.MADV_HUGEPAGE if self.mapped is None else mmap.MADV_NOHUGEPAGE)
            give_back = functools.partial(mapped.madvise, mmap.MADV_DONTNEED)
            self._take_tiles(number, np.frombuffer(mapped, np.uint8), None, give_back)
        except Stop:
            pass
        except BaseException as error:
            _forget_frames(error)  # they would keep the arena mapped, and a device's memory taken
            self.fail(error)

    def _take_tiles(
        self, number: int, arena: np.ndarray[Any, Any], slot: Slot | None, give_back: Callable[..., object]
    ) -> None:
        while True:
            if number and self._pressed():
                give_back()
                while self._pressed():
                    time.sleep(_LOOK / 2)
            with self._lock:
                tile = next(self._tiles, None)
            if tile is None:
                return
            if tile.done is None:
                self._do(tile, arena, slot, give_back)
            elif not self._believe(tile, tile.done, arena):
                for piece in self._pieces(tile.span, tile.start, tile.stop):
                    self._do(piece, arena, slot, give_back)

    def _pressed(self) -> bool:
        """Memory is short and there is work: all workers but the first wait."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= _LOOK:
                self._looked, self._short = now, memory.available() < FLOOR
            return self._short and not self._order.stopped and self._threads[0].is_alive()

    def _believe(self, tile: Tile, done: Done, arena: np.ndarray[Any, Any]) -> bool:
        """Take a tile of an earlier run as it is, if its bytes are still those that were recorded."""
        span = self.plan.spans[tile.span]
        if not isinstance(self.folder, OutputFolder) or not believe(self.plan, done, self.folder, self._order, arena):
            return False
        with self._lock:
            self.outcome.resumed += 1
        self._count(span.source.name, done.overflow, done.nonfinite)
        self.consumed(tile.span, tile.stop - tile.start)
        self.progress((tile.stop - tile.start) * span.stored_row_bytes, 0)
        return True

    def _do(self, tile: Tile, arena: np.ndarray[Any, Any], slot: Slot | None, give_back: Callable[..., object]) -> None:
        """Do a tile, read or mapped.

        Args:
            give_back: gives the memory of the arena back, or (first byte, bytes) of it.
        """
        span, began = self.plan.spans[tile.span], time.monotonic()
        window = self.mapped.window(self.shards, span, tile.start, tile.stop) if self.mapped is not None and slot is None else None
        if window is None:
            self._encode(tile, arena, slot, None, began)
            return
        # what is mapped takes the place of as much of the arena
        size = -(-window.data.size // mmap.PAGESIZE) * mmap.PAGESIZE
        give_back(max(arena.size // mmap.PAGESIZE * mmap.PAGESIZE - size, 0), size)
        with window:
            self._encode(tile, arena, slot, window, began)
        if span.reduce is None:
            span.source.drop_page_cache(self.shards, tile.start, tile.stop)

    def _encode(self, tile: Tile, arena: np.ndarray[Any, Any], slot: Slot | None, window: Window | None, began: float) -> None:
        import xxhash

        span = self.plan.spans[tile.span]
        source_rows = tile.stop - tile.start
        size, stored = source_rows * span.row_bytes, source_rows * span.stored_row_bytes
        spare = source_rows * scratch_bytes_per_row(span)
        spent = dict.fromkeys(PHASES, 0.0)
        if window is None:
            block = read_rows(self.shards, span, tile.start, tile.stop, arena, arena[size : size + spare])
            space = arena[-(-(size + spare) // 64) * 64 :]
        else:
            block, space = window.data, arena
        now = time.monotonic()
        spent["read"] = now - began
        if span.reduce is None and window is None:  # else a later pass reads them again
            span.source.drop_page_cache(self.shards, tile.start, tile.stop)
        self.consumed(tile.span, source_rows)
        if span.reduce is not None:
            self._reduce(span, source_rows, block, slot, window)
            spent["compute"] = time.monotonic() - now
            self._did(tile, stored, 0, spent, window)
            return
        rows = span.op.out_rows(source_rows)
        skipped = span.op.out_rows(tile.start - span.start)
        written, files, hashes, found = 0, set[str](), [], Findings()
        wanted = requests(span, self.plan.matrices)
        began = time.monotonic()
        made, space = self._on_device(slot, wanted, span, rows, block, space)
        spent["compute"] += time.monotonic() - began
        for request, dests in wanted.items():
            began = time.monotonic()
            if request in made:
                parts, findings = made[request].parts, made[request].findings
            else:
                findings, bound = Findings(), (request[0], request[1].bind(self.results, span.source.name))
                parts = encode(bound, span, rows, block, space, findings)
                space = space[-(-row_costs(request, span)[0] * rows // 64) * 64 :]
            now = time.monotonic()
            spent["compute"] += now - began
            judge(self.plan, span, request, dests[0], findings, parts)
            self._count(span.source.name, findings.overflow, findings.nonfinite)
            found.add(findings)
            hashes.append(tuple(xxhash.xxh3_128(part.data).hexdigest() for part in parts))
            for dest in dests:
                matrix = self.plan.matrices[dest.matrix]
                row = dest.row + skipped
                began = time.monotonic()
                self._order.take(dest.matrix, row, rows, parts)
                now = time.monotonic()
                spent["hash"] += now - began
                for place, part in zip(matrix.places, parts, strict=True):
                    name = self.plan.files[matrix.file].name
                    self.folder.write(name, place.extent(row, rows)[0], part.data)
                    files.add(name)
                    written += part.size
                spent["write"] += time.monotonic() - now
        if window is not None:
            window.check()
        if self._recorder is not None:
            done = Done(tile.span, tile.start, tile.stop, tuple(hashes), found.overflow, found.nonfinite)
            self._recorder.add(done, files, written)
        self._did(tile, stored, written, spent, window)

    def _reduce(self, span: Span, rows: int, block: np.ndarray[Any, Any], slot: Slot | None, window: Window | None) -> None:
        """A tile of an earlier pass: it is not in the journal, a resumed run reads it again."""
        if span.reduce is None:
            raise AssertionError(f"{span.source.name}: nothing to reduce")
        kernel = span.reduce.kernel(span.source.dtype)
        if slot is not None:
            found = slot.reduce(span, rows, block, self.results).numpy()
        elif kernel is not None:
            found = kernel(block.view(span.source.dtype.storage), rows, span.source.cols)
        else:
            import torch

            matrix = torch.from_numpy(block).view(getattr(torch, span.source.dtype.torch)).reshape(rows, span.source.cols)
            found = span.reduce.tile(matrix, self.results).numpy()
        if window is not None:
            window.check()
        self.results.add(span.reduce.key, rows, found)

    def _did(self, tile: Tile, stored: int, written: int, spent: Mapping[str, float], window: Window | None) -> None:
        with self._lock:
            self.outcome.bytes_mapped += stored if window is not None else 0
            self.outcome.bytes_read += stored
            self.outcome.bytes_written += written
            self.outcome.tiles += 1
            for phase, seconds in spent.items():
                self.outcome.seconds[phase] = self.outcome.seconds.get(phase, 0.0) + seconds
        self.progress(stored, written)

    def _on_device(
        self,
        slot: Slot | None,
        wanted: Iterable[Request],
        span: Span,
        rows: int,
        block: np.ndarray[Any, Any],
        space: np.ndarray[Any, Any],
    ) -> tuple[dict[Request, Job], np.ndarray[Any, Any]]:
        """What a device encodes of a tile (copies stay here), and the space that is left."""
        if slot is None:
            return {}, space
        jobs = {
            request: Job((request[0], request[1].bind(self.results, span.source.name)))
            for request in wanted
            if not is_copy(request, span.source.dtype)
        }
        return jobs, slot.encode(list(jobs.values()), span, rows, block, space) if jobs else space

    def _count(self, name: str, overflow: int, nonfinite: int) -> None:
        with self._lock:
            for counts, found in ((self.outcome.overflow, overflow), (self.outcome.nonfinite, nonfinite)):
                if found:
                    counts[name] = counts.get(name, 0) + found


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
