"""Tiles of an earlier run: looked at, and taken as they are if their bytes are still those that were recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import xxhash

from streamconv.planning.plan import Destination, Plan
from streamconv.planning.tasks import encode_tasks
from streamconv.run.journal import JournalState, TileRecord
from streamconv.run.order import HashOrder
from streamconv.run.output_folder import OutputFolder

if TYPE_CHECKING:
    import numpy as np


def fitting(plan: Plan, past: JournalState) -> dict[int, list[TileRecord]]:
    """Span -> row ranges that a journal tells of, as far as they can be of this plan."""
    return {span: [done for done in tiles if _fits(plan, done)] for span, tiles in past.tiles.items()}


def _fits(plan: Plan, done: TileRecord) -> bool:
    """Whether a journal's line can be one of this plan: rows of a span that writes, cut where tiles are cut.

    A line that nobody wrote for this plan could make a worker wait for ever, or cut a tile where its layout does not allow it.
    """
    if done.span >= len(plan.spans):
        return False
    span = plan.spans[done.span]
    inside = span.reduce is None and span.start <= done.start < done.stop <= span.stop
    whole = not (done.start - span.start) % span.align and (done.stop == span.stop or not (done.stop - span.start) % span.align)
    return inside and whole


def verify_resumed_tile(plan: Plan, done: TileRecord, folder: OutputFolder, order: HashOrder, buffer: np.ndarray[Any, Any]) -> bool:
    """Hash a tile's bytes in the output files and compare; if all are right, feed them to the whole-tensor hashes.

    Args:
        buffer: uint8 of any size; a tile may be larger than it (an earlier run had another budget).

    Returns:
        False if anything differs: the tile must be done again. `order` has then not moved.
    """
    span = plan.spans[done.span]
    rows, skipped = span.op.out_rows(done.stop - done.start), span.op.out_rows(done.start - span.start)
    groups = list(encode_tasks(span, plan.matrices).values())
    if len(groups) != len(done.hashes):
        return False
    for dests, hashes in zip(groups, done.hashes, strict=True):
        for dest in dests:
            if len(plan.matrices[dest.matrix].places) != len(hashes):
                return False
            for part, wanted in enumerate(hashes):
                digest = xxhash.xxh3_128()
                _reread(plan, folder, dest, part, dest.row + skipped, rows, buffer, digest.update)
                if digest.hexdigest() != wanted:
                    return False
    for dest in (dest for dests in groups for dest in dests if not order.is_loose(dest.matrix)):
        order.wait(dest.matrix, dest.row + skipped)
        for part, digest in enumerate(order.digests(dest.matrix)):
            _reread(plan, folder, dest, part, dest.row + skipped, rows, buffer, digest.update)
        order.passed(dest.matrix, dest.row + skipped, rows)
    return True


def _reread(
    plan: Plan,
    folder: OutputFolder,
    dest: Destination,
    part: int,
    row: int,
    rows: int,
    buffer: np.ndarray[Any, Any],
    take: Callable[[memoryview], object],
) -> None:
    """Give `take` the bytes of a part of a matrix's output rows, as the file holds them."""
    matrix = plan.matrices[dest.matrix]
    place = matrix.places[part]
    begin, end = place.extent(row, rows)
    for at in range(begin, end, buffer.size):
        view = buffer.data[: min(buffer.size, end - at)]
        take(view[: folder.read_into(plan.files[matrix.file].name, at, view)])
