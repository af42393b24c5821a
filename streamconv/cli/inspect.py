"""`streamconv inspect`: what is in a checkpoint and what it would become. One tensor after the other: there may be very many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli import output
from streamconv.cli.details import SOURCES
from streamconv.cli.view import table
from streamconv.errors import StreamconvError, count, printable
from streamconv.memory import show_size, without_collection
from streamconv.natural import natural

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.families import Family
    from streamconv.planning.plan import Plan


@click.command(epilog=SOURCES)
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str, as_json: bool) -> int:
    """Show the tensors of MODEL, the family recognised, and what each tensor would become in a TensorRT-LLM checkpoint."""
    from streamconv.families.naming import settle
    from streamconv.hub import open_stored
    from streamconv.targets.trtllm.options import TensorRTLLM
    from streamconv.targets.trtllm.target import make_plan, model_of

    with without_collection(), open_stored(model) as index:
        names = index.config.get("architectures")
        architecture = str(names[0]) if isinstance(names, list) and names else None
        family, plan, problem = None, None, None
        try:
            index = settle(index)
            config, family = model_of(index)
            architecture = config.architecture
            plan = make_plan(index, TensorRTLLM())
        except StreamconvError as error:
            problem = str(error)
        names = index.config.get("architectures")
        architecture = str(names[0]) if isinstance(names, list) and names else None
        nbytes, files = sum(record.nbytes for record in index.tensors.values()), len(index.shards)
        title = family.name if family is not None else None
        facts = {"family": title, "architecture": architecture, "files": files, "bytes": nbytes}
        unknown: list[str] = []
        tensors = _tensors(index, family, plan, unknown)
        if as_json:
            output.dump_long(facts, tensors, {"unknown": unknown, "problem": problem})
            return 0
        content = f"{len(index.tensors)} tensors, {show_size(nbytes)} in {count(files, 'file')}"
        title = printable(architecture or "no architecture")
        output.line(f"{f'{family.name} ({title})' if family is not None else title}, {content}")
        output.line()
        output.block(table(_rows(tensors, family is not None), ("tensor", "dtype", "shape", "size", "becomes")))
    if problem:
        output.line()
        output.line(f"--to trtllm: {problem}")
    return 0


def _tensors(index: Index, family: Family | None, plan: Plan | None, unknown: list[str]) -> Iterator[dict[str, Any]]:
    """Facts of each tensor; names that no role matches go to `unknown` first."""
    from streamconv.families.matching import match

    matched, unmatched = match(family, index.tensors) if family is not None else ({}, [])
    unknown += unmatched
    roles = {name: key[0] for key, name in matched.items()}
    del matched
    becomes: dict[str, tuple[int, ...]] = {}
    for span in plan.spans if plan is not None else ():
        known = becomes.get(span.source.name, ())
        becomes[span.source.name] = known + tuple(dest.matrix for dest in span.dests if dest.matrix not in known)
    for name in sorted(index.tensors, key=natural):
        record = index.tensors[name]
        targets = (plan.matrices[matrix].places[0].tensor for matrix in becomes.get(name, ())) if plan is not None else ()
        yield {
            "name": name,
            "dtype": record.dtype.name,
            "shape": list(record.shape),
            "bytes": record.nbytes,
            "file": index.shards[record.shard].path.name,
            "role": roles.get(name),
            "becomes": list(dict.fromkeys(targets)),
        }


def _rows(tensors: Iterator[dict[str, Any]], known: bool) -> list[tuple[str, ...]]:
    shared: dict[str, str] = {}  # most of what a table says is said many times
    rows = []
    for tensor in tensors:
        shape = "x".join(str(size) for size in tensor["shape"]) or "scalar"
        becomes = ", ".join(tensor["becomes"][:2]) or ("-" if tensor["role"] or not known else "unknown")
        cells = (tensor["dtype"], shape, show_size(tensor["bytes"]), becomes)
        rows.append((printable(tensor["name"], 80), *(shared.setdefault(cell, cell) for cell in cells)))
    return rows
