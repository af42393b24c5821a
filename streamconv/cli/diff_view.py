"""What `streamconv diff` prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from streamconv.cli import output
from streamconv.cli.view import table
from streamconv.errors import printable
from streamconv.verification.difference import Comparison, TensorDifference

WORST = 10
"""Tensors that are shown."""


def show(made: Comparison, tolerance: float | None, as_json: bool, quiet: bool, every: bool) -> None:
    """Print a comparison: the worst tensors and the totals.

    Args:
        every: show every tensor in natural order, not the worst that differ.
    """
    good = made.within(tolerance)
    if as_json:
        told = {"within": good, "tolerance": tolerance, "warnings": made.warnings, "beside": made.beside}
        output.dump_long(told, "tensors", (dataclasses.asdict(tensor) for tensor in made.tensors), _counts(made))
        return
    for warning in made.warnings:
        output.note(f"warning: {warning}")
    if quiet:
        return
    different = sorted((tensor for tensor in made.tensors if tensor.state != "exact"), key=_badness)
    shown = made.tensors if every else different[:WORST]
    if shown:
        rows = [_row(tensor) for tensor in shown]
        output.block(table(rows, ("tensor", "state", "dtype", "shape", "values", "max error", "relative", "SNR dB")))
    output.block(_summary(made, tolerance, good, len(different) - len(shown)))


def _badness(tensor: TensorDifference) -> tuple[int, float]:
    """Smaller is worse; sorting keeps the natural order among equals."""
    order = {"only in A": 0, "only in B": 0, "shape": 1, "differs": 3, "dtype": 4, "exact": 5}
    snr = math.inf if tensor.snr_db is None else tensor.snr_db
    return (2 if tensor.odd else order[tensor.state], snr if tensor.differing else math.inf)


def _row(tensor: TensorDifference) -> tuple[str, ...]:
    dtypes, shapes = tensor.dtypes, tuple(None if s is None else "x".join(map(str, s)) or "scalar" for s in tensor.shapes)
    cells = [printable(tensor.name, 80), tensor.state, _both(dtypes), _both(shapes)]
    if tensor.state not in ("differs", "dtype", "exact"):
        return (*cells, "", "", "", "")
    odd = f" ({tensor.odd} not finite)" if tensor.odd else ""
    snr = "exact" if not tensor.differing else "-" if tensor.snr_db is None else f"{tensor.snr_db:.1f}"
    return (*cells, f"{tensor.differing}{odd}", f"{tensor.largest:.3g}", f"{tensor.relative:.3g}", snr)


def _both(pair: tuple[str | None, ...]) -> str:
    first, second = pair
    return first if first == second and first is not None else f"{first or '-'} / {second or '-'}"


def _summary(made: Comparison, tolerance: float | None, good: bool, hidden: int) -> Iterator[str]:
    counts = _counts(made)
    told = [f"{counts['compared']} tensors compared, {counts['exact']} exact"]
    if counts["differ"]:
        snr = f", SNR at least {counts['snr_db']:.1f} dB" if counts["snr_db"] is not None else ""
        told.append(f"{counts['differ']} differ (max error {counts['largest']:.3g}{snr})")
    states = {"dtype": "with equal values of another dtype", "shape": "of another shape", "only_a": "only in A", "only_b": "only in B"}
    told += [f"{counts[key]} {text}" for key, text in states.items() if counts[key]]
    if made.beside:
        told.append(f"{made.beside} scales and zero points belong to weights whose values were compared")
    limit = "exact" if tolerance is None else f"within {tolerance:g}"
    more = f"; {hidden} more, --all shows every one" if hidden > 0 else ""
    yield f"{limit if good else f'not {limit}'}: {', '.join(told)}{more}"


def _counts(made: Comparison) -> dict[str, Any]:
    of = [tensor.state for tensor in made.tensors]
    found = {key: of.count(state) for key, state in _STATES.items()}
    ratios = [tensor.snr_db for tensor in made.tensors if tensor.snr_db is not None]
    return {
        "compared": sum(found[key] for key in ("exact", "differ", "dtype")),
        **found,
        "largest": max((tensor.largest for tensor in made.tensors), default=0.0),
        "snr_db": min(ratios, default=None),
    }


_STATES: dict[str, Any] = {"exact": "exact", "differ": "differs", "dtype": "dtype", "shape": "shape"} | {
    "only_a": "only in A",
    "only_b": "only in B",
}
