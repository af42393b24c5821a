"""A Hugging Face directory without streamconv.json against its source: every tensor's values, a quantized weight's decoded.

How another tool rounds is not known, and what it leaves in its files is no proof. So values are held against what the format reaches
on the same weights: a tensor must come about as near to its source as the nearest codes do, each of its rows too; and where all but a
few values lie within a step of the source's, so must these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv import memory
from streamconv.checkpoint.dtypes import F32, DType
from streamconv.checkpoint.quantized import stated_in
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.source_tensors import SourceTensors
from streamconv.errors import BudgetError, CheckpointError, UsageError, printable
from streamconv.lazy import np
from streamconv.natural import natural
from streamconv.options import Resources
from streamconv.planning import memory_plan
from streamconv.progress import Meter
from streamconv.run import source_record
from streamconv.targets.hf.check import config_differences
from streamconv.targets.hf.model_types import text_config
from streamconv.targets.hf.sources import Weight
from streamconv.targets.hf.stacked import unstack
from streamconv.targets.hf.stored import stored_weights
from streamconv.targets.hf.target import HuggingFace
from streamconv.verification.difference import numbers, opened, read_elements
from streamconv.verification.measured import Distance, decibels
from streamconv.verification.nearest import Format, format_of, nearest
from streamconv.verification.side import Side
from streamconv.verification.verdict import TensorError, Verdict

if TYPE_CHECKING:
    Floats = np.ndarray[Any, np.dtype[np.float64]]

_ELEMENT = 160
"""Working memory for each element of a block, bytes."""
_BLOCK = 1 << 18
_ROW, _FEW = 16.0, 0.01
"""A row's noise over that of the nearest codes; the share of values off by more than a step that is damage and no method."""
_EPS = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8, "F64": 2.0**-53}


@dataclass(slots=True)
class _Compared(Distance):
    """A tensor compared; rows with what no format gives, and values off by more than a step."""

    allowed: float = 0.0
    rows: int = 0
    bad_row: int | None = None
    off: int = 0
    off_row: int | None = None
    odd: int = 0
    count: int = 0

    def wrong(self) -> str:
        """Why these are not the source's values, in words that follow the name; "" if they are."""
        if self.odd:
            return f": {self.odd} values are not finite, and those of the source are"
        if self.noise > self.allowed:
            best = decibels(self.signal, self.allowed)
            return " is not the source's" + (f", expected {best:.1f} dB or more" if math.isfinite(best) else "")
        if self.bad_row is not None:
            return f": row {self.bad_row} is not the source's"
        if self.off and self.off <= max(1, int(_FEW * self.count)):
            return f": {self.off} values are off by more than a step, the first in row {self.off_row}"
        return ""


def check(folder: Path, config: Mapping[str, Any], source: str | Path, resources: Resources, verdict: Verdict, meter: Meter) -> None:
    """Add what the source says of a directory to a verdict.

    Raises:
        CheckpointError, HubError: the source cannot be read. UsageError: the directory's codes are not decoded here.
        BudgetError: `memory_budget` does not hold the largest rows.
    """
    budget, quantization = resources.memory_budget, stated_in(config)
    with opened(str(source), str(folder), budget) as raw:
        index = raw[0].index
        if not index.views:
            wrong, other = config_differences(config, index.config)
            verdict.problems += wrong
            verdict.warnings += other
        a, b = sides = _unstacked(raw[0], F32), _unstacked(raw[1], F32)
        rounded = _unstacked(raw[0], HuggingFace().model_dtype(index)).weights
        for side in sides:
            if side.note:
                raise UsageError(f"--source: values cannot be compared: {side.note}", hint="leave --source out")
        if resources.source_check:
            meter.begin("checking", sum(shard.size for shard in index.shards))
            source_record.check(index, meter.add)
        meter.begin("comparing", sum(weight.nbytes for weight in a.weights.values()))
        tied = text_config(config).get("tie_word_embeddings") is True
        section = quantization if isinstance(quantization, dict) else {}
        symmetric = section.get("sym") is True or section.get("quant_method") == "compressed-tensors"
        room = (memory_plan.default_budget() if budget is None else budget) - memory.resident() - memory_plan.MARGIN
        for name in sorted({*a.weights, *b.weights}, key=natural):
            first, second = a.weights.get(name), b.weights.get(name)
            if first is None or second is None:
                verdict.problems += _lonely(name, first is None, tied)
            elif (shape := _recorded(name, first.shape)) != second.shape:
                verdict.problems.append(f"{printable(name)} is {list(second.shape)}, and {list(shape)} in the source")
            else:
                _judge(name, first, rounded[name], second, sides, symmetric, room, verdict)
            meter.add(first.nbytes if first is not None else 0)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "awq" and verdict.problems:
        verdict.warnings.append("AutoAWQ rescales input features and the norms before them: its weights are not the source's own")


def _unstacked(side: Side, into: DType) -> Side:
    """The same with stacked experts as a weight each, decoded to a type."""
    try:
        stored = stored_weights(side.index, into)
    except CheckpointError:
        return side
    unstack(stored, side.index.config)
    tensors = SourceTensors(side.index)
    return replace(side, weights=stored.weights, beside={name: tensors[name] for name in stored.dropped})


