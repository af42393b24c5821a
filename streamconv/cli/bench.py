"""`streamconv bench`."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli import output, view
from streamconv.cli.flags import Command
from streamconv.errors import CheckpointError, UsageError, count, printable
from streamconv.memory import parse_size, show_size

if TYPE_CHECKING:
    from streamconv.pages.page import Page

_HEADER = ("job", "seconds", "cp", "ratio", "CPU seconds", "resident", "cgroup peak", "limit")


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
    import tempfile

    from streamconv.bench import model as models
    from streamconv.bench import run
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
        page.check(report)
    jobs = run.jobs([parse_size(budget) for budget in budgets], quants, shlex.split(flags), against)
    with tempfile.TemporaryDirectory(prefix="streamconv-bench-", dir=Path(work).resolve()) as name:
        place = Path(name)
        source = Path(model or place / "model").resolve()
        if shape is not None:
            models.write(source, shape)
        result: dict[str, Any] = run.run(source, place, jobs, runs, (lambda line: None) if as_json else output.note, warm)
    result["model"] = model or shape
    if report is not None:
        page.write(report, _page(result))
    if as_json:
        output.dump(result)
    else:
        output.block(_lines(result))
    return 8 if any(line["status"] for line in result["jobs"]) else 0


def _rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for job in result["jobs"]:
        if job["status"]:
            rows.append((job["name"], f"failed with status {job['status']}", "", "", "", show_size(job["peak"]), "", ""))
            continue
        inside = show_size(job["cgroup_peak"]) if job["cgroup_peak"] is not None else "no cgroup"
        times = (f"{statistics.median(job[key]):.2f}" for key in ("seconds", "cp_seconds"))
        limit = show_size(job["limit"]) if job["in_cgroup"] and job["limit"] else "none"
        rows.append((job["name"], *times, f"{job['ratio']:.2f}", f"{job['cpu_seconds']:.2f}", show_size(job["peak"]), inside, limit))
    return rows


def _rates(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, "unknown" if rate is None else f"{show_size(rate)}/s") for name, rate in result["rates"].items()]


def _told(result: dict[str, Any]) -> str:
    runs = len(result["jobs"][0]["seconds"])
    what = f"{result['model']}, {show_size(result['bytes'])}, page cache {result['cache']}"
    return f"{what}; medians of {count(runs, 'round')}, seconds until the data is on the disk"


def _beside(result: dict[str, Any]) -> list[str]:
    return [
        f"{job['name']}: {other['faster']:.1f} times as fast as {other['name']}, with {other['memory']:.2f} of its memory"
        for job in result["jobs"]
        for other in job["against"]
        if other["faster"] is not None
    ]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """For people."""
    yield from view.table(_rates(result), ("rate", "measured"))
    yield ""
    yield _told(result)
    yield from view.table(_rows(result), _HEADER)
    yield from _beside(result)
    for job in result["jobs"]:
        if job["status"]:
            yield f"{job['name']}: {job['error'].strip()[-300:]}"


def _page(result: dict[str, Any]) -> Page:
    """For a browser."""
    from streamconv.cli.view import command_line
    from streamconv.pages.page import Page, Section, Table, machine

    numbers = frozenset(range(1, len(_HEADER)))
    sections = [
        Section("Conversions", ". ".join([_told(result), *_beside(result)]) + ".", "", Table(_HEADER, _rows(result), numbers)),
        Section("Rates", "", "", Table(("what", "bytes a second"), _rates(result), frozenset({1}))),
        Section("Command", code=command_line()),
        machine(),
    ]
    return Page(f"Benchmark of {result['model']}", _told(result), [], sections)
