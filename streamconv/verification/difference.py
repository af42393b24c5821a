"""Two checkpoints, tensor by tensor: what only one of them has, other shapes and dtypes, and how far values are apart.

Both sides are streamed in blocks of elements, a quantized weight as float32 values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from streamconv import memory
from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.index import description_size
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.stored_codes import as_float
from streamconv.errors import BudgetError, printable
from streamconv.lazy import np
from streamconv.natural import natural
from streamconv.open_plan import KERNELS, loading
from streamconv.planning import memory_plan
from streamconv.progress import Meter, unwatched
from streamconv.targets.hf.sources import Weight
from streamconv.verification.side import Side, kind_of, open_sides, settled

if TYPE_CHECKING:
    Floats = np.ndarray[Any, np.dtype[np.float64]]

ELEMENT = 80
"""Working memory for each element of a block, both sides together, bytes."""
_BLOCK = 1 << 18
"""Elements of a block; more leave the cache between one step and the next."""
_HEADERS = 8
"""Bytes of memory for each byte of the headers (measured, rounded up)."""
_JITTER = 2
"""MiB by which the resident set of equal runs differs."""

State = Literal["only in A", "only in B", "shape", "differs", "dtype", "exact"]


@dataclass(slots=True)
class TensorDifference:
    """How a tensor of A compares with the one of the same name in B.

    Attributes:
        state: "differs": bits or values do; "dtype": the values are equal, and stored as another type.
        dtypes, shapes: of A and B, None where there is none.
        differing: elements with other values; `largest` is the largest absolute error among them.
        odd: elements that are NaN or infinite on one side alone; they count in `differing` and in no error.
        relative: the largest error over the largest absolute value of A.
        snr_db: of B against A; None if no value differs, or A holds zeros alone.
    """

    name: str
    state: State
    dtypes: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    differing: int = 0
    odd: int = 0
    largest: float = 0.0
    relative: float = 0.0
    snr_db: float | None = None

    def within(self, tolerance: float | None) -> bool:
        """No value is farther off than `tolerance`; None: the same dtype and the same bits."""
        if tolerance is None or self.state not in ("differs", "dtype"):
            return self.state == "exact"
        return not self.odd and self.largest <= tolerance


@dataclass(slots=True)
class Comparison:
    """Two checkpoints compared.

    Attributes:
        tensors: one for each name of either, in natural order.
        beside: tensors that belong to quantized weights which are stored in another form on the other side.
    """

    tensors: list[TensorDifference] = field(default_factory=list)
    beside: int = 0
    warnings: list[str] = field(default_factory=list)

    def within(self, tolerance: float | None = None) -> bool:
        """Every tensor is, see `TensorDifference.within`."""
        return all(tensor.within(tolerance) for tensor in self.tensors)


def compare(a: str, b: str, budget: int | None = None, meter: Meter | None = None) -> Comparison:
    """Compare two checkpoints of any kind.

    Args:
        a, b: folders, weight files, or models of the Hub; of TensorRT-LLM checkpoints that are cut alike each rank is compared.
        budget: ceiling of the process's resident set, bytes.
        meter: told about progress, in bytes of A.

    Raises:
        CheckpointError, HubError: one cannot be read. BudgetError: its largest row does not fit.
    """
    meter = meter or Meter(unwatched)
    with opened(a, b, budget) as sides:
        comparison = Comparison(warnings=[f"{side.note}; it is compared as it is stored" for side in sides if side.note])
        meter.begin("comparing", sum(weight.nbytes for name, weight in sides[0].weights.items() if name in sides[1].weights))
        step = _Steps(sides, budget)
        for name, first, second in _pairs(*sides, comparison):
            comparison.tensors.append(_compared(name, first, second, sides, step, meter))
    meter.end()
    return comparison


@contextlib.contextmanager
def opened(a: str, b: str, budget: int | None) -> Iterator[tuple[Side, Side]]:
    """Both sides, closed afterwards; where no name is on both, under the names of Hugging Face.

    Raises:
        SourceChangedError: at the end, if a file has changed meanwhile.
    """
    try:
        with memory.bounded(budget):
            sides = open_sides(a, b)
            if not any(name in sides[1].weights for name in sides[0].weights):
                sides = settled(sides[0]), settled(sides[1])
    except BudgetError as error:
        described = sum(description_size(Path(side)) for side in (a, b))
        enough = memory.resident() + loading(*KERNELS) + memory_plan.MARGIN + _BLOCK * ELEMENT + _HEADERS * described
        error.hint = f"a budget of {-(-enough // memory.MIB)}MiB is enough to begin"
        raise
    try:
        yield sides
        for side in sides:
            for shard in side.index.shards:
                shard.check_unchanged()
    finally:
        for side in sides:
            side.index.close()


def _pairs(a: Side, b: Side, comparison: Comparison) -> Iterator[tuple[str, Weight | None, Weight | None]]:
    """What is compared, in natural order. Scales count where both sides store the weight in one form; else its values say it all."""
    names = {*a.weights, *b.weights, *a.beside, *b.beside}
    alike = {name.rpartition(".")[0] for name in a.weights if a.form(name) is not None and a.form(name) == b.form(name)}
    owners = {module.rpartition(".")[0] for module in alike} | alike
    for name in sorted(names, key=natural):
        first, second = (side.weights.get(name) or side.beside.get(name) for side in (a, b))
        of_codes = all(name in side.beside or name not in side.weights for side in (a, b))
        if of_codes and name.rpartition(".")[0] not in owners:
            comparison.beside += 1
        else:
            yield name, first, second


class _Steps:
    """How many elements of two tensors are compared at a time."""

    def __init__(self, sides: tuple[Side, Side], budget: int | None) -> None:
        import numpy as np  # noqa: F401  what is loaded is resident before the first block

        self._total = memory_plan.default_budget() if budget is None else budget
        decodes = any(not isinstance(weight, SourceTensor) for side in sides for weight in side.weights.values())
        load = loading(*KERNELS) if decodes else 0
        self._base = memory.resident() + load + memory_plan.MARGIN

    def of(self, name: str, a: Weight, b: Weight) -> int:
        """Elements of a block: whole rows where one side cannot do with less.

        Raises:
            BudgetError: not even the smallest block fits.
        """
        units = [1 if _flat(weight) else weight.row_align * weight.cols for weight in (a, b)]
        unit = math.lcm(*units)
        scratch = sum(-(-weight.scratch_row_bytes // max(1, weight.cols)) for weight in (a, b))
        room = self._total - self._base
        if room < unit * (ELEMENT + scratch):
            need = -(-(self._base + unit * (ELEMENT + scratch)) // memory.MIB) + _JITTER
            problem = f"--memory-budget {memory.show_size(self._total)} cannot work: {printable(name)} does not fit"
            raise BudgetError(problem, hint=f"a budget of {need}MiB is enough")
        return max(unit, min(_BLOCK, room // (ELEMENT + scratch)) // unit * unit)


def _flat(weight: Weight) -> bool:
    """Its elements lie one after the other in the files, so that any range of them can be read."""
    return isinstance(weight, SourceTensor) and weight.as_stored and weight.axis == 0


def read_elements(weight: Weight, shards: tuple[Shard, ...], begin: int, end: int) -> Any:
    """Elements [begin, end), uint8."""
    cols = 1
    if isinstance(weight, SourceTensor) and _flat(weight):
        pieces = tuple(piece._replace(rows=piece.rows * piece.cols, cols=1) for piece in weight.pieces)
        weight = SourceTensor(weight.name, weight.dtype, (weight.rows * weight.cols,), pieces)
    else:
        cols = weight.cols
    out = np.empty((end - begin) * weight.dtype.itemsize, np.uint8)
    scratch = np.empty((end - begin) // cols * weight.scratch_row_bytes, np.uint8)
    weight.read(shards, begin // cols, end // cols, out, scratch)
    return out


def _compared(name: str, a: Weight | None, b: Weight | None, sides: tuple[Side, Side], steps: _Steps, meter: Meter) -> TensorDifference:
    dtypes = None if a is None else kind_of(a), None if b is None else kind_of(b)
    shapes = None if a is None else a.shape, None if b is None else b.shape
    if a is None or b is None:
        return TensorDifference(name, "only in B" if a is None else "only in A", dtypes, shapes)
    if a.shape != b.shape:
        return TensorDifference(name, "shape", dtypes, shapes)
    difference = TensorDifference(name, "exact", dtypes, shapes)
    count, step = math.prod(a.shape), steps.of(name, a, b)

    def blocks() -> Iterator[tuple[Any, Any]]:
        for begin in range(0, count, step):
            end = min(begin + step, count)
            yield read_elements(a, sides[0].index.shards, begin, end), read_elements(b, sides[1].index.shards, begin, end)

    if a.dtype == b.dtype and all(bool((first == second).all()) for first, second in blocks()):
        meter.add(a.nbytes)
        difference.state = "exact" if dtypes[0] == dtypes[1] else "dtype"
        return difference
    signal = noise = peak = 0.0
    for first, second in blocks():
        want = numbers(first, a.dtype)
        power, top = _power(want)
        signal, peak = signal + power, max(peak, top)
        noise += _gap(difference, want, numbers(second, b.dtype))
        meter.add(first.size)
    difference.relative = difference.largest / peak if peak else 0.0
    difference.snr_db = 10 * math.log10(signal / noise) if signal and noise else None
    difference.state = "dtype" if not difference.differing and dtypes[0] != dtypes[1] else "differs"
    return difference


def _power(values: Floats) -> tuple[float, float]:
    """Sum of squares and largest absolute value of what is finite."""
    size = np.abs(values)
    size[~np.isfinite(size)] = 0.0
    with np.errstate(over="ignore"):
        return float(np.dot(size, size)), float(size.max(initial=0.0))


def _gap(difference: TensorDifference, want: Floats, got: Floats) -> float:
    """Add the errors of a block; gives the sum of their squares."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(got - want)
        gap[(want == got) | (np.isnan(want) & np.isnan(got))] = 0.0  # infinite on both sides, too
        odd = ~np.isfinite(gap)
        difference.differing += int(np.count_nonzero(gap))
        difference.odd += int(np.count_nonzero(odd))
        gap[odd] = 0.0
        difference.largest = max(difference.largest, float(gap.max(initial=0.0)))
        return float(np.dot(gap, gap))


def numbers(stored: Any, dtype: DType) -> Floats:
    """Stored elements (uint8 bytes) as float64."""
    if dtype.name == "F8_E5M2":  # the upper half of a float16
        values = (stored.astype(np.uint16) << np.uint16(8)).view(np.float16)
    else:
        values = as_float(stored, dtype.name) if dtype.numpy is None else stored.view(dtype.numpy)
    floats: Floats = values.astype(np.float64)
    return floats
