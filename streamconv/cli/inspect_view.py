"""`streamconv inspect`: what is in a checkpoint and what it would become. One tensor after the other: there may be very many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.cli import output
from streamconv.cli.view import table
from streamconv.errors import StreamconvError, printable
from streamconv.families import Family
from streamconv.families.matching import match
from streamconv.hub import open_source
from streamconv.memory import show_size, without_collection
from streamconv.natural import natural
from streamconv.planning.plan import Plan
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.target import make_plan, model_of


def show(source: str, as_json: bool) -> None:
    """Print an index."""
    with without_collection():
        index = open_source(source)
        try:
            model, family = model_of(index)
            plan, problem = None, None
            try:
                plan = make_plan(index, TensorRTLLM())
            except StreamconvError as error:
                problem = str(error)
            facts = {
                "family": family.name,
                "architecture": model.architecture,
                "files": len(index.shards),
                "bytes": sum(record.nbytes for record in index.tensors.values()),
            }
            (_as_json if as_json else _as_text)(index, family, plan, facts, problem)
        finally:
            index.close()


def _tensors(index: Index, family: Family, plan: Plan | None, unknown: list[str]) -> Iterator[dict[str, Any]]:
    """What is said of each tensor; names that no role matches go to `unknown` first."""
    found, unmatched = match(family, index.tensors)
    unknown += unmatched
    roles = {name: key[0] for key, name in found.items()}
    del found
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


def _as_json(index: Index, family: Family, plan: Plan | None, facts: dict[str, Any], problem: str | None) -> None:
    unknown: list[str] = []
    output.dump_long(facts, "tensors", _tensors(index, family, plan, unknown), {"unknown": unknown, "problem": problem})


def _as_text(index: Index, family: Family, plan: Plan | None, facts: dict[str, Any], problem: str | None) -> None:
    total, files = show_size(facts["bytes"]), facts["files"]
    output.line(f"{family.name} ({facts['architecture']}), {len(index.tensors)} tensors, {total} in {files} file{'s' * (files != 1)}")
    output.line()
    rows = []
    shared: dict[str, str] = {}  # most of what a table says is said many times
    for told in _tensors(index, family, plan, []):
        shape = "x".join(str(size) for size in told["shape"]) or "scalar"
        becomes = ", ".join(told["becomes"][:2]) or (told["role"] and "-") or "unknown"
        cells = (told["dtype"], shape, show_size(told["bytes"]), becomes)
        rows.append((printable(told["name"], 80), *(shared.setdefault(cell, cell) for cell in cells)))
    output.block(table(rows, ("tensor", "dtype", "shape", "size", "becomes")))
    if problem:
        output.line()
        output.line(f"cannot be converted as it is: {problem}")
