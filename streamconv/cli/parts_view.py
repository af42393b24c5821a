"""How a plan is cut into parts, for `streamconv plan --parts N`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamconv.cli.view import table
from streamconv.memory import show_size
from streamconv.planning.parts import Part
from streamconv.planning.plan import Plan

_SHOWN = 20


def content(plan: Plan, parts: Sequence[Part]) -> dict[str, Any]:
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


def lines(told: dict[str, Any]) -> list[str]:
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
