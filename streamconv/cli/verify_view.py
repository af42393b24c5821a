"""What `streamconv verify` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import isinf

from streamconv.cli import output
from streamconv.cli.view import table
from streamconv.errors import shorten
from streamconv.natural import natural
from streamconv.verification.verdict import TensorError, Verdict

WORST = 10
"""Matrices whose error is shown."""


def show(out: str, verdict: Verdict, as_json: bool, quiet: bool, every: bool = False) -> None:
    """Print a verdict: problems and warnings to standard error, the rest to standard output.

    Args:
        every: show the error of every matrix, not that of the worst alone.
    """
    if as_json:
        output.dump(dataclasses.asdict(verdict) | {"ok": not verdict.problems, "values_checked": bool(verdict.hashed or verdict.encoded)})
        return
    for warning in verdict.warnings:
        output.note(f"warning: {warning}")
    if verdict.errors and not quiet:
        output.block(_errors(verdict.errors, every))
    for problem in shorten(verdict.problems):
        output.note(f"error: {problem}")
    if not quiet:
        checked = verdict.hashed or verdict.encoded
        good = "good" if checked else "structure good, values not checked"
        state = good if not verdict.problems else f"{len(verdict.problems)} problems"
        encoded = f", {verdict.encoded} equal to the source encoded again" if verdict.encoded else ""
        reader = f"; {verdict.reader}" if verdict.reader else ""
        files = f"{verdict.files} file{'s' * (verdict.files != 1)}"
        output.line(f"{out}: {state}; {files}, {verdict.tensors} tensors, {verdict.hashed} hashes equal{encoded}{reader}")


def _errors(errors: list[TensorError], every: bool) -> Iterator[str]:
    """How far values are from the source's: the worst matrices, or every one in the order of the layers; then all together."""
    ordered = sorted(errors, key=lambda e: (natural(e.file), natural(e.name)))
    if not every:
        ordered = sorted(ordered, key=lambda e: e.snr_db)[:WORST]
    rows = [(e.file, e.name, str(e.rows), f"{e.largest:.3g}", f"{e.relative:.3g}", _decibels(e.snr_db)) for e in ordered]
    yield from table(rows, ("file", "tensor", "rows", "max error", "relative", "SNR dB"))
    exact = sum(isinf(e.snr_db) for e in errors)
    largest, relative = max(e.largest for e in errors), max(e.relative for e in errors)
    worst = min(e.snr_db for e in errors)
    hidden = f"; the worst {len(ordered)} are shown, --all shows every one" if len(ordered) < len(errors) else ""
    yield (
        f"{len(errors)} matrices, {exact} exact: max error {largest:.3g}, relative {relative:.3g}, "
        f"SNR at least {_decibels(worst)}{'' if isinf(worst) else ' dB'}{hidden}"
    )


def _decibels(snr: float) -> str:
    return "exact" if isinf(snr) else f"{snr:.1f}"
