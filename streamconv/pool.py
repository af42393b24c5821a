"""Run a plan: workers take tiles in order; each reads, encodes and writes its tile inside its own arena."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamconv.budget import Shares, TileCost
from streamconv.checkpoint.shard import Shard
from streamconv.device import Device, DeviceLost, encode_on
from streamconv.errors import DataError, printable
from streamconv.fs import OutputFolder
from streamconv.plan import Matrix, Plan, Span
from streamconv.quants.base import Findings
from streamconv.stages.encode import Request, encode, is_copy, requests, row_costs
from streamconv.stages.read import read_rows, spare_bytes_per_row

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Tile:
    """Source rows [start, stop) of a span."""

    span: int
    start: int
    stop: int


@dataclass(slots=True)
class Outcome:
    """What a run did.

    Attributes:
        hashes: (file name, tensor name) -> XXH3-128 of the tensor's bytes, hex.
        overflow: source tensor -> finite values that became infinite in the model dtype.
        nonfinite: source tensor -> NaN or infinite values that were quantized all the same.
        device_lost: why the rest of the run was done on the CPU.
    """

    hashes: dict[tuple[str, str], str] = field(default_factory=dict)
    overflow: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    tiles: int = 0
    device_lost: str = ""


class _Stop(Exception):
    """Another worker failed."""


class _Order:
    """Each matrix is hashed front to back: a worker waits until the rows before its own are hashed.

    Tiles are handed out in plan order and every matrix's rows ascend in it, so whoever is waited for is always at work.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        import xxhash

        self._next = [0] * len(matrices)
        self._turn = threading.Condition()
        self.digests = [[xxhash.xxh3_128() for _ in matrix.places] for matrix in matrices]
        self.stopped = False

    def take(self, matrix: int, row: int, rows: int, parts: Sequence[np.ndarray[Any, Any]]) -> None:
        with self._turn:
            while self._next[matrix] != row and not self.stopped:
                self._turn.wait()
            if self.stopped:
                raise _Stop
        for digest, part in zip(self.digests[matrix], parts, strict=True):
            digest.update(part)
        with self._turn:
            self._next[matrix] = row + rows
            self._turn.notify_all()

    def stop(self) -> None:
        with self._turn:
            self.stopped = True
            self._turn.notify_all()

    def pad(self, number: int, matrix: Matrix) -> None:
        """Hash the zero rows at the end of a matrix."""
        if self._next[number] != matrix.filled:
            raise AssertionError(f"{matrix.name}: {self._next[number]} of {matrix.filled} rows were written")
        for digest, place in zip(self.digests[number], matrix.places, strict=True):
            left = (matrix.rows - matrix.filled) * place.row_bytes
            while left:
                digest.update(bytes(min(left, 1 << 20)))
                left -= min(left, 1 << 20)


