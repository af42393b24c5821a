"""--report: the facts of a page, from what a command knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from streamconv.cli import recipe_option
from streamconv.cli.watching import Watched, command_line
from streamconv.pages import runs
from streamconv.pages.page import Page

if TYPE_CHECKING:
    from streamconv.options import Resources
    from streamconv.targets.base import Target
    from streamconv.verification.verdict import Verdict


def planned(model: str, out: str, wanted: Target, asked: Resources) -> runs.Planned:
    """Plan a conversion and keep what its page needs."""
    from streamconv import api

    index, plan = api.open_and_plan(model, wanted, asked.memory_budget)
    with index:
        recipe = recipe_option.text(model, out, plan.target, {}, index)
    return runs.planned(plan, recipe)


def conversion(model: str, report: Any, facts: runs.Planned | None, watched: Watched, least: float | None) -> Page:
    """The page of `convert`."""
    return runs.conversion(model, report, facts, watched.samples, command_line(), least)


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
