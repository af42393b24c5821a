"""The order of a plan's spans."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace

from streamconv.planning.plan import RowRange


def in_row_order(spans: list[RowRange]) -> list[RowRange]:
    """The spans so ordered that every matrix gets its rows in order, even where the source's do not come so.

    A matrix is hashed while it is written, and a worker waits for the rows before its own: an order that breaks this would wait for
    ever. Where matrices want the same rows in opposite orders, each gets spans of its own, and those rows are read again.
    """
    places: dict[int, list[tuple[int, int]]] = {}  # matrix -> (row, number of the span)
    for number, span in enumerate(spans):
        for dest in span.dests:
            places.setdefault(dest.matrix, []).append((dest.row, number))
    if all(one < other and at < then for rows in places.values() for (one, at), (other, then) in itertools.pairwise(rows)):
        return spans
    before, after = [0] * len(spans), [list[int]() for _ in spans]
    for rows in places.values():
        for (_, one), (_, other) in itertools.pairwise(sorted(rows)):
            before[other] += 1
            after[one].append(other)
    ready = [number for number, count in enumerate(before) if not count]
    ordered: list[RowRange] = []
    while ready:  # the first in the source's order of those that may come
        number = heapq.heappop(ready)
        ordered.append(spans[number])
        for other in after[number]:
            before[other] -= 1
            if not before[other]:
                heapq.heappush(ready, other)
    if len(ordered) == len(spans):
        return ordered
    single = [replace(span, dests=(dest,)) for span in spans for dest in span.dests]
    return sorted(single, key=lambda span: (span.dests[0].matrix, span.dests[0].row))
