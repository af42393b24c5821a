"""`streamconv plan`: every output file, what is quantized and why not, memory, disk, and how it is cut into parts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv import mounts
from streamconv.cli import output
from streamconv.cli.view import table
from streamconv.errors import printable
from streamconv.memory import show_size
from streamconv.natural import natural
from streamconv.planning.memory_plan import MemoryPlan, TileCost
from streamconv.planning.parts import Part
from streamconv.planning.plan import Plan
from streamconv.reports import Estimate
from streamconv.run import fs, inside

if TYPE_CHECKING:
    from streamconv.calibration.foreseen import Search


def content(plan: Plan, shares: MemoryPlan, costs: list[TileCost], out: str | None) -> dict[str, Any]:
    """The plan for programs; sizes in bytes."""
    tile = max((cost.rows(shares.arena, None) * cost.source for cost in {id(cost): cost for cost in costs}.values()), default=0)
    free = fs.free_space(Path(out or "."))
    warnings = list(plan.warnings)
    if out is not None and mounts.in_memory(Path(out)):
        warnings.append(
            f"{printable(out)} is on a file system in memory: the output's {show_size(plan.bytes_written)} are memory too, beside"
            f" --memory-budget, and a container's limit counts them"
        )
    return {
        "family": plan.family,
        "dtype": plan.dtype.torch,
        "target": plan.target.key,
        "options": plan.target.to_json(),
        "fingerprint": plan.fingerprint(),
        "files": [{"name": f.name, "size": f.size, "tensors": f.tensors} for f in plan.files]
        + [{"name": side.name, "size": side.size, "tensors": 0} for side in plan.side_files],
        "stored_as": dict(plan.decisions),
        "bytes_to_read": plan.bytes_read,
        "bytes_to_check": plan.bytes_checked,
        "passes": plan.passes,
        "bytes_to_write": plan.bytes_written,
        "memory": {
            "budget": shares.budget,
            "peak": shares.peak,
            "before_first_tile": shares.base,
            "tiles": shares.workers * shares.arena,
            "margin": shares.margin,
        },
        "workers": shares.workers,
        "largest_tile": tile,
        "disk": {"free": free, "need": plan.bytes_written, "enough": free is None or free >= plan.bytes_written},
        "notes": list(plan.notes),
        "warnings": warnings,
    }


def check_lines(plan: Plan) -> list[str]:
    """What is read before the conversion, if anything is."""
    size = show_size(plan.bytes_checked)
    return [f"check    {size} of the source are read once more first, and held against its streamconv.json"] if plan.bytes_checked else []


def show(
    plan: Plan,
    shares: MemoryPlan,
    costs: list[TileCost],
    device: str,
    out: str | None,
    as_json: bool,
    cache: Mapping[str, int | None] | None = None,
    refused: str | None = None,
    parts: Sequence[Part] | None = None,
    search: Search | None = None,
    estimate: Estimate | None = None,
) -> None:
    """Print a plan.

    Args:
        cache: see `hub.cache_need`.
        refused: why `convert` would not write to `out`.
    """
    why = inside.choose(Path(os.path.realpath(out)), fs.Disk()).inside if out else None
    told = content(plan, shares, costs, out) | {"device": device, "output_problem": refused, "work_inside_output": why}
    told["disk"]["cache"] = cache
    told["time"] = dataclasses.asdict(estimate) if estimate is not None else None
    if parts is not None:
        told["parts"] = parts_content(plan, parts)
    if search is not None:
        told["search"] = search.to_json()
    if as_json:
        output.dump(told)
        return
    output.line(f"{plan.family}, {plan.dtype.torch}, {plan.target.headline}")
    output.line()
    files = [(f["name"], show_size(f["size"]), str(f["tensors"] or "")) for f in told["files"]]
    if len(files) > 20:
        files = [*files[:8], ("...", "", ""), *files[-3:]]
    output.block([*table(files, ("file", "size", "tensors")), ""])
    output.block([*table(sorted(plan.decisions.items(), key=lambda pair: natural(pair[0])), ("module", "stored as")), ""])
    memory, disk = told["memory"], told["disk"]
    passes = f", weights in {plan.passes} passes" if plan.passes > 1 else ""
    output.block(check_lines(plan))
    output.line(f"read     {show_size(plan.bytes_read)}{passes}")
    output.line(f"write    {show_size(plan.bytes_written)}")
    output.line(
        f"memory   peak {show_size(memory['peak'])} of {show_size(memory['budget'])}: {show_size(memory['before_first_tile'])} "
        f"before the first tile, {shares.workers} workers x {show_size(shares.arena)}, {show_size(shares.margin)} margin"
    )
    output.line(f"tiles    at most {show_size(told['largest_tile'])} of source each")
    output.line(f"device   {device}")
    enough = "the file system does not say" if disk["free"] is None else "enough" if disk["enough"] else "NOT ENOUGH"
    output.line(f"disk     {_free(disk['free'])} free, {show_size(disk['need'])} needed: {enough}")
    if estimate is not None:
        output.line(f"time     {estimate}{'; the search for codes comes before' if search is not None else ''}")
    if why:
        output.line(f"place    {printable(str(out))} {why}: the work is done in hidden files inside it, config.json comes last")
    if cache is not None:
        more = f"{_free(cache['all'])} more, with --hub-keep none at most {_free(cache['none'])}"
        output.line(f"cache    {_free(cache['free'])} free, the download needs {more}")
    if parts is not None:
        output.block(_parts_lines(told["parts"]))
    if search is not None:
        output.block(search.lines())
    for note in told["notes"]:
        output.line(f"note: {note}")
    for warning in (*told["warnings"], *([f"convert would refuse this output: {refused}"] if refused else [])):
        output.line(f"warning: {warning}")


def _free(size: int | None) -> str:
    return "?" if size is None else show_size(size)


_SHOWN = 20


def parts_content(plan: Plan, parts: Sequence[Part]) -> dict[str, Any]:
    """The parts for programs; sizes in bytes. `imbalance`: how much the largest part is above the mean; of `imbalance_of_others`, one
    that is a single unit above the mean, which nothing can cut, is left out. `read_amplification` and `shards_fetched`: what all parts
    read, and the files that they read from, against the source.
    """
    moved = [part.moved for part in parts]
    mean = sum(moved) / len(moved)
    alone = [part.alone and part.moved > mean for part in parts]
    others = [size for size, by_itself in zip(moved, alone, strict=True) if not by_itself]
    sizes = [source.size for source in plan.sources]
    shards = [sorted(part.shards(plan)) for part in parts]
    return {
        "count": len(parts),
        "imbalance": max(moved) / mean - 1 if mean else 0.0,
        "imbalance_of_others": max(others) * len(others) / sum(others) - 1 if sum(others) else 0.0,
        "largest": _largest(plan, parts),
        "read_amplification": sum(part.read for part in parts) / plan.bytes_read if plan.bytes_read else 1.0,
        "shards_fetched": sum(sizes[at] for own in shards for at in own) / max(sum(sizes[at] for at in set().union(*shards)), 1),
        "parts": [
            {
                "part": number,
                "read": part.read,
                "write": part.written,
                "shards": len(own),
                "shard_bytes": sum(sizes[at] for at in own),
                "alone": by_itself,
            }
            for number, (part, own, by_itself) in enumerate(zip(parts, shards, alone, strict=True))
        ],
    }


def _largest(plan: Plan, parts: Sequence[Part]) -> str:
    """The matrix, of the part that moves most, that has most bytes."""
    most = max(parts, key=lambda part: part.moved).matrices
    return plan.matrices.name(max(most, key=plan.matrices.bytes_of)) if most else ""


def _parts_lines(told: dict[str, Any]) -> list[str]:
    """The same for people."""
    rows = [
        (str(part["part"]), show_size(part["read"]), show_size(part["write"]), f"{part['shards']} ({show_size(part['shard_bytes'])})")
        for part in told["parts"]
    ]
    if len(rows) > _SHOWN:
        rows = [*rows[: _SHOWN // 2], ("...", "", "", ""), *rows[-3:]]
    alone = [str(part["part"]) for part in told["parts"] if part["alone"]]
    imbalance = f"imbalance {told['imbalance_of_others']:.1%}"
    if alone:
        which = f"part{'s' * (len(alone) > 1)} {', '.join(alone)}"
        imbalance += f" without {which}, which {'are' if len(alone) > 1 else 'is'} up to {1 + told['imbalance']:.2f} x the mean"
        largest = max(told["parts"], key=lambda part: part["read"] + part["write"])
        floor = show_size(largest["read"] + largest["write"])
        most = sum(part["read"] + part["write"] for part in told["parts"]) // max(largest["read"] + largest["write"], 1)
        imbalance += f": {told['largest']} is never cut; its {floor} are the least of a part, so more than {most} workers gain nothing"
    return [
        "",
        *table(rows, ("part", "read", "write", "source files")),
        f"parts    {told['count']}; {imbalance}",
        f"reads    {told['read_amplification']:.2f} x the source; source files fetched {told['shards_fetched']:.2f} x, if nobody kept any",
        "",
    ]
