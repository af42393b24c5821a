"""What `streamconv verify` prints."""

from __future__ import annotations

import dataclasses
import sys

from streamconv.cli.view import dump, table
from streamconv.verify import Verdict


def show(out: str, verdict: Verdict, as_json: bool, quiet: bool) -> None:
    """Print a verdict: problems and warnings to standard error, the rest to standard output."""
    if as_json:
        dump(dataclasses.asdict(verdict) | {"ok": not verdict.problems, "values_checked": bool(verdict.hashed or verdict.errors)})
        return
    for warning in verdict.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if verdict.errors and not quiet:
        rows = [
            (e.file, e.name, f"{e.largest:.3g}", f"{e.relative:.3g}", "exact" if e.snr_db == float("inf") else f"{e.snr_db:.1f}")
            for e in verdict.errors
        ]
        print("\n".join(table(rows, ("file", "tensor", "max error", "relative", "SNR dB"))))
    for problem in verdict.problems:
        print(f"error: {problem}", file=sys.stderr)
    if not quiet:
        checked = verdict.hashed or verdict.errors
        good = "good" if checked else "structure good, values not checked"
        state = good if not verdict.problems else f"{len(verdict.problems)} problems"
        reader = f"; {verdict.reader}" if verdict.reader else ""
        print(f"{out}: {state}; {verdict.files} files, {verdict.tensors} tensors, {verdict.hashed} hashes equal{reader}")
