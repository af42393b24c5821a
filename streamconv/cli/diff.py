"""`streamconv diff`."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli import output, view
from streamconv.errors import UsageError, printable
from streamconv.memory import parse_size

if TYPE_CHECKING:
    from streamconv.verification.difference import Comparison, TensorDifference

WORST = 10
"""Tensors that are shown."""
_STATES = {"exact": "exact", "differ": "differs", "dtype": "dtype", "shape": "shape", "only_a": "only in A", "only_b": "only in B"}
"""Key of the totals -> state of a tensor."""


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--tolerance", type=float, metavar="ERROR", help="Largest absolute error of a value. Default: the same bits and dtypes.")
@click.option("--memory-budget", help="Ceiling of this process's memory, e.g. 2GiB. Default: from what is free.")
@click.option("--all", "every", is_flag=True, help="Show every tensor, not the worst ten that differ.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors and warnings only.")
def diff(a: str, b: str, tolerance: float | None, memory_budget: str | None, every: bool, as_json: bool, quiet: bool) -> int:
    """Compare the checkpoints A and B tensor by tensor; exit status 0 only if every tensor is within --tolerance.

    Both may be of any kind: a folder, a weight file, a model of the Hub. Weights of a quantized model are compared as values.
    """
    from streamconv.verification.difference import compare

    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise UsageError(f"--tolerance {tolerance:g} is no error", hint="a number from 0 on, e.g. 1e-3")
    comparison = compare(a, b, parse_size(memory_budget) if memory_budget else None, view.meter("auto", quiet or as_json))
    good = comparison.within(tolerance)
    if as_json:
        facts = {"within": good, "tolerance": tolerance, "warnings": comparison.warnings, "beside": comparison.beside}
        output.dump_long(facts, (dataclasses.asdict(tensor) for tensor in comparison.tensors), _counts(comparison))
    else:
        _show(comparison, tolerance, good, quiet, every)
    return 0 if good else 7


def _show(comparison: Comparison, tolerance: float | None, good: bool, quiet: bool, every: bool) -> None:
    """Print the worst tensors and the totals. `every`: show every tensor in natural order, not the worst that differ."""
    output.warn(comparison.warnings)
    if quiet:
        return
    different = sorted((tensor for tensor in comparison.tensors if tensor.state != "exact"), key=_badness)
    shown = comparison.tensors if every else different[:WORST]
    if shown:
        header = ("tensor", "state", "dtype", "shape", "values", "max error", "relative", "SNR dB")
        output.block(view.table([_row(tensor) for tensor in shown], header))
    output.line(_summary(comparison, tolerance, good, len(different) - len(shown)))


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


def _summary(comparison: Comparison, tolerance: float | None, good: bool, hidden: int) -> str:
    counts = _counts(comparison)
    parts = [f"{counts['compared']} tensors compared, {counts['exact']} exact"]
    if counts["differ"]:
        snr = f", SNR at least {counts['snr_db']:.1f} dB" if counts["snr_db"] is not None else ""
        parts.append(f"{counts['differ']} differ (max error {counts['largest']:.3g}{snr})")
    states = {"dtype": "with equal values of another dtype", "shape": "of another shape", "only_a": "only in A", "only_b": "only in B"}
    parts += [f"{counts[key]} {text}" for key, text in states.items() if counts[key]]
    if comparison.beside:
        parts.append(f"{comparison.beside} scales and zero points belong to weights whose values were compared")
    limit = "exact" if tolerance is None else f"within {tolerance:g}"
    more = f"; {hidden} more, --all shows every one" if hidden > 0 else ""
    return f"{limit if good else f'not {limit}'}: {', '.join(parts)}{more}"


def _counts(comparison: Comparison) -> dict[str, Any]:
    states: list[str] = [tensor.state for tensor in comparison.tensors]
    counts = {key: states.count(state) for key, state in _STATES.items()}
    ratios = [tensor.snr_db for tensor in comparison.tensors if tensor.snr_db is not None]
    return {
        "compared": sum(counts[key] for key in ("exact", "differ", "dtype")),
        **counts,
        "largest": max((tensor.largest for tensor in comparison.tensors), default=0.0),
        "snr_db": min(ratios, default=None),
    }
