"""`streamconv plan` of several outputs: side by side, with the reads that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamconv.allocation import costs_of, estimate_memory
from streamconv.calibration.before import codes_path
from streamconv.calibration.foreseen import Search
from streamconv.checkpoint.index import Index
from streamconv.cli import output, plan_view
from streamconv.cli.view import table
from streamconv.errors import OutputError, printable
from streamconv.estimate import look
from streamconv.execution import choose_device
from streamconv.hub import cache_need
from streamconv.memory import show_size
from streamconv.natural import natural
from streamconv.options import Resources
from streamconv.planning.plan import Plan
from streamconv.planning.reads import Reads
from streamconv.reports import Estimate
from streamconv.run import fs
from streamconv.run.inside import choose
from streamconv.run.output_checks import check_apart, is_made, output_problem
from streamconv.targets.base import Output


def show(
    index: Index,
    outputs: Sequence[Output],
    plans: Sequence[Plan],
    searches: Sequence[Search | None],
    asked: Resources,
    as_json: bool,
) -> None:
    """Print the plans of several outputs, and the search for INT4 codes that each waits for."""
    finished = [is_made(Path(each.out), index.root, plan, index.shards) for each, plan in zip(outputs, plans, strict=True)]
    reads = Reads([plan for plan, done in zip(plans, finished, strict=True) if not done])
    costs = costs_of(reads)
    shares = estimate_memory(reads, asked, costs)
    places: dict[Path | None, int] = {
        Path(one.out): plan.bytes_written for one, plan, done in zip(outputs, plans, finished, strict=True) if not done
    }
    looking = look(index, [*places], reads.nbytes + sum(places.values())) if asked.probe else None
    chosen = choose_device(reads, asked)
    each = [plan_view.content(plan, shares, costs, one.out) for one, plan in zip(outputs, plans, strict=True)]
    for one, plan, search, done, told in zip(outputs, plans, searches, finished, each, strict=True):
        problem = None if done else output_problem(index, plan, one.out)
        if search is not None:
            told["search"] = search.to_json()
            problem = problem or _codes_first(one)
        told |= {"out": one.out, "finished": done, "output_problem": problem}
    try:
        check_apart([choose(Path(fs.named(one.out)).resolve(), fs.Disk()) for one in outputs], index.root)
        crossing = None
    except OutputError as error:
        crossing = error.message
    alone = sum(plan.bytes_read for plan in reads.plans)
    written = sum(plan.bytes_written for plan in reads.plans)
    shared = {name: each[0][name] for name in ("memory", "workers", "largest_tile")}
    content = {"outputs": each, "bytes_to_read": reads.nbytes, "bytes_to_read_apart": alone, "bytes_to_write": written, **shared}
    content |= {"device": chosen.why, "cache": cache_need(index), "output_problem": crossing}
    estimate = looking.estimate(reads, places, costs, shares, bool(chosen.devices)) if looking is not None else None
    content["time"] = dataclasses.asdict(estimate) if estimate is not None else None
    if as_json:
        output.dump(content)
        return
    _lines(plans, searches, content, estimate)


def _codes_first(one: Output) -> str:
    """Why an output that waits for a search is refused beside others."""
    found = printable(str(codes_path(Path(fs.named(one.out)))))
    return f"{printable(one.out)} needs codes=FILE: converted alone, with --text, it leaves them in {found}"


def _lines(plans: Sequence[Plan], searches: Sequence[Search | None], content: dict[str, Any], estimate: Estimate | None) -> None:
    each, memory = content["outputs"], content["memory"]
    output.line(f"{plans[0].family}, {len(plans)} outputs from one read")
    output.line()
    rows = [
        (told["out"], plan.target.headline, plan.dtype.torch, str(len(told["files"])), show_size(plan.bytes_written), _state(told))
        for told, plan in zip(each, plans, strict=True)
    ]
    output.block([*table(rows, ("output", "what", "dtype", "files", "size", "state")), ""])
    modules = sorted({name for plan in plans for name in plan.decisions}, key=natural)
    stored = [(name, *(plan.decisions.get(name, "") for plan in plans)) for name in modules]
    output.block([*table(stored, ("module", *(told["out"] for told in each))), ""])
    output.block(plan_view.check_lines(plans[0]))
    output.line(f"read     {show_size(content['bytes_to_read'])} for all; one after the other {show_size(content['bytes_to_read_apart'])}")
    output.line(f"write    {show_size(content['bytes_to_write'])}")
    output.line(
        f"memory   peak {show_size(memory['peak'])} of {show_size(memory['budget'])}: {show_size(memory['before_first_tile'])} "
        f"before the first tile, {content['workers']} workers x {show_size(memory['tiles'] // content['workers'])}, "
        f"{show_size(memory['margin'])} margin"
    )
    output.line(f"device   {content['device']}")
    if estimate is not None:
        output.line(f"time     {estimate}{'; the searches for codes come before' if any(searches) else ''}")
    for told in each:
        disk = told["disk"]
        free = "?" if disk["free"] is None else show_size(disk["free"])
        output.line(f"disk     {free} free, {show_size(disk['need'])} needed for {printable(told['out'])}")
    for told, search in zip(each, searches, strict=True):
        if search is not None:
            output.block(["", f"{printable(told['out'])} waits for its codes", *search.lines()])
    said = dict[str, None]()
    for kind in ("note", "warning"):
        for told in each:
            for text in told[f"{kind}s"]:
                everywhere = all(text in other[f"{kind}s"] for other in each)
                said[f"{kind}: {text}" if everywhere else f"{kind}: {printable(told['out'])}: {text}"] = None
    output.block(said)
    for problem in filter(None, [content["output_problem"], *(told["output_problem"] for told in each)]):
        output.line(f"warning: convert would refuse these outputs: {problem}")


def _state(told: dict[str, Any]) -> str:
    return "finished, to be skipped" if told["finished"] else "to be written"
