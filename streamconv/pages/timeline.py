"""Memory, rates and processors over time, from the samples of a trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from streamconv.memory import show_size
from streamconv.memory_trace import Sample
from streamconv.pages.chart import Line, over_time
from streamconv.pages.page import Section, Table

_BINS = 60
"""Intervals that rates are averaged over."""
_ROWS = 40
"""Rows of a table over time."""


def phases(samples: Sequence[Sample]) -> list[tuple[str, float, float]]:
    """(phase, begin, end) in seconds."""
    bands: list[tuple[str, float, float]] = []
    for sample in samples:
        before, begin, end = bands[-1] if bands else ("", 0.0, 0.0)
        if bands and sample.phase in (before, "done"):
            bands[-1] = (before, begin, sample.time)
        elif sample.phase != "done":
            bands.append((sample.phase, end, sample.time))
    return bands


def sections(samples: Sequence[Sample]) -> list[Section]:
    """Memory over time, and what was read, written and computed meanwhile."""
    if len(samples) < 2:
        return []
    return [_memory(samples), *_rates(samples)]


def _memory(samples: Sequence[Sample]) -> Section:
    lines: Mapping[str, Sequence[float | None]] = {
        "resident": [float(sample.resident) for sample in samples],
        "cgroup (page cache included)": [None if sample.cgroup is None else float(sample.cgroup) for sample in samples],
        "device": [float(sample.device) for sample in samples],
        "child processes": [float(sample.children) for sample in samples],
        "budget": [None if sample.budget is None else float(sample.budget) for sample in samples],
    }
    kept = {name: values for name, values in lines.items() if any(values)}
    own = max([max(sample.resident + sample.children, sample.budget or 0, sample.device) for sample in samples])
    cgroup = max([sample.cgroup or 0 for sample in samples])
    left_out = ""
    if cgroup > 8 * own:  # other processes or a large page cache would flatten what the page is about
        kept = {name: values for name, values in kept.items() if not name.startswith("cgroup")}
        left_out = f" The cgroup is not drawn: with {show_size(cgroup)}, page cache and other processes included, it is far above."
    bands = phases(samples)
    drawn = [Line(name, values, "limit" if name == "budget" else "") for name, values in kept.items()]
    picture = over_time("Memory over time", [sample.time for sample in samples], drawn, show_size, bands, 1024)
    peak, last = max(sample.peak for sample in samples), next((s.budget for s in reversed(samples) if s.budget), None)
    of = f", {100 * peak / last:.0f} % of the budget of {show_size(last)}" if last else ""
    rows = []
    for group in _groups(samples, _ROWS):
        each: list[int | None] = [max(s.resident for s in group), max(s.cgroup or 0 for s in group) or None]
        each += [max(s.device for s in group), max(s.children for s in group), group[-1].budget]
        rows.append((f"{group[0].time:.1f} - {group[-1].time:.1f}", group[-1].phase, *("-" if not v else show_size(v) for v in each)))
    header = ("seconds", "phase", "resident", "cgroup", "device", "children", "budget")
    durations = "; ".join(f"{name} {stop - start:.1f} s" for name, start, stop in bands)
    text = f"The resident set was at most {show_size(peak)}{of}. Phases: {durations}.{left_out}"
    return Section("Memory over time", text, picture, Table(header, rows, frozenset({2, 3, 4, 5, 6})))


def _groups(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """Neighbouring samples in at most `count` groups of equal time."""
    end = samples[-1].time + 1e-9
    return [[*group] for _, group in itertools.groupby(samples, lambda sample: int(sample.time / end * count))]


def _rates(samples: Sequence[Sample]) -> list[Section]:
    """Differences of counters over intervals; a counter that falls has begun anew."""
    groups = _groups(samples, min(_BINS, max(2, len(samples) // 3)))
    ends = [group[-1] for group in groups]
    if len(ends) < 3:
        return []

    def rate(value: Callable[[Sample], float]) -> list[float | None]:
        rates: list[float | None] = []
        for before, after in itertools.pairwise(ends):
            gone = value(after) - (value(before) if value(after) >= value(before) else 0)
            rates.append(gone / max(after.time - before.time, 1e-3))
        return rates

    times = [(before.time + after.time) / 2 for before, after in itertools.pairwise(ends)]
    moved = {"read": rate(lambda s: s.read), "written": rate(lambda s: s.written)}
    busy, bands = rate(lambda s: s.cpu), phases(samples)
    lines = [Line(f"{name}, bytes a second", values) for name, values in moved.items()]
    picture = over_time("Bytes read and written a second", times, lines, lambda v: f"{show_size(v)}/s", bands, 1024)
    every = max(1, len(times) // _ROWS)
    rows = [
        (f"{times[i]:.1f}", *(f"{show_size(values[i] or 0)}/s" for values in moved.values()), f"{busy[i] or 0:.2f}")
        for i in range(0, len(times), every)
    ]
    table = Table(("seconds", "read", "written", "processors busy"), rows, frozenset({1, 2, 3}))
    work = over_time("Processors busy", times, [Line("processors busy", busy)], lambda v: f"{v:g}", bands)
    return [
        Section("Read and write rates", "Bytes of the source and of the output, by the count of the run.", picture, table),
        Section("Processors", "Seconds of processor time a second, over all threads of the process.", work, table),
    ]
