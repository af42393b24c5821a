"""`streamconv bench`: parse, measure, show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from streamconv.cli import output
from streamconv.cli.flags import Command
from streamconv.errors import CheckpointError, UsageError, printable


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--shape", default=None, metavar="NAME", help="Made-up weights instead of MODEL: llama-tiny, llama-1b, llama-8b.")
@click.option("--budget", "budgets", multiple=True, default=["512MiB"], show_default=True, help="Of process and cgroup; may be repeated.")
@click.option("--quant", "quants", multiple=True, default=["int8"], show_default=True, help="Weight format; may be repeated.")
@click.option("--flags", default="", help="Further flags of convert, in quotes, e.g. '--to hf'.")
@click.option("--against", multiple=True, metavar="COMMAND", help="Measure this too, without a limit: a command with {model} and {out}.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds of cp and every job.")
@click.option("--warm", is_flag=True, help="Read the model into the page cache before each run; else root empties it.")
@click.option("--work", default=".", show_default=True, metavar="FOLDER", help="Where model and outputs lie while it measures.")
@click.option("--report", metavar="FILE.html", help="Write one HTML page (streamconv[report]).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    model: str | None,
    shape: str | None,
    budgets: tuple[str, ...],
    quants: tuple[str, ...],
    flags: str,
    against: tuple[str, ...],
    runs: int,
    warm: bool,
    work: str,
    report: str | None,
    as_json: bool,
) -> int:
    """Measure this machine: disks, kernels, and conversions of MODEL in memory cgroups of each budget, beside cp."""
    import shlex

    from streamconv.bench import model as models
    from streamconv.bench import run
    from streamconv.cli import bench_view
    from streamconv.memory import parse_size
    from streamconv.pages import page

    if (model is None) == (shape is None):
        raise UsageError("bench needs a MODEL or a --shape, and not both", hint="--shape llama-1b")
    if shape is not None and shape not in models.SHAPES:
        raise UsageError(f"--shape {printable(shape)} is not known", hint=f"one of {', '.join(models.SHAPES)}")
    if model is not None and not os.path.isdir(model):
        raise CheckpointError(f"{printable(model)} is no folder", hint="bench copies the model as a folder; fetch it first")
    if not os.path.isdir(work):
        raise UsageError(f"--work {printable(work)} is no folder")
    if report is not None:
        page.check(Path(report))
    jobs = run.jobs([parse_size(budget) for budget in budgets], quants, shlex.split(flags), against)
    with run.folder(Path(work).resolve()) as place:
        source = Path(model or place / "model").resolve()
        if shape is not None:
            models.write(source, shape)
        found: dict[str, Any] = run.run(source, place, jobs, runs, (lambda line: None) if as_json else output.note, warm)
    found["model"] = model or shape
    if report is not None:
        page.write(Path(report), bench_view.page(found))
    if as_json:
        output.dump(found)
    else:
        output.block(bench_view.lines(found))
    return 8 if any(line["status"] for line in found["jobs"]) else 0
