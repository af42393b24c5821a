"""Experts that a source stores as one tensor [E, ...]: engines want one 2-D weight for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from streamconv.checkpoint.derived_rows import Turned, rows_of
from streamconv.checkpoint.rows import Extent, SourceTensor
from streamconv.quants.decoded_rows import DecodedTensor, TurnedMx
from streamconv.targets.hf.sources import Weight
from streamconv.targets.hf.stored import Stored

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_TRANSPOSED = ("llama4", "llama4_text", "gpt_oss", "openai_privacy_filter", "qwen3_vl_moe", "qwen3_vl_moe_text")
"""Model types that store stacked experts as [E, in, out], where the sizes do not tell."""
_UPRIGHT = ("gemma4", "gemma4_text")
"""Model types that store them as [E, out, in], and of which transformers reads no others."""
_EITHER = ("qwen3_vl_moe_text",)
"""Model types that different versions of transformers store differently, where they are not the text model of a larger one."""
_BIASED = ("gpt_oss", "openai_privacy_filter")
_ALTERNATING = ("gpt_oss",)
"""Model types whose gate and up rows take turns; elsewhere the gate is the first half."""


class _Rows(NamedTuple):
    """Output features first, first + step, ... of an expert."""

    first: int
    step: int
    taken: int


class StackedForm(NamedTuple):
    """How transformers stores the unquantized experts of a model type: as stacked tensors, and it starts others with random values.

    Attributes:
        transposed: [E, in, out]; None: not known.
        alternating: gate and up rows take turns.
        biased: there are biases.
    """

    transposed: bool | None
    alternating: bool
    biased: bool


def stacked_form(config: Mapping[str, Any]) -> StackedForm | None:
    """The form of a model's stacked experts; None where transformers reads experts apart, or that is not known."""
    types = _model_types(config)
    if not types & {*_TRANSPOSED, *_UPRIGHT}:
        return None
    transposed = None if types <= set(_EITHER) else bool(types & set(_TRANSPOSED))
    return StackedForm(transposed, bool(types & set(_ALTERNATING)), bool(types & set(_BIASED)))


def _model_types(config: Mapping[str, Any]) -> set[str]:
    named = [part.get("model_type") for part in (config.get("text_config"), config) if isinstance(part, dict)]
    return {kind for kind in named if isinstance(kind, str)}


def unstack(stored: Stored, config: Mapping[str, Any]) -> None:
    """`X.experts.gate_up_proj` -> `X.experts.{e}.gate_proj.weight`, `.up_proj.weight`; `X.experts.down_proj`, and biases, likewise.

    What is neither [E, out, in] nor [E, in, out] by the config's hidden size stays as it is.
    """
    text = config.get("text_config")
    parts = [part for part in (text, config) if isinstance(part, dict)]
    hidden = next((part["hidden_size"] for part in parts if "hidden_size" in part), None)
    types = _model_types(config)
    alternating = bool(types & set(_ALTERNATING))
    names = [name for name in stored.order if len(stored.form(name).shape) == 3]
    turned = dict(_orientations(((name, stored.form(name).shape) for name in names), hidden))
    for name in names:
        stem = name.removesuffix(".weight")
        module, _, last = stem.rpartition(".")
        whole = stored.weights[name]
        if not module.endswith("experts") or last not in _PARTS or not isinstance(whole, SourceTensor | TurnedMx):
            continue
        if hidden is not None and hidden not in whole.shape[1:]:
            continue
        transposed = turned.get(module, bool(types & set(_TRANSPOSED)))
        outs = whole.shape[2 if transposed else 1]
        made = list(_named(module, last, outs, alternating))
        _split(stored, name, made, transposed)
        if f"{stem}_bias" in stored.order:
            _split_bias(stored, f"{stem}_bias", made)


def _orientations(shapes: Iterable[tuple[str, tuple[int, ...]]], hidden: object) -> Iterator[tuple[str, bool]]:
    """(experts, whether they are [E, in, out]), where the hidden size tells: of two tensors one may be square, and both lie alike."""
    for name, (_, first, second) in shapes:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        if last in _PARTS and first != second and hidden in (first, second):
            yield module, hidden == (first if last == "gate_up_proj" else second)


def _named(module: str, last: str, outs: int, alternating: bool) -> Iterator[tuple[str, str, _Rows]]:
    """(what comes before an expert's number, after it, which of its output features) of each part."""
    parts = _PARTS[last]
    each = outs // len(parts)
    for number, part in enumerate(parts):
        yield module, part, _Rows(number, len(parts), each) if alternating else _Rows(number * each, 1, each)


def _split(stored: Stored, name: str, parts: list[tuple[str, str, _Rows]], transposed: bool) -> None:
    whole, file = stored.take(name)
    for expert in range(whole.shape[0]):
        for module, part, rows in parts:
            made = f"{module}.{expert}.{part}.weight"
            weight = _expert(whole, made, expert, rows, transposed)
            stored.put(made, weight, (weight.rows, weight.cols), file)


def _split_bias(stored: Stored, name: str, parts: list[tuple[str, str, _Rows]]) -> None:
    """A bias [E, out]."""
    whole, file = stored.take(name)
    experts, outs = whole.shape
    assert isinstance(whole, SourceTensor)
    for expert in range(experts):
        for module, part, rows in parts:
            made = f"{module}.{expert}.{part}.bias"
            stored.put(made, rows_of(whole, made, expert * outs + rows.first, (rows.taken, 1), rows.step), (rows.taken,), file)


def _expert(whole: Weight, name: str, expert: int, rows: _Rows, transposed: bool) -> Weight:
    """Some output features of an expert, [out, in]."""
    if isinstance(whole, TurnedMx):  # stored as [E, out, in / 32, ...]
        _, k, n = whole.shape
        first = expert * n + rows.first
        codes = rows_of(whole.codes, name, first, (rows.taken, k // 2), rows.step)
        scales = rows_of(whole.scales, name, first, (rows.taken, k // 32), rows.step)
        return DecodedTensor(name, whole.dtype, (rows.taken, k), codes, "e2m1", scales, 1, 32, sound=whole.sound)
    assert isinstance(whole, SourceTensor)
    if not transposed:
        outs, cols = whole.shape[1:]
        return rows_of(whole, name, expert * outs + rows.first, (rows.taken, cols), rows.step)
    cols, outs = whole.shape[1:]
    piece = whole.pieces[0]
    begin = piece.begin + (expert * cols * outs + rows.first) * whole.dtype.itemsize
    return Turned(name, whole.dtype, (rows.taken, cols), (Extent(piece.shard, begin, cols, outs),), 0, rows.step)
