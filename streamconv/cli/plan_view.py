"""What `streamconv plan` prints: files, what is quantized and why not, memory, disk, and how the work is cut into parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv import mounts
from streamconv.allocation import costs_of, estimate_memory
from streamconv.cli import output
from streamconv.cli.view import table
from streamconv.errors import OutputError, printable
from streamconv.execution import choose_device
from streamconv.hub.source import cache_need
from streamconv.memory import show_size
from streamconv.natural import natural
from streamconv.planning.memory_plan import MemoryPlan, TileCost
from streamconv.planning.parts import Part, cut
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.run import fs
from streamconv.run.inside import choose
from streamconv.run.output_checks import check_apart, is_made, output_problem

if TYPE_CHECKING:
    from streamconv.calibration.foreseen import Search
    from streamconv.checkpoint.index import Index
    from streamconv.estimate import Looking
    from streamconv.options import Resources
    from streamconv.targets.base import Output

_MOST_ROWS = 20
_STATES = {False: "to be written", True: "finished, to be skipped"}


def show(
    index: Index,
    outputs: Sequence[Output],
    plans: Sequence[Plan],
    searches: Sequence[Search | None],
    asked: Resources,
    looking: Looking | None,
    parts: int | None,
    several: bool,
    as_json: bool,
) -> None:
    """Print the plans of a command.

    Args:
        searches: for INT4 codes, which come before the conversion of each output.
        looking: at the disks, which began before the source was planned.
        parts: how many the work is cut into; None: it is not.
        several: the outputs are named with --output, and those that are finished are skipped.
    """
    finished = [several and is_made(Path(one.out), index.root, plan, index.shards) for one, plan in zip(outputs, plans, strict=True)]
    reads = Reads([plan for plan, done in zip(plans, finished, strict=True) if not done])
    costs = costs_of(reads)
    memory = estimate_memory(reads, asked, costs)
    chosen = choose_device(reads, asked)
    places = [Path(one.out) if one.out else None for one in outputs]
    written = {place: plan.bytes_written for place, plan, done in zip(places, plans, finished, strict=True) if not done}
    estimate = looking.estimate(reads, written, costs, memory, bool(chosen.devices)) if looking is not None and written else None
    run = {"device": chosen.why, "time": dataclasses.asdict(estimate) if estimate is not None else None}
    each = [_output_facts(plan, memory, costs, one.out or None) for one, plan in zip(outputs, plans, strict=True)]
    for one, plan, search, done, facts in zip(outputs, plans, searches, finished, each, strict=True):
        problem = output_problem(index, plan, one.out) if one.out and not done else None
        if several:
            problem = problem or (_codes_first(one.out) if search is not None else None)
            facts |= {"out": one.out, "finished": done}
        facts["output_problem"] = problem
        if search is not None:
            facts["search"] = dataclasses.asdict(search)
    content: dict[str, Any]
    if several:
        content = {"outputs": each, "bytes_to_read": reads.nbytes, "bytes_to_read_apart": sum(plan.bytes_read for plan in reads.plans)}
        content |= {"bytes_to_write": sum(written.values()), **{name: each[0][name] for name in ("memory", "workers", "largest_tile")}}
        content |= {**run, "cache": cache_need(index), "output_problem": _crossing(outputs, index)}
    else:
        content = each[0]
        out = outputs[0].out
        content |= {**run, "work_inside_output": choose(Path(out), fs.Disk()).inside if out else None}
        content["disk"]["cache"] = cache_need(index)
        if parts is not None:
            content["parts"] = _parts_facts(plans[0], cut(plans[0], parts))
    if as_json:
        output.dump(content)
        return
    output.block(_lines(outputs, plans, each, content, several))
    if estimate is not None:
        output.line(f"time     {estimate}{'; the search for codes comes before' if any(searches) else ''}")
    if "parts" in content:
        output.block(_parts_lines(content["parts"]))
    for one, search in zip(outputs, searches, strict=True):
        if search is not None:
            output.block([*(["", f"{printable(one.out)} waits for its codes"] if several else []), *search.lines()])
    output.block(_remarks(each))
    problems = [content["output_problem"], *(facts["output_problem"] for facts in each)] if several else [content["output_problem"]]
    for problem in filter(None, problems):
        output.line(f"warning: convert would refuse {'these outputs' if several else 'this output'}: {problem}")


def _codes_first(out: str) -> str:
    """Why an output that waits for a search is refused beside others."""
    from streamconv.calibration.before import codes_path

    codes = printable(codes_path(Path(fs.named(out))))
    return f"{printable(out)} needs codes=FILE: converted alone, with --text, it leaves them in {codes}"


def _crossing(outputs: Sequence[Output], index: Index) -> str | None:
    """Why these outputs are refused together."""
    try:
        check_apart([choose(fs.named(one.out), fs.Disk()) for one in outputs], index.root)
    except OutputError as error:
        return error.message
    return None


def _output_facts(plan: Plan, memory: MemoryPlan, costs: Sequence[TileCost], out: str | None) -> dict[str, Any]:
    """The plan of an output for programs; sizes in bytes."""
    tile = max((cost.rows(memory.arena, None) * cost.source for cost in {id(cost): cost for cost in costs}.values()), default=0)
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
            "budget": memory.budget,
            "peak": memory.peak,
            "before_first_tile": memory.base,
            "tiles": memory.workers * memory.arena,
            "margin": memory.margin,
        },
        "workers": memory.workers,
        "largest_tile": tile,
        "disk": {"free": free, "need": plan.bytes_written, "enough": free is None or free >= plan.bytes_written},
        "notes": list(plan.notes),
        "warnings": warnings,
    }


def _lines(
    outputs: Sequence[Output], plans: Sequence[Plan], each: Sequence[dict[str, Any]], content: dict[str, Any], several: bool
) -> Iterator[str]:
    """Tables of files and modules, and what the run takes."""
    plan, memory, workers = plans[0], content["memory"], content["workers"]
    if several:
        yield f"{plan.family}, {len(plans)} outputs from one read"
        rows = list[tuple[str, ...]]()
        for item, facts in zip(plans, each, strict=True):
            what = (item.target.headline, item.dtype.torch, str(len(facts["files"])), show_size(item.bytes_written))
            rows.append((facts["out"], *what, _STATES[facts["finished"]]))
        header: tuple[str, ...] = ("output", "what", "dtype", "files", "size", "state")
        read = f" for all; one after the other {show_size(content['bytes_to_read_apart'])}"
    else:
        yield f"{plan.family}, {plan.dtype.torch}, {plan.target.headline}"
        rows = _ends([(f["name"], show_size(f["size"]), str(f["tensors"] or "")) for f in content["files"]], 8)
        header = ("file", "size", "tensors")
        read = f", weights in {plan.passes} passes" if plan.passes > 1 else ""
    yield from ("", *table(rows, header), "")
    modules = sorted({name for item in plans for name in item.decisions}, key=natural)
    stored = [(name, *(item.decisions.get(name, "") for item in plans)) for name in modules]
    yield from (*table(stored, ("module", *([one.out for one in outputs] if several else ["stored as"]))), "")
    if plan.bytes_checked:
        yield f"check    {show_size(plan.bytes_checked)} of the source are read once more first, and held against its streamconv.json"
    yield f"read     {show_size(content['bytes_to_read'])}{read}"
    yield f"write    {show_size(content['bytes_to_write'])}"
    yield (
        f"memory   peak {show_size(memory['peak'])} of {show_size(memory['budget'])}: {show_size(memory['before_first_tile'])} "
        f"before the first tile, {workers} workers x {show_size(memory['tiles'] // workers)}, {show_size(memory['margin'])} margin"
    )
    yield f"tiles    at most {show_size(content['largest_tile'])} of source each"
    yield f"device   {content['device']}"
    for one, facts in zip(outputs, each, strict=True):
        disk = facts["disk"]
        enough = "the file system does not say" if disk["free"] is None else "enough" if disk["enough"] else "NOT ENOUGH"
        needed = f"{_free(disk['free'])} free, {show_size(disk['need'])} needed"
        yield f"disk     {needed}{f' for {printable(one.out)}' if several else ''}: {enough}"
    if content.get("work_inside_output"):
        why = f"{printable(outputs[0].out)} {content['work_inside_output']}"
        yield f"place    {why}: the work is done in hidden files inside it, config.json comes last"
    cache = content["cache"] if several else content["disk"]["cache"]
    if cache is not None:
        more = f"{_free(cache['all'])} more, with --hub-keep none at most {_free(cache['none'])}"
        yield f"cache    {_free(cache['free'])} free, the download needs {more}"


def _free(size: int | None) -> str:
    return "?" if size is None else show_size(size)


def _ends(rows: list[tuple[str, ...]], first: int) -> list[tuple[str, ...]]:
    """The first rows of a long table and its last three."""
    return rows if len(rows) <= _MOST_ROWS else [*rows[:first], ("...", *[""] * (len(rows[0]) - 1)), *rows[-3:]]


def _remarks(each: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Notes and warnings: what is true of every output once, the rest with the output's name."""
    for kind in ("note", "warning"):
        for facts in each:
            for text in facts[f"{kind}s"]:
                everywhere = all(text in other[f"{kind}s"] for other in each)
                if not everywhere:
                    yield f"{kind}: {printable(facts['out'])}: {text}"
                elif facts is each[0]:
                    yield f"{kind}: {text}"


