"""Whether an output that is there was made of these weights: some rows are encoded again, and compared.

The manifest tells the plan, which is the same for a fine-tune of the same shapes; `verify --source` compares all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamconv.checkpoint.shard import Shard
from streamconv.lazy import np
from streamconv.planning.plan import Plan, RowRange
from streamconv.planning.tasks import encode_tasks
from streamconv.quants.base import EncodeStats
from streamconv.run.encode import encode, read_rows
from streamconv.run.order import ReductionResults

MOST = 256
"""Spans that are looked at, spread over the plan."""


def is_of(plan: Plan, shards: Sequence[Shard], out: Path) -> bool:
    """The first rows of some matrices are what encoding the source gives. What needs a reduction is passed over.

    Raises:
        StreamconvError: the source cannot be read.
    """
    step, compared = max(1, len(plan.spans) // MOST), 0
    for number in range(0, len(plan.spans), step):
        span = plan.spans[number]
        if span.reduce is None and not any(plan.matrices.codec(dest.matrix).needs for dest in span.dests):
            if not _same(plan, shards, span, out):
                return False
            compared += 1
    return compared > 0


def _same(plan: Plan, shards: Sequence[Shard], span: RowRange, out: Path) -> bool:
    source_rows = min(span.align, span.stop - span.start)
    rows = span.op.out_rows(source_rows)
    buffer = np.empty(source_rows * span.row_bytes, np.uint8)
    scratch = np.empty(source_rows * span.scratch_row_bytes, np.uint8)
    block = read_rows(shards, span, span.start, span.start + source_rows, buffer, scratch)
    for task, dests in encode_tasks(span, plan.matrices).items():
        out_arena = np.empty(sum(task.row_costs(span)) * rows + 65536, np.uint8)
        made = encode(task.bound(ReductionResults(()), span.source.name), span, rows, block, out_arena, EncodeStats())
        for dest in dests:
            matrix = plan.matrices[dest.matrix]
            with open(out / plan.files[matrix.file].name, "rb") as file:
                for place, part in zip(matrix.places, made, strict=True):
                    file.seek(place.extent(dest.row, rows)[0])
                    if file.read(part.size) != part.tobytes():
                        return False
    return True
