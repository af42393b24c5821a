"""What `streamconv bench` prints, and its page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from streamconv.cli import view
from streamconv.cli.watching import command_line
from streamconv.memory import show_size
from streamconv.pages import host
from streamconv.pages.page import Page, Section, Table

_HEADER = ("job", "seconds", "cp", "ratio", "CPU seconds", "resident", "cgroup peak", "limit")


def _rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for job in found["jobs"]:
        if job["status"]:
            rows.append((job["name"], f"failed with status {job['status']}", "", "", "", show_size(job["peak"]), "", ""))
            continue
        inside = show_size(job["cgroup_peak"]) if job["cgroup_peak"] is not None else "no cgroup"
        times = (f"{statistics.median(job[key]):.2f}" for key in ("seconds", "cp_seconds"))
        limit = show_size(job["limit"]) if job["in_cgroup"] and job["limit"] else "none"
        rows.append((job["name"], *times, f"{job['ratio']:.2f}", f"{job['cpu_seconds']:.2f}", show_size(job["peak"]), inside, limit))
    return rows


def _rates(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, "unknown" if rate is None else f"{show_size(rate)}/s") for name, rate in found["rates"].items()]


def _told(found: dict[str, Any]) -> str:
    runs = len(found["jobs"][0]["seconds"])
    what = f"{found['model']}, {show_size(found['bytes'])}, page cache {found['cache']}"
    return f"{what}; medians of {runs} round{'s' * (runs != 1)}, seconds until the data is on the disk"


def _beside(found: dict[str, Any]) -> list[str]:
    return [
        f"{job['name']}: {other['faster']:.1f} times as fast as {other['name']}, with {other['memory']:.2f} of its memory"
        for job in found["jobs"]
        for other in job["against"]
        if other["faster"] is not None
    ]


def lines(found: dict[str, Any]) -> Iterator[str]:
    """For people."""
    yield from view.table(_rates(found), ("rate", "measured"))
    yield ""
    yield _told(found)
    yield from view.table(_rows(found), _HEADER)
    yield from _beside(found)
    for job in found["jobs"]:
        if job["status"]:
            yield f"{job['name']}: {job['error'].strip()[-300:]}"


def page(found: dict[str, Any]) -> Page:
    """For a browser."""
    numbers = frozenset(range(1, len(_HEADER)))
    sections = [
        Section("Conversions", ". ".join([_told(found), *_beside(found)]) + ".", "", Table(_HEADER, _rows(found), numbers)),
        Section("Rates", "", "", Table(("what", "bytes a second"), _rates(found), frozenset({1}))),
        Section("Command", code=command_line()),
        Section("Machine and versions", "", "", Table(("what", "value"), list(host.facts().items()))),
    ]
    return Page(f"Benchmark of {found['model']}", _told(found), [], sections)
