"""Spans come so that every matrix gets its rows in order, whatever order the sources have them in."""

from __future__ import annotations

import dataclasses
import random

import pytest

from streamconv.checkpoint.dtypes import F16
from streamconv.checkpoint.rows import SourceTensor
from streamconv.planning.plan import PLAIN_ROWS, Destination, RowRange
from streamconv.planning.row_order import in_row_order

COLS = ((0, 8),)


def span(name: str, start: int, *dests: tuple[int, int], rows: int = 4) -> RowRange:
    source = SourceTensor(name, F16, (64, 8), ())
    return RowRange(source, start, start + rows, PLAIN_ROWS, tuple(Destination(matrix, row, COLS) for matrix, row in dests), 1)


def check(before: list[RowRange], after: list[RowRange]) -> None:
    """The same rows for the same matrices, each matrix's in order, and none needed twice at once."""
    flat = [[(s.source.name, s.start, s.stop, d) for s in spans for d in s.dests] for spans in (before, after)]
    assert sorted(flat[0], key=str) == sorted(flat[1], key=str)
    filled: dict[int, int] = {}
    for one in after:
        for dest in one.dests:
            assert filled.get(dest.matrix, -1) < dest.row
            filled[dest.matrix] = dest.row


def test_what_is_in_order_stays() -> None:
    spans = [span("a", 0, (0, 0), (1, 0)), span("b", 0, (0, 4)), span("a", 4, (1, 4))]
    assert in_row_order(spans) is spans


def test_a_shared_head_waits_for_both_ranks() -> None:
    """Fused q, k, v of two ranks that share a KV head: rank 1's query rows must come before the key rows of both."""
    spans = [span("qkv", 0, (0, 0)), span("qkv", 8, (0, 4), (1, 4)), span("qkv", 4, (1, 0))]
    ordered = in_row_order(spans)
    check(spans, ordered)
    assert [(one.start, len(one.dests)) for one in ordered] == [(0, 1), (4, 1), (8, 2)]


@pytest.mark.parametrize("twice", [False, True])
def test_opposite_orders_are_read_again(twice: bool) -> None:
    spans = [span("a", 0, (0, 0), (1, 4)), span("a", 4, (0, 4), (1, 0))]
    if twice:  # one span goes to one matrix twice, with other rows between
        spans = [span("a", 0, (0, 0), (0, 8)), span("a", 4, (0, 4))]
    ordered = in_row_order(spans)
    check(spans, ordered)
    assert all(len(one.dests) == 1 for one in ordered)


@pytest.mark.parametrize("seed", range(50))
def test_any_order(seed: int) -> None:
    pick = random.Random(seed)
    filled = [0] * 5
    spans = []
    for number in range(40):
        dests = []
        for matrix in pick.sample(range(5), pick.randint(1, 5)):
            dests.append((matrix, filled[matrix]))
            filled[matrix] += 4
        spans.append(span(pick.choice("abc"), 4 * number, *dests))
    shuffled = pick.sample(spans, len(spans))
    ordered = in_row_order(shuffled)
    check(shuffled, ordered)
    assert sum(len(one.dests) for one in ordered) > len(ordered)  # shared rows are still read once
    assert dataclasses.replace(spans[0]) in ordered
