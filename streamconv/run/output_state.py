"""One output of a run: where its bytes go, and what is known of them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import xxhash

from streamconv import memory
from streamconv.errors import DataError, printable
from streamconv.lazy import Bytes
from streamconv.planning.plan import Destination, Plan, RowRange
from streamconv.planning.tables import KEPT
from streamconv.planning.tasks import EncodeTask, encode_tasks
from streamconv.quants import factors
from streamconv.quants.base import EncodeStats
from streamconv.run.cut import JournalState, Task
from streamconv.run.encode import Encoded
from streamconv.run.inline_check import InlineCheck
from streamconv.run.journal import Journal, TileRecord
from streamconv.run.order import Hashes, HashOrder, ReductionResults, hash_of
from streamconv.run.output_folder import OutputFolder
from streamconv.run.recorder import Recorder


class Sink(Protocol):
    """Takes encoded bytes of an output file: the output folder, or what holds them against one. Called from worker threads."""

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None: ...


class OutputState:
    """What workers share of one output.

    Args:
        folder: takes the bytes; for a conversion the tensor files, at full size, headers written.
        journal: told of every tile that is safely on the disk.
        past: what an earlier run finished.
        loose: matrices that get their rows in any order.
        check: holds each tile against its source; None believes what was encoded.

    Attributes:
        tasks: by number of a span, with the matrices that take what each makes.
        hashes: of every tensor, once the run is done.
        results: of the plan's reductions.
        overflow: source tensor -> finite values that became infinite in the model dtype.
        nonfinite: source tensor -> NaN or infinite values that were quantized all the same.
        resumed: tiles of an earlier run that were believed, after a look at their bytes.
        done: bytes of matrices that are in their files.
    """

    def __init__(
        self, plan: Plan, folder: Sink, journal: Journal | None = None, past: JournalState | None = None, loose: Collection[int] = (),
        check: InlineCheck | None = None,
    ) -> None:
        self.plan, self.past = plan, past or {}
        self.tasks: Callable[[int], Mapping[EncodeTask, list[Destination]]] = memory.kept(self._tasks, KEPT)
        self.hashes = Hashes(plan.files)
        self.order = HashOrder(plan.matrices, self.hashes, loose)
        self.results = ReductionResults(plan.spans.reducing())
        self.overflow: dict[str, int] = {}
        self.nonfinite: dict[str, int] = {}
        self.resumed, self.done, self.check = 0, 0, check
        self._folder, self._journal = folder, journal
        self._recorder: Recorder | None = None
        self._counting = threading.Lock()

    def begin(self, failed: Callable[[BaseException], None]) -> None:
        """Write what no tile covers: constants, and the zero rows at the end of matrices, where an earlier run may have left other bytes.

        Args:
            failed: told if the disk fails later; the run must then stop.
        """
        for constant in self.plan.constants:
            self._folder.write(self.plan.files[constant.file].name, constant.offset, constant.data)
            self.hashes.put(constant.file, constant.position, xxhash.xxh3_128(constant.data).digest())
        for matrix in self.plan.matrices.unfilled():
            for place in matrix.places:
                begin, end = place.extent(matrix.filled, matrix.rows - matrix.filled)
                self.done += end - begin
                for at in range(begin, end, memory.MIB):
                    self._folder.write(self.plan.files[matrix.file].name, at, bytes(min(memory.MIB, end - at)))
        if self._journal is not None and isinstance(self._folder, OutputFolder):
            self._recorder = Recorder(self._journal, self._folder, failed)
            self._recorder.start()

    def _tasks(self, span: int) -> Mapping[EncodeTask, list[Destination]]:
        return encode_tasks(self.plan.spans[span], self.plan.matrices)

    def judge(self, span: RowRange, encoded: Encoded) -> None:
        """Values that would ruin the checkpoint stop the conversion; counts what was found."""
        _judge(self.plan, span, encoded)
        self._count(span.source.name, encoded.stats.overflow, encoded.stats.nonfinite)

    def write(self, dest: Destination, row: int, rows: int, parts: Sequence[Bytes]) -> int:
        """Write the parts of output rows [row, row + rows); gives how many bytes."""
        matrix = self.plan.matrices[dest.matrix]
        name = self.plan.files[matrix.file].name
        for place, part in zip(matrix.places, parts, strict=True):
            self._folder.write(name, place.extent(row, rows)[0], part.data)
        self._written(dest.matrix, rows)
        return sum(part.size for part in parts)

    def _written(self, number: int, rows: int) -> None:
        """Rows of a matrix are in its file; one whose rows came in any order is hashed when all of them are."""
        matrix = self.plan.matrices[number]
        with self._counting:
            self.done += sum(end - begin for begin, end in (place.extent(0, rows) for place in matrix.places))
        if not self.order.is_last(number, rows) or not isinstance(self._folder, OutputFolder):
            return
        read_into = functools.partial(self._folder.read_into, self.plan.files[matrix.file].name)
        for place in matrix.places:
            self.hashes.put(matrix.file, place.position, bytes.fromhex(hash_of(read_into, *place.extent(0, matrix.rows))))

    def record(
        self, task: Task, hashes: tuple[tuple[str, ...], ...], stats: EncodeStats, errors: tuple[tuple[float, ...], ...], written: int
    ) -> None:
        """All of a task is written: the journal gets a line when it is on the disk."""
        if self._recorder is not None:
            dests = self.plan.spans[task.share.span].dests
            files = {self.plan.files[self.plan.matrices.file(dest.matrix)].name for dest in dests}
            done = TileRecord(task.share.span, *task.rows(), hashes, stats.overflow, stats.nonfinite, errors)
            self._recorder.add(done, files, written)

    def verify_resumed_tile(self, done: TileRecord, buffer: Bytes) -> bool:
        """Take rows of an earlier run as they are, if their bytes are still those that were recorded.

        Args:
            buffer: uint8 of any size; a tile may be larger than it (an earlier run had another budget).

        Returns:
            False if anything differs: the tile must be done again. `order` has then not moved.
        """
        folder, span = self._folder, self.plan.spans[done.span]
        tasks = self.tasks(done.span)
        groups = list(tasks.values())
        known = self.check is None or self.check.knows(done, tasks)
        if not known or not isinstance(folder, OutputFolder) or len(groups) != len(done.hashes):
            return False
        rows, skipped = span.op.out_rows(done.stop - done.start), span.op.out_rows(done.start - span.start)

        def read(dest: Destination, part: int, digest: xxhash.xxh3_128) -> None:
            matrix = self.plan.matrices[dest.matrix]
            begin, end = matrix.places[part].extent(dest.row + skipped, rows)
            for at in range(begin, end, buffer.size):
                view = buffer.data[: min(buffer.size, end - at)]
                digest.update(view[: folder.read_into(self.plan.files[matrix.file].name, at, view)])

        for dests, hashes in zip(groups, done.hashes, strict=True):
            for dest in dests:
                if len(self.plan.matrices[dest.matrix].places) != len(hashes):
                    return False
                for part, recorded in enumerate(hashes):
                    digest = xxhash.xxh3_128()
                    read(dest, part, digest)
                    if digest.hexdigest() != recorded:
                        return False
        for dest in (dest for dests in groups for dest in dests if not self.order.is_loose(dest.matrix)):
            self.order.wait(dest.matrix, dest.row + skipped)
            for part, digest in enumerate(self.order.digests(dest.matrix)):
                read(dest, part, digest)
            self.order.passed(dest.matrix, dest.row + skipped, rows)
        if self.check is not None:
            self.check.resumed(done, groups)
        for dest in span.dests:
            self._written(dest.matrix, rows)
        with self._counting:
            self.resumed += 1
        self._count(span.source.name, done.overflow, done.nonfinite)
        return True

    def recorded(self, seconds: float) -> bool:
        """Record what is pending; False if that took longer than `seconds`."""
        if self._recorder is not None and not self._recorder.finish(seconds):
            return False
        self._recorder = None  # it knows the pool, which knows this: a cycle would keep the plan
        return True

    def warnings(self) -> list[str]:
        """What the values of the source mean for the output."""
        return value_warnings(self.plan, self.overflow, self.nonfinite)

    def stop(self) -> None:
        """Nobody waits any more."""
        self.order.stop()
        self.results.stop()

    def _count(self, name: str, overflow: int, nonfinite: int) -> None:
        with self._counting:
            for counts, count in ((self.overflow, overflow), (self.nonfinite, nonfinite)):
                if count:
                    counts[name] = counts.get(name, 0) + count


def value_warnings(plan: Plan, overflow: Mapping[str, int], nonfinite: Mapping[str, int]) -> list[str]:
    """What the values of the source mean for an output; see `OutputState`."""
    lines = [f"{name}: {count} values are too large for {plan.dtype.torch} and became infinite" for name, count in overflow.items()]
    return lines + [f"{name}: {count} NaN or infinite values were quantized" for name, count in nonfinite.items()]


def _judge(plan: Plan, span: RowRange, encoded: Encoded) -> None:
    """Look at a tile before it is written.

    Raises:
        DataError: names the tensor, the value and what it follows from.
    """
    name, matrix, codec, stats = printable(span.source.name), plan.matrices[encoded.dests[0].matrix], encoded.task.codec, encoded.stats
    if stats.nonfinite and codec.quantizes and not plan.target.allow_nonfinite:
        raise DataError(
            f"{name}: NaN or infinity in a weight that is to be quantized",
            hint="--allow-nonfinite quantizes them: NaN becomes 0, infinity the largest finite value of its channel",
        )
    if stats.overflow and codec.computed:
        message = f"{stats.overflow} values of {name} become infinite"
        raise DataError(f"{matrix.places[0].tensor}: {message}", hint=codec.cause() or None)
    for place, part, data in zip(matrix.places, encoded.task.parts, encoded.parts, strict=True):
        problem = factors.problem(place.tensor, part.dtype, data, matrix.rows == matrix.cols == 1)
        if problem:
            raise DataError(f"{problem}, from {name}", hint=codec.cause() or None)