class Pool:
    """Runs one plan once.

    Args:
        plan: what to do.
        shards: the source files the plan's pieces point into.
        folder: where the rank files lie, at full size, headers written.
        shares: workers and arena size.
        costs: tile cost of every span, as in plan.spans.
        tile_rows: bound on a tile's source rows (tests).
        progress: called after each tile with (source bytes read, bytes written) of it.
        devices: makes the device of a worker, by worker number; None encodes on the CPU.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[Shard],
        folder: OutputFolder,
        shares: Shares,
        costs: Sequence[TileCost],
        tile_rows: int | None,
        progress: Callable[[int, int], None],
        devices: Callable[[int], Device] | None = None,
    ) -> None:
        self.plan, self.shards, self.folder, self.shares = plan, shards, folder, shares
        self.costs, self.tile_rows, self.progress, self.devices = costs, tile_rows, progress, devices
        self.outcome = Outcome()
        self._order = _Order(plan.matrices)
        self._tiles = self._cut()
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self) -> Outcome:
        """Do all tiles.

        Raises:
            the first error any worker met; the others stop after their tile.
        """
        import xxhash

        for constant in self.plan.constants:
            name = self.plan.files[constant.file].name
            self.folder.write(name, constant.offset, constant.data)
            self.outcome.hashes[name, constant.tensor] = xxhash.xxh3_128(constant.data).hexdigest()
        threads = [
            threading.Thread(target=self._work, args=(n,), name=f"tile-{n}", daemon=True) for n in range(self.shares.workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # in short steps: a signal must reach the main thread
        except BaseException:
            self._fail(None)
            for thread in threads:
                thread.join()
            raise
        if self._error is not None:
            raise self._error
        for number, matrix in enumerate(self.plan.matrices):
            self._order.pad(number, matrix)
            for place, digest in zip(matrix.places, self._order.digests[number], strict=True):
                self.outcome.hashes[self.plan.files[matrix.file].name, place.tensor] = digest.hexdigest()
        return self.outcome

    def _cut(self) -> Iterator[Tile]:
        for number, span in enumerate(self.plan.spans):
            step = self.costs[number].rows(self.shares.arena, self.tile_rows)
            for start in range(span.start, span.stop, step):
                yield Tile(number, start, min(start + step, span.stop))

    def _fail(self, error: BaseException | None) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
            self._tiles = iter(())
        self._order.stop()

    def _work(self, number: int) -> None:
        import mmap

        import numpy as np

        try:
            if self.devices is not None:
                device = self.devices(number)
                self._take_tiles(device.arena(self.shares.arena), device)
                return
            # mapped and not allocated: all of it goes back to the system at once
            with mmap.mmap(-1, max(self.shares.arena, mmap.PAGESIZE)) as memory:
                self._take_tiles(np.frombuffer(memory, np.uint8), None)
        except _Stop:
            pass
        except BaseException as error:
            error.__traceback__ = None  # its frames would keep the arena mapped
            self._fail(error)

    def _take_tiles(self, arena: np.ndarray[Any, Any], device: Device | None) -> None:
        while True:
            with self._lock:
                tile = next(self._tiles, None)
            if tile is None:
                return
            self._do(tile, arena, device)

    def _do(self, tile: Tile, arena: np.ndarray[Any, Any], device: Device | None) -> None:
        span = self.plan.spans[tile.span]
        source_rows = tile.stop - tile.start
        size = source_rows * span.row_bytes
        spare = source_rows * spare_bytes_per_row(span)
        block = read_rows(self.shards, span, tile.start, tile.stop, arena, arena[size : size + spare])
        rows = span.op.out_rows(source_rows)
        space = arena[-(-(size + spare) // 64) * 64 :]
        skipped = span.op.out_rows(tile.start - span.start)
        written = 0
        for request, dests in requests(span, self.plan.matrices).items():
            findings = Findings()
            parts = self._encode(device, request, span, rows, block, space, findings)
            self._judge(span, request[1].quantizes, findings)
            taken = row_costs(request, span)[0] * rows
            space = space[-(-taken // 64) * 64 :]
            for dest in dests:
                matrix = self.plan.matrices[dest.matrix]
                row = dest.row + skipped
                self._order.take(dest.matrix, row, rows, parts)
                for place, part in zip(matrix.places, parts, strict=True):
                    name = self.plan.files[matrix.file].name
                    self.folder.write(name, place.offset + row * place.row_bytes, part.data)
                    written += part.size
        with self._lock:
            self.outcome.bytes_read += size
            self.outcome.bytes_written += written
            self.outcome.tiles += 1
        self.progress(size, written)

    def _encode(
        self,
        device: Device | None,
        request: Request,
        span: Span,
        rows: int,
        block: np.ndarray[Any, Any],
        space: np.ndarray[Any, Any],
        findings: Findings,
    ) -> list[np.ndarray[Any, Any]]:
        if device is None or is_copy(request, span.source.dtype) or self.outcome.device_lost:
            return encode(request, span, rows, block, space, findings)
        try:
            return encode_on(device, request, span, rows, block, space, findings)
        except DeviceLost as error:
            with self._lock:
                self.outcome.device_lost = str(error)
            return encode(request, span, rows, block, space, findings)

    def _judge(self, span: Span, quantizes: bool, findings: Findings) -> None:
        name = span.source.name
        if findings.nonfinite and quantizes and not self.plan.options.allow_nonfinite:
            raise DataError(
                f"{printable(name)}: NaN or infinity in a weight that is to be quantized",
                hint="--allow-nonfinite goes on: NaN becomes 0, infinity the largest finite value of its channel",
            )
        with self._lock:
            for counts, found in ((self.outcome.overflow, findings.overflow), (self.outcome.nonfinite, findings.nonfinite)):
                if found:
                    counts[name] = counts.get(name, 0) + found
