"""`--verify inline`: each tile is decoded and held against its source while it is hot, before it is written."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

from streamconv.errors import VerifyError, printable
from streamconv.lazy import Bytes, np, torch
from streamconv.planning.memory_plan import CHECK_BYTES, CHECK_ELEMENT
from streamconv.planning.plan import Destination, Plan, RowRange
from streamconv.planning.tasks import EncodeTask
from streamconv.quants.base import Codec, Errors
from streamconv.reports import TensorError
from streamconv.run.encode import Encoded
from streamconv.run.journal import TileRecord
from streamconv.run.order import ReductionResults

_SLACK = 1.001
"""The bounds of codecs are float32."""


class InlineCheck:
    """What decoding found of each matrix of one output. Safe to use from any thread.

    Args:
        least: dB that every quantized matrix must reach, None for what its encoding promises alone.
    """

    def __init__(self, plan: Plan, least: float | None) -> None:
        self._plan, self._least = plan, least
        self._found = {name: array("d", bytes(8 * len(plan.matrices))) for name in ("noise", "signal", "largest", "peak", "rows")}
        self._lock = threading.Lock()

    def tile(self, span: RowRange, encoded: Encoded, block: Bytes, rows: int, results: ReductionResults) -> tuple[float, ...]:
        """Decode what was encoded of rows and compare.

        Args:
            block: their bytes, as of `run.encode.encoded`.

        Returns:
            what the journal keeps of it; empty for a copy.

        Raises:
            VerifyError: a value is farther off than its encoding allows.
        """
        if encoded.task.is_copy:
            return ()
        errors = Errors()
        for part in _blocks(encoded, span, block, rows, results):
            errors.add(part)
        if errors.wrong:
            place = self._plan.matrices[encoded.dests[0].matrix].places[0].tensor
            raise VerifyError(
                f"{printable(place)}: decoded values are up to {errors.largest:.3g} off those of {printable(span.source.name)}, "
                f"whose largest is {errors.peak:.3g}: more than {encoded.task.codec.name} allows",
                hint="memory or processor are at fault, or streamconv is: run it again, and report it if it comes back",
            )
        kept = errors.noise, errors.signal, errors.largest, errors.peak, float(rows)
        self._add(encoded.dests, kept)
        return kept

    def knows(self, done: TileRecord, tasks: Iterable[EncodeTask]) -> bool:
        """An earlier run looked at this tile, too; `tasks` are those of its span."""
        sizes = [0 if task.is_copy else 5 for task in tasks]
        return sizes == [len(kept) for kept in done.errors]

    def resumed(self, done: TileRecord, dests_of: Iterable[Sequence[Destination]]) -> None:
        """Take what an earlier run found of a tile that this run knows, for the matrices that took what each task made."""
        for dests, kept in zip(dests_of, done.errors, strict=True):
            if kept:
                self._add(dests, kept)

    def _add(self, dests: Sequence[Destination], kept: Sequence[float]) -> None:
        with self._lock:
            for dest in dests:
                for (name, values), value in zip(self._found.items(), kept, strict=True):
                    total = values[dest.matrix]
                    values[dest.matrix] = max(total, value) if name in ("largest", "peak") else total + value

    def snr(self, matrix: int) -> float:
        """Signal to noise of a matrix, dB; infinite if it is exact."""
        noise, signal = self._found["noise"][matrix], self._found["signal"][matrix]
        if noise == 0:
            return math.inf
        return 10 * math.log10(signal / noise) if signal else -math.inf

    def errors(self) -> Iterator[TensorError]:
        """Of each matrix that was compared."""
        for number, matrix in enumerate(self._plan.matrices):
            if rows := int(self._found["rows"][number]):
                largest, peak = self._found["largest"][number], self._found["peak"][number]
                file, relative = self._plan.files[matrix.file].name, largest / peak if peak else 0.0
                yield TensorError(file, matrix.places[0].tensor, rows, largest, relative, self.snr(number))

    def finish(self) -> None:
        """All tiles are done. Raises VerifyError: names every matrix that is below the least SNR."""
        least = self._least
        if least is None:
            return
        every = list(self.errors())
        low = sorted((error for error in every if error.snr_db < least), key=lambda error: error.snr_db)
        if low:
            worst = ", ".join(f"{printable(error.name)} ({error.file}) {error.snr_db:.1f} dB" for error in low[:5])
            raise VerifyError(
                f"{len(low)} of {len(every)} matrices are below --min-snr {least:g}, the worst: {worst}",
                hint="a finer format (--quant, --group-size), or --ignore these modules where the target has it",
            )

    def manifest(self) -> Mapping[str, Mapping[str, float | str]]:
        """File -> tensor -> SNR in dB, to a hundredth; "exact" where nothing was lost."""
        values: dict[str, dict[str, float | str]] = {}
        for error in self.errors():
            snr = error.snr_db
            values.setdefault(error.file, {})[error.name] = round(snr, 2) if math.isfinite(snr) else "exact" if snr > 0 else "none"
        return values


def _blocks(encoded: Encoded, span: RowRange, block: Bytes, rows: int, results: ReductionResults) -> Iterator[Errors]:
    """The errors of rows, as many at a time as the working memory holds."""
    task = encoded.task.bound(results, span.source.name)
    codec, columns, width = task.codec, task.cols, task.width
    compare = codec.error_kernel(span.source.dtype)
    stored = task.parts
    screen = codec.screen(span.source.dtype) if compare is None and len(columns) == 1 else None
    if screen is not None:
        start, stride = columns[0][0], span.source.cols
        flat = block[: rows * span.row_bytes].view(span.source.dtype.storage)
        quick = screen.errors(span.source.dtype, flat, start, stride, rows, width, encoded.parts)
        if quick is not None:
            yield quick
            return
    step = rows
    if compare is None or len(columns) > 1:
        step = max(codec.row_align, CHECK_BYTES // (width * CHECK_ELEMENT) // codec.row_align * codec.row_align)
    for at in range(0, rows, step):
        stop = min(at + step, rows)
        source = block[at * span.row_bytes : stop * span.row_bytes]
        ends = [(at // part.record_rows * part.record_bytes, -(-stop // part.record_rows) * part.record_bytes) for part in stored]
        parts = [data[first:last] for data, (first, last) in zip(encoded.parts, ends, strict=True)]
        if compare is None:
            yield _decoded(codec, span, source, columns, stop - at, parts)
            continue
        start, stride = columns[0][0], span.source.cols
        if len(columns) > 1:
            item, table = span.source.dtype.itemsize, source.reshape(stop - at, span.row_bytes)
            source = np.concatenate([table[:, a * item : b * item] for a, b in columns], 1).reshape(-1)
            start, stride = 0, width
        yield compare(source.view(span.source.dtype.storage), start, stride, stop - at, width, parts)


def _decoded(
    codec: Codec, span: RowRange, source: Bytes, columns: Sequence[tuple[int, int]], rows: int, parts: Sequence[Bytes]
) -> Errors:
    """The definition: `decode` against `values`, and the bound that is `error`."""
    whole = torch.from_numpy(source).view(getattr(torch, span.source.dtype.torch)).reshape(rows, span.source.cols)
    part = torch.cat([whole[:, a:b] for a, b in columns], 1)
    want = codec.values(part)
    got = codec.decode([torch.from_numpy(data) for data in parts], rows, want.shape[1])
    sound = torch.isfinite(want)
    fine = sound & torch.isfinite(got)
    want, got = (torch.where(fine, values, 0.0).double() for values in (want, got))
    gap = got - want
    if not gap.numel():
        return Errors()
    bound = torch.nan_to_num(codec.error(part).expand(gap.shape).double(), nan=0.0, posinf=0.0) * _SLACK
    wrong = int((gap.abs() > bound).sum()) + (int((sound & ~fine).sum()) if codec.quantizes else 0)
    return Errors(float((gap * gap).sum()), float((want * want).sum()), float(gap.abs().max()), float(want.abs().max()), wrong)