_ADDED = (".pre_quant_scale", ".k_scale", ".v_scale")
"""What a quantizer adds beside weights that stayed as they are: of a KV cache too."""


def _recorded(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """An expert's bias is [N]; in a stacked one its numbers lie apart, as rows of one."""
    return shape[:1] if name.endswith(".bias") and shape[1:] == (1,) else shape


def _lonely(name: str, added: bool, tied: bool) -> list[str]:
    if added:
        return [] if name.endswith(_ADDED) else [f"{printable(name)} is not in the source"]
    spare = name.endswith("rotary_emb.inv_freq") or (tied and name.endswith("lm_head.weight"))
    return [] if spare else [f"{printable(name)} is missing, the source has it"]


def _judge(
    name: str, a: Weight, rounded: Weight, b: Weight, sides: tuple[Side, Side], symmetric: bool, room: int, verdict: Verdict
) -> None:
    form = format_of(b, sides[1].index.shards, symmetric) if len(b.shape) == 2 else None
    compared = _compare(name, a, b, sides, form, room)
    if compared.wrong() and not isinstance(a, SourceTensor):  # what a quantizer of a quantized source started from
        compared = _compare(name, rounded, b, sides, form, room)
    if not compared.noise and not compared.odd:
        verdict.encoded += isinstance(b, SourceTensor)
        return
    file = sides[1].index.shards[b.pieces[0].shard].path.name
    verdict.errors.append(TensorError(file, name, compared.rows, compared.largest, compared.relative(), compared.snr()))
    if wrong := compared.wrong():
        verdict.problems.append(f"{file}: {printable(name)}{wrong}; largest error {compared.largest:.3g}, SNR {compared.snr():.1f} dB")


def _compare(name: str, a: Weight, b: Weight, sides: tuple[Side, Side], form: Format | None, room: int) -> _Compared:
    cols = b.cols
    unit = math.lcm(a.row_align, b.row_align, form.per_row if form is not None and not form.scale else 1)
    scratch = sum(-(-weight.scratch_row_bytes // max(1, cols)) for weight in (a, b))
    unit = min(unit, max(1, b.rows))
    if room < unit * cols * (_ELEMENT + scratch):
        need = -(-(unit * cols * (_ELEMENT + scratch) + memory.resident() + memory_plan.MARGIN) // memory.MIB) + 2
        raise BudgetError(f"{printable(name)} does not fit into the memory budget", hint=f"--memory-budget {need}MiB")
    step = max(unit, min(_BLOCK, room // (_ELEMENT + scratch)) // max(1, cols) // unit * unit)
    compared = _Compared(rows=b.rows, count=b.rows * cols)
    for start in range(0, b.rows, step):
        stop = min(start + step, b.rows)
        raw = [read_elements(w, side.index.shards, start * cols, stop * cols) for w, side in zip((a, b), sides, strict=True)]
        want, got = (numbers(data, w.dtype).reshape(-1, cols) for data, w in zip(raw, (a, b), strict=True))
        if form is not None and form.order is not None:
            places = np.argsort(form.order, kind="stable")
            want, got = want[:, places], got[:, places]
        with np.errstate(all="ignore"):
            _block(compared, want, got, start, form, _EPS.get(b.dtype.name, 0.0) if a.dtype != b.dtype else 0.0)
    return compared


def _block(compared: _Compared, want: Floats, got: Floats, start: int, form: Format | None, eps: float) -> None:
    fine = np.isfinite(want)
    compared.odd += int((fine & ~np.isfinite(got)).sum())
    same = ~fine & ((want == got) | (np.isnan(want) & np.isnan(got)))
    want, got = np.where(fine, want, 0.0), np.where(same, 0.0, np.where(np.isfinite(got), got, 0.0))
    gap = np.abs(got - want)
    noise = np.einsum("ij,ij->i", gap, gap)
    compared.signal += float((want * want).sum())
    compared.peak = max(compared.peak, float(np.abs(want).max(initial=0.0)))
    compared.largest = max(compared.largest, float(gap.max(initial=0.0)))
    compared.noise += float(noise.sum())
    if form is None:
        limit = np.abs(want) * eps + (2.0**-25 if eps == _EPS["F16"] else 0.0)
        over = gap > limit
        compared.allowed += float((limit * limit).sum())
        if over.any() and compared.bad_row is None:
            compared.bad_row = start + int(over.any(1).argmax())
        return
    best, bound = nearest(want, form)
    steps = (bound * bound).sum(1)  # rounding to the nearest of even steps leaves 1/31 of it
    reached = np.maximum(((best - want) ** 2).sum(1), steps / 40)
    spare = want.shape[1] * form.floor**2
    compared.allowed += float(reached.sum()) * 10 ** (form.slack / 10) + spare * len(want)
    bad = noise > np.maximum(_ROW * reached, steps / 2) + spare
    if bad.any() and compared.bad_row is None:
        compared.bad_row = start + int(bad.argmax())
    over = gap > bound + form.floor
    if over.any():
        compared.off_row = start + int(over.any(1).argmax()) if compared.off_row is None else compared.off_row
        compared.off += int(over.sum())
