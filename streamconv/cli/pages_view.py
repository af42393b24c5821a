"""--report: the facts of a page, from what a command knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamconv.cli import recipe
from streamconv.cli.watching import Watched, command_line
from streamconv.pages import runs
from streamconv.pages.page import Page

if TYPE_CHECKING:
    from streamconv.options import Resources
    from streamconv.targets.base import Output
    from streamconv.verification.verdict import Verdict


def planned(model: str, outputs: Sequence[Output], asked: Resources, several: bool) -> tuple[list[runs.Planned], str]:
    """Plan a conversion; what its page needs of each output, and the recipe."""
    from streamconv.open_plan import open_and_plan_all

    index, plans = open_and_plan_all(model, outputs, asked.memory_budget)
    with index:
        return [runs.planned(plan) for plan in plans], recipe.of_plans(model, outputs, plans, {}, index, several)


def conversion(model: str, report: Any, facts: tuple[list[runs.Planned], str], watched: Watched, least: float | None) -> Page:
    """The page of `convert`."""
    return runs.conversion(model, report, *facts, watched.samples, command_line(), least)


def verification(out: str, source: str | None, verdict: Verdict, watched: Watched) -> Page:
    """The page of `verify`."""
    return runs.verification(out, source, verdict, watched.samples[-1].time, watched.samples, command_line())


def calibration(model: str, told: Mapping[str, Any], text: str, watched: Watched) -> Page:
    """The page of `calibrate`."""
    return runs.calibration(model, told, _inputs(str(told["out"])), text, watched.samples, command_line())


def _inputs(ranges: str) -> Iterator[tuple[str, float]]:
    """(module, largest absolute input) of a file of activation ranges."""
    from streamconv.checkpoint.activation_ranges import Ranges
    from streamconv.checkpoint.header import read_header

    held = Ranges(ranges)
    for name in read_header(ranges).tensors:
        if name.endswith(".x"):
            yield name[:-2], float(held.vector(name).max())
