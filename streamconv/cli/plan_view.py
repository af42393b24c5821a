"""`streamconv plan`: every output file, what is quantized and why not, memory, disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamconv import fs
from streamconv.budget import Shares, TileCost
from streamconv.cli.view import dump, table
from streamconv.memory import show_size
from streamconv.plan import Plan


def content(plan: Plan, shares: Shares, costs: list[TileCost], out: str | None) -> dict[str, Any]:
    """The plan for programs; sizes in bytes."""
    tile = max((cost.rows(shares.arena, None) * cost.source for cost in set(costs)), default=0)
    free = fs.free_space(Path(out or "."))
    return {
        "family": plan.family,
        "dtype": plan.dtype.torch,
        "options": plan.options.to_json(),
        "fingerprint": plan.fingerprint(),
        "files": [{"name": f.name, "size": f.size, "tensors": f.tensors} for f in plan.files]
        + [{"name": "config.json", "size": len(plan.config), "tensors": 0}],
        "stored_as": dict(plan.decisions),
        "bytes_to_read": plan.bytes_read,
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
        "disk": {"free": free, "need": plan.bytes_written, "enough": free >= plan.bytes_written},
        "warnings": list(plan.warnings),
    }


def show(
    plan: Plan,
    shares: Shares,
    costs: list[TileCost],
    device: str,
    out: str | None,
    as_json: bool,
    cache: Mapping[str, int] | None = None,
    refused: str | None = None,
) -> None:
    """Print a plan.

    Args:
        cache: see `hub.cache_need`.
        refused: why `convert` would not write to `out`.
    """
    told = content(plan, shares, costs, out) | {"device": device, "output_problem": refused}
    told["disk"]["cache"] = cache
    if as_json:
        dump(told)
        return
    options = plan.options
    print(f"{plan.family}, {plan.dtype.torch}, TensorRT-LLM {options.target_version}, tp {options.tp_size} x pp {options.pp_size}\n")
    files = [(f["name"], show_size(f["size"]), str(f["tensors"] or "")) for f in told["files"]]
    if len(files) > 20:
        files = [*files[:8], ("...", "", ""), *files[-3:]]
    print("\n".join(table(files, ("file", "size", "tensors"))) + "\n")
    print("\n".join(table(list(plan.decisions.items()), ("module", "stored as"))) + "\n")
    memory, disk = told["memory"], told["disk"]
    passes = f", weights in {plan.passes} passes" if plan.passes > 1 else ""
    print(f"read     {show_size(plan.bytes_read)}{passes}")
    print(f"write    {show_size(plan.bytes_written)}")
    print(
        f"memory   peak {show_size(memory['peak'])} of {show_size(memory['budget'])}: {show_size(memory['before_first_tile'])} "
        f"before the first tile, {shares.workers} workers x {show_size(shares.arena)}, {show_size(shares.margin)} margin"
    )
    print(f"tiles    at most {show_size(told['largest_tile'])} of source each")
    print(f"device   {device}")
    enough = "enough" if disk["enough"] else "NOT ENOUGH"
    print(f"disk     {show_size(disk['free'])} free, {show_size(disk['need'])} needed: {enough}")
    if cache is not None:
        more = f"{show_size(cache['all'])} more, with --hub-keep none at most {show_size(cache['none'])}"
        print(f"cache    {show_size(cache['free'])} free, the download needs {more}")
    for warning in (*plan.warnings, *([f"convert would refuse this output: {refused}"] if refused else [])):
        print(f"warning: {warning}")
