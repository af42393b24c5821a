"""The pipeline of one device: tiles are copied in, encoded and copied out on streams of their own, while others are read and written.

    worker    reads into its pinned arena              ... hashes and writes from it
    streams   copy in (1) -> compute (COMPUTE_STREAMS) -> copy out (1)  ordered by events, per device

A worker has two device buffers: while one is computed, the next rows are copied into the other. Rows are copied in once,
however many matrices want them and however small the steps become in which they are computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from streamconv.device.backend import Backend
from streamconv.device.sizing import BUFFERS, COMPUTE_STREAMS, Sizes
from streamconv.device.step import NOTE, Batch, Job, lay_out
from streamconv.device.triton_launch import Unfused, abandon
from streamconv.errors import StreamconvError
from streamconv.lazy import Bytes, torch
from streamconv.planning.plan import RowRange
from streamconv.quants.base import FinishedReductions

_PATIENCE = (0.05, 0.1, 0.2, 0.4)
"""Seconds to wait for memory, time after time, when even the smallest step finds none."""

_SMALL = 64 * 1024
"""Source bytes that other tiles' steps are not halved below: what is smaller says nothing about them."""

_NOTES = 4096
"""Bytes of a slot for stats of fused kernels: int32 [2] for each encoding of a tile."""

_CALM = 64
"""Steps that must succeed before halved ones grow again."""


class DeviceLost(StreamconvError):
    """The device stopped working, or has no memory even for the smallest step. What is finished is kept.

    Attributes:
        gone: it will not answer again in this process.
        pinned: bytes of host memory that the run had pinned.
    """

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone, self.pinned = gone, 0


