"""What `streamconv verify` prints."""

from __future__ import annotations

import dataclasses
from math import isinf

from streamconv.cli import output
from streamconv.cli.view import table
from streamconv.errors import shorten
from streamconv.verification.verdict import Verdict


def show(out: str, verdict: Verdict, as_json: bool, quiet: bool) -> None:
    """Print a verdict: problems and warnings to standard error, the rest to standard output."""
    if as_json:
        output.dump(dataclasses.asdict(verdict) | {"ok": not verdict.problems, "values_checked": bool(verdict.hashed or verdict.encoded)})
        return
    for warning in verdict.warnings:
        output.note(f"warning: {warning}")
    if verdict.errors and not quiet:
        rows = [
            (e.file, e.name, str(e.rows), f"{e.largest:.3g}", f"{e.relative:.3g}", "exact" if isinf(e.snr_db) else f"{e.snr_db:.1f}")
            for e in verdict.errors
        ]
        output.block(table(rows, ("file", "tensor", "rows", "max error", "relative", "SNR dB")))
    for problem in shorten(verdict.problems):
        output.note(f"error: {problem}")
    if not quiet:
        checked = verdict.hashed or verdict.encoded
        good = "good" if checked else "structure good, values not checked"
        state = good if not verdict.problems else f"{len(verdict.problems)} problems"
        encoded = f", {verdict.encoded} equal to the source encoded again" if verdict.encoded else ""
        reader = f"; {verdict.reader}" if verdict.reader else ""
        output.line(f"{out}: {state}; {verdict.files} files, {verdict.tensors} tensors, {verdict.hashed} hashes equal{encoded}{reader}")