def _parts_facts(plan: Plan, parts: Sequence[Part]) -> dict[str, Any]:
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
    most = max(parts, key=lambda part: part.moved).matrices
    return {
        "count": len(parts),
        "imbalance": max(moved) / mean - 1 if mean else 0.0,
        "imbalance_of_others": max(others) * len(others) / sum(others) - 1 if sum(others) else 0.0,
        "largest": plan.matrices.name(max(most, key=plan.matrices.bytes_of)) if most else "",
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


def _parts_lines(facts: dict[str, Any]) -> list[str]:
    """The same for people."""
    parts = facts["parts"]
    rows: list[tuple[str, ...]] = [
        (str(part["part"]), show_size(part["read"]), show_size(part["write"]), f"{part['shards']} ({show_size(part['shard_bytes'])})")
        for part in parts
    ]
    alone = [str(part["part"]) for part in parts if part["alone"]]
    imbalance = f"imbalance {facts['imbalance_of_others']:.1%}"
    if alone:
        which = f"part{'s' * (len(alone) > 1)} {', '.join(alone)}"
        imbalance += f" without {which}, which {'are' if len(alone) > 1 else 'is'} up to {1 + facts['imbalance']:.2f} x the mean"
        moved = [part["read"] + part["write"] for part in parts]
        most = sum(moved) // max(*moved, 1)
        imbalance += f": {facts['largest']} is never cut; its {show_size(max(moved))} are the least of a part, so more than {most} workers"
        imbalance += " gain nothing"
    return [
        "",
        *table(_ends(rows, _MOST_ROWS // 2), ("part", "read", "write", "source files")),
        f"parts    {facts['count']}; {imbalance}",
        f"reads    {facts['read_amplification']:.2f} x the source; "
        f"source files fetched {facts['shards_fetched']:.2f} x, if nobody kept any",
        "",
    ]
