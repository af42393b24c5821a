"""`streamconv verify`."""

from __future__ import annotations

import click

from streamconv.cli import effects
from streamconv.cli.details import VERIFY
from streamconv.cli.flags import WATCHING, options, resources


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
    from streamconv.cli import pages_view, verify_view
    from streamconv.cli.watching import watching
    from streamconv.launchers import part_of
    from streamconv.verification.check import verify as check

    if source is None:
        noted = ("memory_budget", "workers", "every")
        effects.needs(click.get_current_context(), "source", options=("activation_ranges",), resources=noted)
    with watching((out,), source, quiet or as_json, progress, memory_trace, report) as watched:
        verdict = check(
            out,
            source,
            with_tensorrt_llm=with_tensorrt_llm,
            activation_ranges=activation_ranges,
            resources=resources({"memory_budget": memory_budget, "workers": workers, "device": "cpu"}),
            meter=watched.meter,
            part=part_of(part) if part is not None else None,
        )
    verify_view.show(out, verdict, as_json, quiet, every)
    watched.write(report, lambda: pages_view.verification(out, source, verdict, watched))
    return 7 if verdict.problems else 0
