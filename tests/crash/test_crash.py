"""Small counts of every crash test; `python tests/crash/full.py` runs the full ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.crash import faults, flips, intruders, kills, powercut, processes
from tests.crash.kills import Count
from tests.crash.world import World, fast_folder

MakeWorld = Callable[..., World]


KINDS = pytest.mark.parametrize(
    "settings",
    [{}, {"replaced": True}, {"mounted": True, "tile_rows": 1000}, {"mounted": True, "replaced": True, "tile_rows": 1000}],
    ids=["new", "replaced", "mounted", "mounted, replaced"],
)


def more(quick: int, slow: int, name: str = "step") -> pytest.MarkDecorator:
    """A count for every day, and a larger one for `make test-all`."""
    return pytest.mark.parametrize(name, [quick, pytest.param(slow, marks=pytest.mark.slow)])


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes a World (or what `kind` is) in a folder that goes with the test."""
    roots = []

    def build(kind: Callable[..., Any] = World, **settings: object) -> Any:
        roots.append(fast_folder())
        return kind(roots[-1], **settings)

    yield build
    for root in roots:
        shutil.rmtree(root)


def good(count: Count, least: int) -> None:
    assert not count.wrong, "\n".join(count.wrong[:10])
    assert count.cases >= least, count


@KINDS
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_operation_any_number_of_times(make: MakeWorld, settings: dict[str, Any]) -> None:
    count = kills.every_state(make(**settings))
    good(count, 200)
    assert count.facts["closed"], "states were left to look at"


def test_killed_twice_while_a_mounted_output_is_replaced(make: MakeWorld) -> None:
    """The state in which the most can be lost: old and new lie in one folder, and only the journal tells which is which."""
    good(kills.every_state(make(mounted=True, replaced=True, tile_rows=1000), depth=2), 100)


def test_killed_at_every_operation_int8_on_two_ranks(make: MakeWorld) -> None:
    good(kills.every_state(make(quant="int8", tp=2, tile_rows=128), depth=1), 100)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sigkill_at_every_operation(make: MakeWorld) -> None:
    good(kills.real_kills(make(), depth=2), 100)


def test_sigkill_at_random_moments(make: MakeWorld) -> None:
    count = processes.random_kills(make(processes.Runs, megabytes=32), 8)
    good(count, 8)
    assert count.facts["killed"] >= 8, count  # the first of each round at least: nothing is left of it to resume
    assert count.facts["journals"] >= 2, count


@KINDS
@more(14, 8)
def test_every_operation_fails(make: MakeWorld, settings: dict[str, Any], step: int) -> None:
    """By default each in one of the 14 ways."""
    good(faults.every_operation(make(**settings), step), 960 // step)


@KINDS
@more(40, 20)
def test_intruders_between_any_two_operations(make: MakeWorld, settings: dict[str, Any], step: int) -> None:
    good(intruders.every_operation(make(**settings | {"tile_rows": 1000}), step), 1600 // step)


@KINDS
@more(150, 300, name="wanted")
def test_power_cuts(make: MakeWorld, settings: dict[str, Any], wanted: int) -> None:
    count = powercut.cuts(make(**settings), wanted)
    good(count, wanted)
    assert count.facts["distinct"] >= 50, count


def test_lock_races(make: MakeWorld) -> None:
    count = processes.lock_races(make(processes.Runs, megabytes=8), 4)
    good(count, 4)
    assert count.facts["locked out"] >= 4, count
    assert count.facts["holders killed"] >= 1, count


def test_flipped_bits_are_found(make: MakeWorld) -> None:
    good(flips.flips(make(), 500), 500)


def test_same_bytes_for_any_resources_and_interruptions(make: MakeWorld) -> None:
    good(flips.matrix(make()), 54)
