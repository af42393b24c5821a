"""Open a source and plan its conversion, inside the memory budget."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path

from streamconv import hub, memory
from streamconv.checkpoint.index import Index, description_size
from streamconv.errors import BudgetError
from streamconv.planning.plan import Plan
from streamconv.targets.base import Target

LOADS = {"numpy": 30 * memory.MIB, "numba": 166 * memory.MIB, "torch": 300 * memory.MIB}
"""Bytes that loading a library takes, compiled kernels and what comes with it included (measured, rounded up); a run measures its own."""
_LITTLE = 64 * memory.MIB
"""Bytes that planning may take whatever the budget is; Python and the headers of nearly every model take less together."""
_UNSEEN = 16 * memory.MIB
"""What planning may take without being counted apart: tiles have more beside them."""


def open_and_plan(source: str | Path, target: Target, budget: int | None = None) -> tuple[Index, Plan]:
    """Read the headers of a source and plan its conversion. No weight is read.

    Args:
        budget: bytes that the process may take; planning itself stops before it takes more.

    Raises:
        BudgetError: the headers alone do not fit.
    """
    before = memory.peak_resident()
    with without_collection(), _bounded(source, target, budget):
        index = hub.open_source(source, raw=target.raw_names)
        try:
            plan = target.plan(index)
        except BaseException:
            index.close()
            raise
    peak = memory.peak_resident()
    return index, dataclasses.replace(plan, peak=peak if peak - before > _UNSEEN else 0)  # less is within the margin


@contextlib.contextmanager
def _bounded(source: str | Path, target: Target, budget: int | None) -> Iterator[None]:
    """Planning stops before it breaks the budget, unless it takes little anyway: the plan then tells the smallest budget there is."""
    told = description_size(Path(source)) if budget is not None else 0
    enough = memory.resident() + (3 + 3 * getattr(target, "tp_size", 1) * getattr(target, "pp_size", 1)) * told
    with memory.bounded(None if budget is None or enough <= max(budget, memory.resident() + _LITTLE) else budget):
        try:
            yield
        except BudgetError as error:
            error.hint = f"a budget of {-(-(enough + sum(LOADS.values())) // memory.MIB)}MiB is enough to plan it and to begin"
            raise


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """A plan is a million small objects and no cycles: looking for some takes a third of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # both together: what was made is old now, and is not looked at again at once
        gc.enable()
