"""`streamconv inspect`: what is in a checkpoint and what it would become."""

from __future__ import annotations

from streamconv.cli import output
from streamconv.cli.view import table
from streamconv.errors import StreamconvError, printable
from streamconv.hub import open_source
from streamconv.matching import match
from streamconv.memory import show_size
from streamconv.options import Options
from streamconv.targets.trtllm.planner import make_plan, model_of


def show(source: str, as_json: bool) -> None:
    """Print an index."""
    index = open_source(source)
    try:
        model, family = model_of(index)
        found, unmatched = match(family, index.tensors)
        roles = {name: key[0] for key, name in found.items()}
        becomes: dict[str, list[str]] = {}
        problem = ""
        try:
            plan = make_plan(index, Options())
            for span in plan.spans:
                targets = (plan.matrices[dest.matrix].places[0].tensor for dest in span.dests)
                becomes.setdefault(span.source.name, []).extend(targets)
        except StreamconvError as error:
            problem = str(error)
        tensors = [
            {
                "name": name,
                "dtype": record.dtype.name,
                "shape": list(record.shape),
                "bytes": record.nbytes,
                "file": index.shards[record.shard].path.name,
                "role": roles.get(name),
                "becomes": list(dict.fromkeys(becomes.get(name, []))),
            }
            for name, record in index.tensors.items()
        ]
    finally:
        index.close()
    total = sum(record.nbytes for record in index.tensors.values())
    if as_json:
        output.dump(
            {
                "family": family.name,
                "architecture": model.architecture,
                "files": len(index.shards),
                "bytes": total,
                "tensors": tensors,
                "unknown": unmatched,
                "problem": problem or None,
            }
        )
        return
    output.line(f"{family.name} ({model.architecture}), {len(tensors)} tensors, {show_size(total)} in {len(index.shards)} files")
    output.line()
    rows = [
        (
            printable(str(t["name"]), 80),
            str(t["dtype"]),
            "x".join(str(size) for size in record.shape) or "scalar",
            show_size(record.nbytes),
            ", ".join(becomes.get(str(t["name"]), [])[:2]) or (roles.get(str(t["name"])) and "-") or "unknown",
        )
        for t, record in zip(tensors, index.tensors.values(), strict=True)
    ]
    output.block(table(rows, ("tensor", "dtype", "shape", "size", "becomes")))
    if problem:
        output.line()
        output.line(f"cannot be converted as it is: {problem}")
