"""Rank arithmetic and slices: worked out by hand."""

import pytest

from streamconv.targets.trtllm.parallel import ParallelMapping, even, kv_heads, padded, stage_layers


def test_tensor_parallel_is_the_fastest_index() -> None:
    ranks = ParallelMapping(2, 2, 2, 1).ranks()
    assert [(r.file, r.tp, r.pp) for r in ranks] == [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]


def test_expert_grid_of_a_rank() -> None:
    rank = ParallelMapping(4, 1, 2, 2).ranks()[3]
    assert (rank.moe_tp, rank.moe_ep) == (1, 1)


@pytest.mark.parametrize(
    ("kv", "tp", "rank", "expected"),
    [(8, 2, 1, (4, 8)), (2, 2, 1, (1, 2)), (2, 4, 1, (0, 1)), (2, 4, 2, (1, 2)), (1, 8, 7, (0, 1))],
)
def test_kv_heads_of_a_rank(kv: int, tp: int, rank: int, expected: tuple[int, int]) -> None:
    assert kv_heads(kv, tp, rank) == expected


def test_two_heads_on_eight_ranks_are_shared_by_neighbours() -> None:
    assert [kv_heads(2, 8, rank)[0] for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("vocab", "expected"),
    [(10, [(0, 3), (3, 6), (6, 9), (9, 10)]), (5, [(0, 2), (2, 4), (4, 5), (5, 5)])],
)
def test_vocabulary_rows_before_padding(vocab: int, expected: list[tuple[int, int]]) -> None:
    assert [padded(vocab, 4, rank) for rank in range(4)] == expected


def test_uneven_pipeline_gives_the_first_stages_more() -> None:
    assert stage_layers(10, 4, "1.2") == [range(0, 3), range(3, 6), range(6, 8), range(8, 10)]
    assert stage_layers(8, 4, "0.16") == stage_layers(8, 4, "1.2")


def test_even_slices() -> None:
    assert even(12, 3, 2) == (8, 12)
