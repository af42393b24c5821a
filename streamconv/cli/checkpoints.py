"""The commands that look at checkpoints as they are: inspect, diff, push; and list."""

from __future__ import annotations

import click

from streamconv.cli import output
from streamconv.cli.details import SOURCES
from streamconv.errors import UsageError


@click.command(epilog=SOURCES)
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str, as_json: bool) -> int:
    """Show the tensors of MODEL, the family recognised, and what each tensor would become."""
    from streamconv.cli import inspect_view

    inspect_view.show(model, as_json)
    return 0


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
    from streamconv.cli import diff_view, view
    from streamconv.memory import parse_size
    from streamconv.verification.difference import compare

    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise UsageError(f"--tolerance {tolerance:g} is no error", hint="a number from 0 on, e.g. 1e-3")
    made = compare(a, b, parse_size(memory_budget) if memory_budget else None, view.meter("auto", quiet or as_json))
    diff_view.show(made, tolerance, as_json, quiet, every)
    return 0 if made.within(tolerance) else 7


@click.command()
@click.argument("out")
@click.argument("repo")
@click.option("--private", is_flag=True, help="If the repository is new, only you see it.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch; default: the main one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def push(out: str, repo: str, private: bool, revision: str | None, as_json: bool) -> int:
    """Upload the finished output OUT to REPO (org/name) on the Hugging Face Hub."""
    from streamconv.hub.push import push as upload

    where = upload(out, repo, private=private, revision=revision)
    if as_json:
        output.dump({"repo": repo, "revision": revision or "main", "url": where})
    else:
        output.line(where)
    return 0


@click.command("list")
@click.argument("what", type=click.Choice(["families", "quants", "formats", "targets"]))
@click.option("--markdown", is_flag=True, help="As a Markdown table; of formats and targets in short.")
def list_(what: str, markdown: bool) -> int:
    """Print the model families, the weight formats, or the targets and their options."""
    from streamconv.cli import list_view

    output.block(list_view.show(what, markdown).split("\n"))
    return 0
