"""Open a source and plan its conversion, inside the memory budget."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from streamconv import hub, memory
from streamconv.checkpoint.index import Index, description_size
from streamconv.errors import BudgetError, StreamconvError, printable
from streamconv.memory import without_collection
from streamconv.planning.plan import Plan
from streamconv.run.source_record import record_of
from streamconv.targets.base import Output, Target

_LOADS = {"numpy": 30 * memory.MIB, "llvmlite": 80 * memory.MIB, "numba": 80 * memory.MIB, "torch": 300 * memory.MIB}
"""Bytes that loading a library takes, what comes with it included (measured, rounded up); a run measures its own."""
KERNELS = ("llvmlite", "numba")
"""What compiled kernels need; the second only where one is not on the disk yet."""
_LITTLE = 64 * memory.MIB
"""Bytes that planning may take whatever the budget is; Python and the headers of nearly every model take less together."""
_UNSEEN = 16 * memory.MIB
"""What planning may take without being counted apart: tiles have more beside them."""


def loading(*libraries: str) -> int:
    """Bytes that loading these takes, as far as they are not loaded."""
    return sum(_LOADS[name] for name in libraries if name not in sys.modules)


def open_and_plan(
    source: str | Path, target: Target, budget: int | None = None, opened: Callable[[Index], object] | None = None
) -> tuple[Index, Plan]:
    """As `open_and_plan_all`, for one output."""
    index, (plan,) = open_and_plan_all(source, (Output("", target),), budget, opened)
    return index, plan


def open_and_plan_all(
    source: str | Path, outputs: Sequence[Output], budget: int | None = None, opened: Callable[[Index], object] | None = None
) -> tuple[Index, list[Plan]]:
    """Read the headers of a source, once, and plan its conversion into each output. No weight is read.

    Args:
        outputs: errors name the folder, if there are several.
        budget: bytes that the process may take; planning itself stops before it takes more.
        opened: told of the source before it is planned.

    Raises:
        BudgetError: the headers alone do not fit.
    """
    before, plans = memory.peak_resident(), list[Plan]()
    with without_collection(), _bounded(source, [output.target for output in outputs], budget):
        stored = hub.open_stored(source)
        try:
            if opened is not None:
                opened(stored)
            index = stored
            if not all(output.target.raw_names for output in outputs):
                from streamconv.families.naming import settle

                index = settle(stored)
            for output in outputs:
                try:
                    plans.append(output.target.plan(stored if output.target.raw_names else index))
                except StreamconvError as error:
                    if len(outputs) > 1:
                        error.about(f"output {printable(output.out)}")
                    raise
            record = record_of(stored)
        except BaseException:
            stored.close()
            raise
    peak = memory.peak_resident()
    peak = peak if peak - before > _UNSEEN else 0  # less is within the margin
    checked, more = (record.nbytes, record.warnings()) if record is not None else (0, ())
    return index, [dataclasses.replace(plan, peak=peak, bytes_checked=checked, warnings=(*plan.warnings, *more)) for plan in plans]


@contextlib.contextmanager
def _bounded(source: str | Path, targets: Sequence[Target], budget: int | None) -> Iterator[None]:
    """Planning stops before it breaks the budget, unless it takes little anyway: the plan then tells the smallest budget there is."""
    description = description_size(Path(source)) if budget is not None else 0
    files = sum(getattr(target, "tp_size", 1) * getattr(target, "pp_size", 1) for target in targets)
    enough = memory.resident() + (3 + 3 * files) * description
    with memory.bounded(None if budget is None or enough <= max(budget, memory.resident() + _LITTLE) else budget):
        try:
            yield
        except BudgetError as error:
            error.hint = f"a budget of {-(-(enough + loading(*_LOADS)) // memory.MIB)}MiB is enough to plan it and to begin"
            raise
