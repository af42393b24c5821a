"""`streamconv verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING

import click

from streamconv.cli import effects, output
from streamconv.cli.details import VERIFY
from streamconv.cli.flags import WATCHING, options, resources
from streamconv.cli.view import command_line, table, watching
from streamconv.errors import count, shorten
from streamconv.natural import natural

if TYPE_CHECKING:
    from streamconv.verification.verdict import TensorError, Verdict

_OF_SOURCE = {"memory_budget": "--memory-budget", "workers": "--workers", "every": "--all"}
WORST = 10
"""Matrices whose error is shown."""


@click.command(epilog=VERIFY)
@click.argument("out")
@click.option("--source", help="The checkpoint it was made from: encode it again and compare every byte.")
@click.option("--activation-ranges", metavar="FILE", help="--source: where the ranges are, if not where they were.")
@click.option("--memory-budget", help="--source: ceiling of this process's memory, e.g. 2GiB. Default: from what is free.")
@click.option("--workers", default="auto", show_default=True, help="--source: worker threads, or auto.")
@click.option("--with-tensorrt-llm", is_flag=True, help="TensorRT-LLM's own reader has to accept every rank (streamconv[tensorrt-llm]).")
@click.option("--part", metavar="K/N", help="Check a share: of N machines this is number K (0 to N-1); auto/N takes K from the launcher.")
@click.option("--all", "every", is_flag=True, help="--source: show the error of every matrix, not that of the worst ten.")
@options(WATCHING)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors and warnings only.")
def verify(
    out: str,
    source: str | None,
    activation_ranges: str | None,
    memory_budget: str | None,
    workers: str,
    with_tensorrt_llm: bool,
    part: str | None,
    every: bool,
    progress: str,
    memory_trace: str | None,
    report: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Check a converted folder: structure, every tensor against config.json, hashes and, with --source, every byte against MODEL."""
    from streamconv.launchers import part_of
    from streamconv.verification.check import verify as check

    if source is None:
        effects.refuse(["--activation-ranges has no effect without --source"] if activation_ranges is not None else [])
        typed = effects.typed(click.get_current_context())
        for flag in (flag for name, flag in _OF_SOURCE.items() if name in typed):
            output.note(f"note: {flag} has no effect without --source")
    with watching((out,), source, quiet or as_json, progress, memory_trace, report) as (meter, memory):
        verdict = check(
            out,
            source,
            with_tensorrt_llm=with_tensorrt_llm,
            activation_ranges=activation_ranges,
            resources=resources({"memory_budget": memory_budget, "workers": workers, "device": "cpu"}),
            meter=meter,
            part=part_of(part) if part is not None else None,
        )
    if as_json:
        output.dump(dataclasses.asdict(verdict) | {"ok": not verdict.problems, "values_checked": bool(verdict.hashed or verdict.encoded)})
    else:
        show(out, verdict, quiet, every)
    if report:
        from streamconv.pages import page, runs

        page.write(report, runs.verification(out, source, verdict, memory, command_line()))
    return 7 if verdict.problems else 0


def show(out: str, verdict: Verdict, quiet: bool, every: bool = False) -> None:
    """Print a verdict: problems and warnings to standard error, the rest to standard output.

    Args:
        every: show the error of every matrix, not that of the worst alone.
    """
    output.warn(verdict.warnings)
    if verdict.errors and not quiet:
        output.block(_errors(verdict.errors, every))
    for problem in shorten(verdict.problems):
        output.note(f"error: {problem}")
    if not quiet:
        good = "good" if verdict.hashed or verdict.encoded else "structure good, values not checked"
        state = good if not verdict.problems else f"{len(verdict.problems)} problems"
        encoded = f", {verdict.encoded} equal to the source encoded again" if verdict.encoded else ""
        reader = f"; {verdict.reader}" if verdict.reader else ""
        files = count(verdict.files, "file")
        output.line(f"{out}: {state}; {files}, {verdict.tensors} tensors, {verdict.hashed} hashes equal{encoded}{reader}")


def _errors(errors: list[TensorError], every: bool) -> Iterator[str]:
    """How far values are from the source's: the worst matrices, or every one in the order of the layers; then all together."""
    exact = sum(e.snr_db == inf for e in errors)
    if exact == len(errors) and not every:
        yield f"{exact} matrices, all exact"
        return
    ordered = sorted(errors, key=lambda e: (natural(e.file), natural(e.name)))
    if not every:
        ordered = sorted(ordered, key=lambda e: e.snr_db)[:WORST]
    rows = [(e.file, e.name, str(e.rows), f"{e.largest:.3g}", f"{e.relative:.3g}", _decibels(e.snr_db)) for e in ordered]
    yield from table(rows, ("file", "tensor", "rows", "max error", "relative", "SNR dB"))
    largest, relative = max(e.largest for e in errors), max(e.relative for e in errors)
    worst = _decibels(min(e.snr_db for e in errors))
    hidden = f"; the worst {len(ordered)} are shown, --all shows every one" if len(ordered) < len(errors) else ""
    yield (
        f"{len(errors)} matrices, {exact} exact: max error {largest:.3g}, relative {relative:.3g}, "
        f"SNR at least {worst}{'' if worst == 'exact' else ' dB'}{hidden}"
    )


def _decibels(snr: float) -> str:
    return "exact" if snr == inf else f"{snr:.1f}"
