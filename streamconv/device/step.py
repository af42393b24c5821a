"""What a step of a tile computes: every codec of its rows, by fused kernels where there are some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from streamconv.device import triton_launch as fused
from streamconv.lazy import Bytes, torch
from streamconv.planning.plan import RowRange
from streamconv.planning.tasks import EncodeTask
from streamconv.quants.base import EncodeStats

NOTE = 8
"""Bytes of the stats of a fused kernel: int32 [2]."""


@dataclass(slots=True)
class Job:
    """One encoding of a tile.

    Attributes:
        task: columns and codec, bound to its reductions.
        parts: set by `Slot.encode`: one uint8 view of the worker's arena for each part.
        stats: what was met.
    """

    task: EncodeTask
    parts: list[Bytes] = field(default_factory=list)
    stats: EncodeStats = field(default_factory=EncodeStats)


def lay_out(jobs: Sequence[Job], rows: int, out_arena: Bytes) -> Bytes:
    """Give all parts of `rows` rows their places in `out_arena`; what is left of it."""
    for job in jobs:
        for part in job.task.parts:
            size = part.nbytes(rows)
            job.parts.append(out_arena[:size])
            out_arena = out_arena[-(-size // 64) * 64 :]
    return out_arena


class Batch:
    """The encodings of one tile.

    Args:
        fusable: the first so many jobs may run fused kernels.

    Attributes:
        notes: bytes of the counts that fused kernels add to, 0 if none runs.
    """

    def __init__(self, jobs: Sequence[Job], span: RowRange, fusable: int) -> None:
        self.jobs = jobs
        self._launches = [fused.kernel_of(job.task.codec, span.source.dtype) if at < fusable else None for at, job in enumerate(jobs)]
        self.notes = NOTE * len(jobs) if any(self._launches) else 0
        for job in jobs:
            job.stats = EncodeStats()

    def work(self, matrix: torch.Tensor, counts: torch.Tensor | None) -> tuple[list[torch.Tensor], list[EncodeStats]]:
        """Encode a step's rows: all parts of all jobs, and what the torch definitions met."""
        outs_of: list[Sequence[torch.Tensor]] = []
        stats, waiting = [EncodeStats() for _ in self.jobs], []
        for job, launch, met in zip(self.jobs, self._launches, stats, strict=True):
            block = _columns(matrix, job.task)
            if launch is None:
                outs_of.append(job.task.codec.encode(block, met))
                continue
            waiting.append((len(outs_of), launch, block))
            sizes = [part.nbytes(matrix.shape[0]) for part in job.task.parts]
            outs_of.append([torch.empty(size, dtype=torch.uint8, device=matrix.device) for size in sizes])
        for number, launch, block in waiting:  # at last: a step that finds no memory is done again, and counted once
            assert counts is not None
            launch(block, outs_of[number], counts[NOTE * number : NOTE * (number + 1)].view(torch.int32))
        return [out for outs in outs_of for out in outs], stats

    def places(self, first: int, take: int, stats: Sequence[EncodeStats]) -> list[Bytes]:
        """Where the parts of rows [first, first + take) belong; `found` is counted."""
        for job, met in zip(self.jobs, stats, strict=True):
            job.stats.add(met)
        each = [(place, part, part.nbytes(first)) for job in self.jobs for place, part in zip(job.parts, job.task.parts, strict=True)]
        return [place[begin : begin + part.nbytes(take)] for place, part, begin in each]

    def count(self, notes: Bytes) -> None:
        """The counts of all steps, as they came back."""
        for (nonfinite, overflow), job, launch in zip(notes.view("i4").reshape(-1, 2).tolist(), self.jobs, self._launches, strict=True):
            if launch is not None:
                job.stats.add(EncodeStats(nonfinite, overflow))


def _columns(matrix: torch.Tensor, task: EncodeTask) -> torch.Tensor:
    pieces = [matrix[:, start:stop] for start, stop in task.cols]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
