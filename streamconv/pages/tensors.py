"""Tensors by the kind of their module and by their layer: sizes before and after, and how far values are from the source's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streamconv.memory import show_size
from streamconv.natural import natural
from streamconv.pages.chart import axes, bars, heatmap
from streamconv.pages.page import Section, Table
from streamconv.reports import TensorError

_KINDS = (
    ("norms", r"norm|(^|\.)ln_|layernorm"),
    ("experts", r"expert|block_sparse_moe|\bmoe\b"),
    ("attention", r"attn|attention|qkv|(^|\.)[qkvo]_proj|\.w[qkvo]\."),
    ("MLP", r"mlp|feed_forward|ffn|(gate|up|down)_proj"),
    ("output head", r"lm_head|output\.weight|(^|\.)head\b"),
    ("embedding", r"embed|wte|tok_emb"),
)
_LAYER = re.compile(r"^(?:.*?\.)??(?:layers|h|blocks|block)\.(\d+)\.")
_WORST = 10


def kind(name: str) -> str:
    """What a tensor belongs to, for people."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


def place(name: str) -> tuple[str, str]:
    """(layer, module) of a tensor: "12" and "self_attn.q_proj"; of what lies in no layer "-" and the name."""
    match = _LAYER.match(name)
    rest = name[match.end() :] if match else name
    rest = re.sub(r"\.(weight|qweight|weight_packed)$", "", rest)
    return (match[1] if match else "-"), re.sub(r"(?<=\.)\d+(?=\.)", "*", rest)


def sizes(before: Mapping[str, int], after: Mapping[str, int]) -> Section:
    """Bytes by kind of module, of the source and of the output."""
    order = sorted({*before, *after}, key=lambda kind: -max(before.get(kind, 0), after.get(kind, 0)))
    pairs = [(kind, before.get(kind, 0), after.get(kind, 0)) for kind in order]
    total = sum(before.values()), sum(after.values())
    rows = [(kind, *_sizes(*pair)) for kind, *pair in [*pairs, ("all", *total)]]
    picture = bars("Bytes by kind of module", pairs, show_size)
    text = f"{show_size(total[0])} of tensors became {show_size(total[1])}, {100 * total[1] / max(total[0], 1):.1f} %; all ranks together."
    table = Table(("module", "source", "output", "output / source"), rows, frozenset({1, 2, 3}))
    return Section("Size by kind of module", text, picture, table)


def _sizes(before: float, after: float) -> tuple[str, str, str]:
    return show_size(before), show_size(after), f"{100 * after / before:.1f} %" if before else "new"


def errors(tensors: Sequence[TensorError], low: float | None, how: str) -> list[Section]:
    """A heatmap of layers and modules, and the worst tensors.

    Args:
        low: the SNR in dB that was asked for, None if none was.
        how: which rows were compared, one sentence.
    """
    if not tensors:
        return []
    cells: dict[tuple[str, str], float] = {}
    for error in tensors:
        at = place(error.name)
        cells[at] = min(cells.get(at, math.inf), error.snr_db)
    inexact = sum(error.snr_db != math.inf for error in tensors)
    lossy = {column for (_, column), snr in cells.items() if snr != math.inf}
    cells = {at: snr for at, snr in cells.items() if at[1] in lossy or not lossy}
    text = (
        f"Signal to noise of decoded weights against the source's, in dB, the worst of a cell's tensors; more is better, 6 dB are one bit. "
        f"\"=\" is exact. {len(tensors) - inexact} of {len(tensors)} matrices are exact; "
        f"modules that are exact everywhere are left out. {how}"
    ) + (f" What is below {low:g} dB has a frame." if low is not None else "")
    frame = -math.inf if low is None else low
    picture = heatmap("SNR in dB by layer and module", cells, _decibels, frame, high_is_dark=False, span=6)
    sections = [Section("Error by layer and module", text, picture, _by_layer(cells, _spelled))]
    worst = [error for error in sorted(tensors, key=lambda error: error.snr_db)[:_WORST] if error.snr_db != math.inf]
    table = [(e.name, e.file, f"{e.rows}", _spelled(e.snr_db), f"{e.largest:.3g}", f"{e.relative:.3g}") for e in worst]
    if table:
        header = ("tensor", "file", "rows", "SNR dB", "largest error", "relative to the largest value")
        sections.append(Section("Worst tensors", "", "", Table(header, table, frozenset({2, 3, 4, 5}))))
    return sections


def _by_layer(cells: Mapping[tuple[str, str], float], spell: Callable[[float], str]) -> Table:
    """The numbers of a heatmap."""
    rows, columns = axes(cells)
    texts = [(row, *(spell(cells[row, column]) if (row, column) in cells else "" for column in columns)) for row in rows]
    return Table(("layer", *columns), texts, frozenset(range(1, len(columns) + 1)))


def _spelled(snr: float) -> str:
    return "exact" if snr == math.inf else "nothing is left" if snr == -math.inf else f"{snr:.1f}"


def _decibels(value: float, width: float) -> str:
    return "=" if value == math.inf else "-" if not math.isfinite(value) else f"{value:.1f}" if width >= 32 else f"{value:.0f}"


def _short(value: float, _: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}" if value < 100_000 else f"{value:.1e}"


def losses(search: Mapping[str, Any]) -> Section:
    """What a search for INT4 codes lost in each linear layer: all of them where the manifest names them, else the worst."""
    pairs = sorted(search.get("each", search["worst"]).items(), key=lambda pair: natural(pair[0]))
    rows = [(name, f"{each['rtn']:.2%}", f"{each['found']:.2%}") for name, each in [("mean", search["mean"]), *pairs]]
    count = f"{search['linear_layers']} linear layers" + ("" if "each" in search else ", of which the worst are shown")
    text = f"Mean square of what the codes change in a layer's outputs on the text, over that of the outputs; {count}."
    table = Table(("linear layer", "rounded to nearest", search["method"]), rows, frozenset({1, 2}))
    return Section("What INT4 costs", text, "", table)


def ranges(amax: Iterable[tuple[str, float]]) -> list[Section]:
    """A heatmap of the largest absolute inputs of modules. `amax`: (module, largest absolute input)."""
    cells: dict[tuple[str, str], float] = {}
    for name, value in amax:
        at = place(name)
        cells[at] = max(cells.get(at, 0.0), value)
    if not cells:
        return []
    picture = heatmap("Largest absolute input by layer and module", cells, _short, logarithm=True)
    text = "The largest absolute value that entered each linear module, of all channels and samples; of experts the largest of all of them."
    text += " A shade is that of its logarithm."
    return [Section("Largest inputs by layer and module", text, picture, _by_layer(cells, "{:.4g}".format))]