class DevicePipeline:
    """One device. Workers take a `slot` each; streams and the step size are shared.

    Attributes:
        halvings: how often the device was full and steps were halved.
        step: source bytes computed at once.
        uploads: how many copies to the device were started, and of how many bytes.
        unfused: why the torch definitions run where fused kernels could ("": nobody need know), None if these do.
    """

    def __init__(self, backend: Backend, sizes: Sizes) -> None:
        self.backend, self.sizes = backend, sizes
        self.halvings, self.uploads, self.uploaded = 0, 0, 0
        self.copy_in, self.copy_out = backend.stream(), backend.stream()
        self.lanes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(min(COMPUTE_STREAMS, sizes.slots)):
            self.lanes.put(backend.stream())
        self._lock = threading.Lock()
        self._arenas: list[torch.Tensor] | None = []
        self.step, self._good = sizes.chunk, 0
        self.unfused = backend.unfused()
        backend.limit(sizes.room)

    def close(self) -> None:
        """Give all memory back; workers must be done. Never an error: the device may be gone."""
        with self._lock:
            self._arenas = [] if self._arenas is not None else None
        for give_back in (self.backend.relieve, lambda: self.backend.limit(None)):
            with contextlib.suppress(Exception):
                give_back()

    def pinned(self, arena: torch.Tensor) -> None:
        """A slot has this arena."""
        with self._lock:
            if self._arenas is not None:
                self._arenas.append(arena)
            else:
                _keep_for_ever(arena)

    def lost(self) -> None:
        """The device is gone: torch would ask it before it frees pinned memory, and end the process."""
        abandon()
        with self._lock:
            for arena in self._arenas or ():
                _keep_for_ever(arena)
            self._arenas = None

    def slot(self, arena: int) -> WorkerBuffers:
        """A worker's place, with `arena` bytes of pinned memory."""
        return WorkerBuffers(self, arena)

    def halve(self, size: int) -> None:
        """A step of `size` source bytes was too much."""
        with self._lock:
            self.halvings += 1
            self.step, self._good = min(self.step, max(_SMALL, size // 2)), 0
        self.backend.relieve()

    def good(self) -> None:
        with self._lock:
            self._good += 1
            if self._good >= _CALM and self.step < self.sizes.chunk:
                self.step, self._good = min(self.sizes.chunk, 2 * self.step), 0

    def sent(self, size: int) -> None:
        with self._lock:
            self.uploads, self.uploaded = self.uploads + 1, self.uploaded + size


class WorkerBuffers:
    """One worker's part of a pipeline: a pinned arena and BUFFERS device buffers.

    Attributes:
        arena: uint8, pinned; what is read, and what was encoded, lies in it.
    """

    def __init__(self, pipeline: DevicePipeline, arena: int) -> None:
        self.pipeline, self._backend = pipeline, pipeline.backend
        try:
            self._pinned = self._backend.alloc_pinned(arena)
            self._notes = self._backend.alloc_pinned(2 * _NOTES).zero_()  # zeros to send, and what comes back
        except Exception as error:
            if not self._backend.is_full(error) and not self._backend.is_lost(error):
                raise
            problem = f"{self._backend.name}: no pinned host memory: {str(error).splitlines()[0]}"
            raise DeviceLost(problem, gone=self._backend.is_lost(error)) from error
        pipeline.pinned(self._pinned)
        pipeline.pinned(self._notes)
        self.arena: Bytes = self._pinned.numpy()
        self._buffers: list[torch.Tensor] = []
        self._counts: torch.Tensor | None = None

    def encode(self, jobs: Sequence[Job], span: RowRange, rows: int, block: Bytes, out_arena: Bytes) -> Bytes:
        """`stages.encode.encode` for all jobs of a tile; the same bytes. When it returns, all of them are in the arena.

        Args:
            rows: output rows, whose `span.row_bytes` source bytes each are in `block`.
            out_arena: where the parts go; both are views of `arena`.

        Returns:
            What is left of `out_arena`.

        Raises:
            DeviceLost: the device does not answer any more, or is full even for the smallest step.
        """
        out_arena = lay_out(jobs, rows, out_arena)
        try:
            self._encode(jobs, span, rows, block, _NOTES // NOTE if self.pipeline.unfused is None else 0)
        except Unfused as error:
            self.pipeline.unfused = str(error)
            self._encode(jobs, span, rows, block, 0)
        return out_arena

    def _encode(self, jobs: Sequence[Job], span: RowRange, rows: int, block: Bytes, fusable: int) -> None:
        batch = Batch(jobs, span, fusable)

        def keep(first: int, take: int, result: Any) -> Any:
            outs, stats = result
            return [(self._host(place), part) for place, part in zip(batch.places(first, take, stats), outs, strict=True)]

        align = span.op.out_rows(span.align)
        self._each(span, rows, align, block, lambda matrix: batch.work(matrix, self._counts), keep, batch.notes)
        if batch.notes:
            batch.count(self._notes[_NOTES:][: batch.notes].numpy())

    def reduce(self, span: RowRange, rows: int, block: Bytes, known: FinishedReductions) -> torch.Tensor:
        """`span.reduce.tile` of a tile, on the CPU. Raises what `encode` does."""
        if span.reduce is None:
            raise AssertionError(f"{span.source.name}: nothing to reduce")
        reduction, maxima = span.reduce, list[torch.Tensor]()
        for key in reduction.needs:
            known.get(key)  # wait for others here: whoever waits inside a lane keeps it from them

        def keep(first: int, take: int, result: torch.Tensor) -> Any:
            maxima.append(result)
            return []

        self._each(span, rows, span.align, block, lambda matrix: reduction.tile(matrix, known).cpu(), keep)
        largest = maxima[0]
        for other in maxima[1:]:
            largest = torch.maximum(largest, other)
        return largest

    def _each(self, span: RowRange, rows: int, align: int, block: Bytes, work: Any, keep: Any, notes: int = 0) -> None:
        """Copy the rows in, half by half; work on each; copy out what `keep` names and `notes` bytes of counts; wait for all of it."""
        pending: list[tuple[Any, Any]] = []
        try:
            self._allocate(align * span.row_bytes)
            if notes:
                if self._counts is None:
                    self._counts = self._backend.alloc_device(_NOTES)
                self._backend.copy([(self._counts[:notes], self._notes[:notes])], self.pipeline.copy_in)
            whole = max(align, self._buffers[0].numel() // span.row_bytes // align * align)
            whole = -(-rows // -(-rows // whole) // align) * align  # halves of a kind
            starts = list(range(0, rows, whole))
            ready: list[Any] = [self._send(0, span, block, 0, min(whole, rows)), None]
            busy: list[Any] = [None] * BUFFERS
            for turn, first in enumerate(starts):
                half = turn % BUFFERS
                if turn + 1 < len(starts):
                    other = (turn + 1) % BUFFERS
                    if busy[other] is not None:
                        self._backend.wait(busy[other])
                        pending = [entry for entry in pending if entry[1] is not busy[other]]
                    after = starts[turn + 1]
                    ready[other] = self._send(other, span, block, after, min(whole, rows - after))
                busy[half] = self._compute(half, ready[half], span, first, min(whole, rows - first), align, work, keep, pending)
            if notes and self._counts is not None:  # the copies out before it have waited for every step
                self._backend.copy([(self._notes[_NOTES:][:notes], self._counts[:notes])], self.pipeline.copy_out)
                pending.append((None, self._backend.record(self.pipeline.copy_out)))
            for _, event in pending:
                self._backend.wait(event)
        except Exception as error:
            self._drain(pending)
            if self._backend.is_full(error):
                raise DeviceLost(f"{self._backend.name} has no memory left for the smallest tile") from error
            if self._backend.is_lost(error):
                self.pipeline.lost()
                raise DeviceLost(f"{self._backend.name} stopped working: {str(error).splitlines()[0]}", gone=True) from error
            raise

    def _allocate(self, least: int) -> None:
        """The device buffers, once; smaller ones if somebody else has taken the memory meanwhile."""
        size = max(self.pipeline.sizes.chunk, least)
        if self._buffers and self._buffers[0].numel() >= least:
            return
        self._buffers = []
        while True:
            try:
                self._buffers = [self._backend.alloc_device(size) for _ in range(BUFFERS)]
                return
            except Exception as error:
                self._buffers = []
                if not self._backend.is_full(error) or size <= least:
                    raise
            self.pipeline.halve(size)
            size = max(least, size // 2)

    def _send(self, half: int, span: RowRange, block: Bytes, first: int, take: int) -> Any:
        source = self._host(block[first * span.row_bytes : (first + take) * span.row_bytes])
        self._backend.copy([(self._buffers[half][: source.numel()], source)], self.pipeline.copy_in)
        self.pipeline.sent(source.numel())
        return self._backend.record(self.pipeline.copy_in)

    def _compute(
        self, half: int, ready: Any, span: RowRange, first: int, rows: int, align: int, work: Any, keep: Any, pending: list[tuple[Any, Any]]
    ) -> Any:
        """Rows [first, first+rows) of the tile, which lie in buffer `half`; gives the event of their last copy out."""
        data = self._buffers[half][: rows * span.row_bytes]
        matrix = data.view(getattr(torch, span.source.dtype.torch)).reshape(rows, span.source.cols)
        at, event, limit, waits = 0, None, self.pipeline.step, iter(_PATIENCE)
        while at < rows:
            take = min(max(align, limit // span.row_bytes // align * align), rows - at)
            lane = self.pipeline.lanes.get()
            try:
                self._backend.follow(lane, ready)
                part = matrix[at : at + take]
                result = self._backend.run(lane, lambda part=part: work(part))  # type: ignore[misc]
                done = self._backend.record(lane)
            except Exception as error:
                pause = next(waits, None) if take <= align else 0.0
                if not self._backend.is_full(error) or pause is None:
                    raise
                failed = True
            else:
                failed, pause = False, 0.0
            finally:
                self.pipeline.lanes.put(lane)
            if failed:
                for _, waiting in pending:  # their outputs take room too
                    self._backend.wait(waiting)
                pending.clear()
                self.pipeline.halve(take * span.row_bytes)
                limit = take * span.row_bytes // 2
                time.sleep(pause or 0.0)
                continue
            self.pipeline.good()
            copies = keep(first + at, take, result)
            self._backend.follow(self.pipeline.copy_out, done)
            self._backend.copy(copies, self.pipeline.copy_out)
            event = self._backend.record(self.pipeline.copy_out)
            pending.append((copies, event))  # what is copied must live until it is
            del result, copies
            while len(pending) > BUFFERS:
                self._backend.wait(pending.pop(0)[1])
            at += take
        return event

    def _drain(self, pending: list[tuple[Any, Any]]) -> None:
        """Nothing may still be copied from or to the arena when an error leaves it."""
        for stream in (self.pipeline.copy_in, self.pipeline.copy_out):
            try:
                self._backend.wait(self._backend.record(stream))
            except Exception:
                return  # the device is gone, and its copies with it
        pending.clear()

    def _host(self, view: Bytes) -> torch.Tensor:
        """The pinned tensor of a view of the arena."""
        at = view.__array_interface__["data"][0] - self._pinned.data_ptr()
        if not 0 <= at <= self._pinned.numel() - view.size:
            raise AssertionError("a block outside the pinned arena")
        return self._pinned[at : at + view.size]


def _keep_for_ever(tensor: torch.Tensor) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))
