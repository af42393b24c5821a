"""Figures as SVG. Colours are those of the page, and no figure needs them: lines differ by their dashes and labels, cells hold numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from streamconv.errors import visible
from streamconv.natural import natural

WIDTH, LEFT, RIGHT, TOP = 900, 96, 20, 34
CLASSES = ("a", "b", "c", "d")

Spell = Callable[[float], str]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Line:
    """Values over time; None where there is none."""

    label: str
    values: Sequence[float | None]
    style: str = ""


def text(x: float, y: float, words: str, anchor: str = "start", style: str = "") -> str:
    """A text element."""
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(visible(words))}</text>'


def figure(height: float, title: str, parts: Sequence[str]) -> str:
    """An SVG element that a screen reader can name."""
    name = escape(visible(title), quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'


def ticks(top: float, base: float = 10) -> list[float]:
    """Three to six round values from 0 that reach at least `top`."""
    if top <= 0:
        return [0, 1]
    size = base ** math.floor(math.log(top, base))
    step = next(size * part for part in (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10, 100, 256) if size * part * 5 >= top)
    return [step * number for number in range(math.ceil(top / step) + 1)]


def over_time(
    title: str,
    times: Sequence[float],
    lines: Sequence[Line],
    spell: Spell,
    bands: Sequence[tuple[str, float, float]] = (),
    base: float = 10,
) -> str:
    """Lines over seconds, with the phases shaded in turn and named.

    Args:
        spell: how a value of the vertical axis is written.
        bands: (name, begin, end) in seconds.
        base: 1024 for bytes: what round values are powers of.
    """
    lines = [line for line in lines if any(value is not None for value in line.values)]
    end = max([*times, *(stop for _, _, stop in bands), 1e-3])
    marks = ticks(max([value for line in lines for value in line.values if value is not None] or [1]), base)
    bottom, legend = 270, 308

    def across(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / end

    def up(value: float) -> float:
        return bottom - (bottom - TOP) * value / marks[-1]

    parts = []
    for number, (name, start, stop) in enumerate(bands):
        width = across(stop) - across(start)
        if number % 2 == 0:
            parts.append(f'<rect class="band" x="{across(start):.1f}" y="{TOP - 20}" width="{width:.1f}" height="{bottom - TOP + 20}"/>')
        if width > 7 * len(name):
            parts.append(text(across(start) + 4, TOP - 6, name, style="faint"))
    for value in marks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(text(LEFT - 6, up(value) + 4, spell(value), "end", "faint"))
    for seconds in (mark for mark in ticks(end) if mark <= end):
        parts.append(text(across(seconds), bottom + 16, f"{seconds:g} s", "middle", "faint"))
    at = float(LEFT)
    for number, line in enumerate(lines):
        style = line.style or CLASSES[number % len(CLASSES)]
        parts.append(f'<path class="{style}" d="{_path(times, line.values, across, up)}"/>')
        parts.append(f'<path class="{style}" d="M{at:.0f} {legend - 4}h34"/>' + text(at + 40, legend, line.label))
        at += 58 + 7 * len(line.label)
    return figure(legend + 10, title, parts)


def _path(times: Sequence[float], values: Sequence[float | None], across: Scale, up: Scale) -> str:
    steps, pen = [], "M"
    for seconds, value in zip(times, values, strict=True):
        steps.append(f"{pen}{across(seconds):.1f} {up(value):.1f}" if value is not None else "")
        pen = "L" if steps[-1] else "M"
    return "".join(steps)


def bars(title: str, rows: Sequence[tuple[str, float, float]], spell: Spell) -> str:
    """Two bars for each (name, source, output): one full, one an outline."""
    left, top = 190, 26
    most = max([value for _, *values in rows for value in values] or [1]) or 1
    parts = [f'<rect class="a" x="{left}" y="4" width="14" height="10"/>', text(left + 20, 14, "source")]
    parts += [f'<rect class="b" x="{left + 90}" y="4" width="14" height="10"/>', text(left + 110, 14, "output")]
    for number, (name, before, after) in enumerate(rows):
        y = top + 40 * number
        parts.append(text(left - 8, y + 20, name, "end"))
        for style, value, at in (("a", before, y + 2), ("b", after, y + 18)):
            width = (WIDTH - left - 110) * value / most
            parts.append(f'<rect class="{style}" x="{left}" y="{at}" width="{max(width, 0.5):.1f}" height="13"/>')
            parts.append(text(left + width + 6, at + 11, spell(value), style="faint"))
    return figure(top + 40 * len(rows) + 4, title, parts)


def axes(cells: Mapping[tuple[str, str], float]) -> tuple[list[str], list[str]]:
    """Rows and columns of a heatmap, in natural order."""
    return sorted({row for row, _ in cells}, key=natural), sorted({column for _, column in cells}, key=natural)


def heatmap(
    title: str,
    cells: Mapping[tuple[str, str], float],
    spell: Callable[[float, float], str],
    low: float = -math.inf,
    high_is_dark: bool = True,
    span: float = 0.0,
    logarithm: bool = False,
) -> str:
    """A number and a shade for each (row, column). What is below `low` has a frame.

    Args:
        spell: how a value is written in a cell so many units wide.
        logarithm: shades are of the values' logarithms.
        span: what lies closer together than this has shades that are close together too.
    """
    rows, columns = axes(cells)
    left, top, high = 40, 130, 20
    width = min(90.0, (WIDTH - left - 120) / max(len(columns), 1))  # slanted names need room at the right
    shown = {at: math.log(value) if value > 0 else -math.inf for at, value in cells.items()} if logarithm else cells
    finite = [value for value in shown.values() if math.isfinite(value)]
    least, most = min(finite or [0]), max(finite or [1])
    least = min(least, most - span)
    parts = []
    for number, name in enumerate(columns):
        x, label = left + width * (number + 0.5), name if len(name) <= 26 else "..." + name[-23:]
        parts.append(f'<g transform="translate({x + 4:.1f} {top - 6}) rotate(-40)">{text(0, 0, label)}</g>')
    for i, row in enumerate(rows):
        y = top + high * i
        parts.append(text(left - 6, y + 14, row, "end", "faint"))
        for j, column in enumerate(columns):
            value = cells.get((row, column))
            if value is None:
                continue
            place = shown[row, column]
            part = (place - least) / (most - least) if math.isfinite(place) and most > least else 1.0 - high_is_dark
            shade = 0.06 + 0.5 * (part if high_is_dark else 1 - part)
            kind = "cell low" if value < low else "cell"
            colour = f"rgba(var(--{'low' if value < low else 'heat'}), {shade:.2f})"
            where = f'x="{left + width * j:.1f}" y="{y}" width="{width - 1:.1f}" height="{high - 1}"'
            parts.append(f'<rect class="{kind}" {where} style="fill: {colour}"/>')
            parts.append(text(left + width * (j + 0.5), y + 14, spell(value, width), "middle"))
    return figure(top + high * len(rows) + 6, title, parts)
