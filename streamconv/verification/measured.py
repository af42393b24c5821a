"""How far decoded values of an output are from the source's, for chosen rows of its matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.shard import Shard
from streamconv.lazy import np, torch
from streamconv.planning.plan import Destination, Plan, RowRange
from streamconv.quants.base import Codec, EncodeStats
from streamconv.run.order import ReductionResults

ELEMENT = 96
"""Working memory for each source element of a block that is measured, bytes."""


@dataclass(slots=True)
class Distance:
    """How far values are from those that they stand for.

    Attributes:
        signal, noise: sums of the squares of what is meant, and of the errors.
        peak, largest: the largest absolute value that is meant, and the largest error.
    """

    signal: float = 0.0
    noise: float = 0.0
    peak: float = 0.0
    largest: float = 0.0

    def snr(self) -> float:
        """Signal to noise in dB."""
        return decibels(self.signal, self.noise)

    def relative(self) -> float:
        return self.largest / self.peak if self.peak else 0.0


def decibels(signal: float, noise: float) -> float:
    """Of sums of squares."""
    return math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass(slots=True)
class Error(Distance):
    """How rows of a matrix compare with their source; elements that are not finite on either side count in `odd` and `wrong` only.

    Attributes:
        rows: how many were compared.
        within: no element is farther off than the encoding says it may be.
        wrong: elements that are not finite, on either side, and not what encoding the source gives.
        reached: the noise of our own encoding of the same rows.
    """

    rows: int = 0
    within: bool = True
    wrong: int = 0
    reached: float = 0.0

    def add(self, codec: Codec, part: Any, got: Any, cols: int) -> None:
        """Source rows [rows, cols] and what the output, whose matrix has `cols` columns, holds of them in float32."""
        self.rows += len(part)
        want = codec.values(part)
        parts = [data.reshape(-1).view(torch.uint8) for data in codec.encode(part, EncodeStats())]
        ours = codec.decode(parts, len(part), cols)
        fine = torch.isfinite(want) & torch.isfinite(got) & torch.isfinite(ours)
        same = (ours == got) | (torch.isnan(ours) & torch.isnan(got))
        self.wrong += int((~fine & ~same).sum())
        want, got, ours = (torch.where(fine, values, 0.0).double() for values in (want, got, ours))
        gap = got - want
        if not gap.numel():
            return
        bound = torch.nan_to_num(codec.error(part).expand(gap.shape).double(), nan=0.0, posinf=0.0)
        self.within = self.within and bool((gap.abs() <= bound).all())
        self.largest = max(self.largest, float(gap.abs().max()))
        self.noise += float((gap * gap).sum())
        self.reached += float(((ours - want) ** 2).sum())
        self.signal += float((want**2).sum())
        self.peak = max(self.peak, float(want.abs().max()))

    def best(self) -> float:
        """What our own encoding reaches on the same rows, dB."""
        return decibels(self.signal, self.reached)


def smallest(plan: Plan) -> int:
    """Working memory of the smallest block that can be measured of every matrix."""
    return max((span.align * span.source.cols * ELEMENT for span in plan.spans if span.dests), default=0)


def measure(
    plan: Plan,
    shards: Sequence[Shard],
    files: Sequence[Shard],
    results: ReductionResults,
    rows: Mapping[int, Sequence[tuple[int, int]]],
    memory: int,
) -> dict[int, Error]:
    """Decode rows of matrices and compare.

    Args:
        files: of the plan, with its places.
        rows: matrix -> ranges of its rows, ascending; more is done where rows belong together.
        memory: working memory to use.
    """
    from streamconv.run.encode import read_rows

    errors: dict[int, Error] = {}
    for span in plan.spans:
        step = max(span.align, memory // (span.source.cols * ELEMENT) // span.align * span.align)
        for dest in span.dests:
            matrix = plan.matrices[dest.matrix]
            ranges = _source_rows(span, dest, rows.get(dest.matrix, ()))
            for start, stop in [(at, min(at + step, last)) for first, last in ranges for at in range(first, last, step)]:
                buffer, scratch = (np.empty((stop - start) * size, np.uint8) for size in (span.row_bytes, span.scratch_row_bytes))
                block, count = read_rows(shards, span, start, stop, buffer, scratch), span.op.out_rows(stop - start)
                whole = torch.from_numpy(block).view(getattr(torch, span.source.dtype.torch)).reshape(count, span.source.cols)
                codec = matrix.codec.bind(results, span.source.name)
                got = decoded(plan, dest, span.op.out_rows(start - span.start), count, files, codec)
                part = torch.cat([whole[:, left:right] for left, right in dest.cols], 1)
                errors.setdefault(dest.matrix, Error()).add(codec, part, got, matrix.cols)
    return errors


def _source_rows(span: RowRange, dest: Destination, rows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Row ranges of a matrix as source rows of a span, whole blocks of rows."""
    ranges: list[tuple[int, int]] = []
    count = span.op.out_rows(span.stop - span.start)
    for first, last in rows:
        low, high = max(first - dest.row, 0), min(last - dest.row, count)
        if low >= high:
            continue
        low, high = span.op.source_rows(low) // span.align, -(-span.op.source_rows(high) // span.align)
        start, stop = span.start + low * span.align, min(span.start + high * span.align, span.stop)
        if ranges and start < ranges[-1][1]:
            start = ranges[-1][1]
        if start < stop:
            ranges.append((start, stop))
    return ranges


def decoded(plan: Plan, dest: Destination, skipped: int, rows: int, files: Sequence[Shard], codec: Codec | None = None) -> Any:
    """float32 [rows, cols] of a matrix, from the bytes of the output.

    Args:
        skipped: rows of the span's part of the matrix that come before.
        codec: bound to its reductions, where it has some.
    """
    matrix = plan.matrices[dest.matrix]
    parts = []
    for place in matrix.places:
        begin, end = place.extent(dest.row + skipped, rows)
        data = np.empty(end - begin, np.uint8)
        files[matrix.file].read_into(begin, data.data)
        parts.append(torch.from_numpy(data))
    return (codec or matrix.codec).decode(parts, rows, matrix.cols)
