"""What differences between an output and its source mean: bytes that are wrong, or another tool's values that are as good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streamconv.checkpoint.header_parse import Header
from streamconv.planning.plan import PartLocation, Plan
from streamconv.quants.base import Codec
from streamconv.run.compared import Compared, Difference
from streamconv.verification import measured
from streamconv.verification.verdict import Verdict

_SAMPLE = 128 << 10
"""Elements of a matrix that are decoded to show its error, where nothing differs."""
_SLACK = 0.5
"""dB by which another tool's values may be worse than ours, within the error of the format."""


def rows_to_decode(plan: Plan, sink: Compared, foreign: bool) -> dict[int, list[tuple[int, int]]]:
    """Matrix -> rows to decode: the first ones, and what differs (of our own checkpoints the first of it, which shows by how much)."""
    chosen = {}
    for number, matrix in enumerate(plan.matrices):
        sample = max(matrix.codec.row_align, _SAMPLE // max(matrix.cols, 1))
        rows = [(0, min(sample, matrix.filled))]
        for place in matrix.places:
            difference = sink.differences.get((plan.files[matrix.file].name, place.tensor))
            if difference is not None:
                differ = _rows(difference, place)
                rows += differ if foreign else [(differ[0][0], min(differ[0][0] + sample, matrix.filled))]
        chosen[number] = _merged(rows)
    return chosen


def _rows(difference: Difference, place: PartLocation) -> list[tuple[int, int]]:
    """Rows of a tensor with differences in them, ascending."""
    return _merged([place.rows(begin, end) for begin, end in difference.places])


def _merged(rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(rows):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def judge(
    plan: Plan, headers: Sequence[Header], sink: Compared, errors: Mapping[int, measured.Error], verdict: Verdict, foreign: bool
) -> None:
    entries = {file.name: header.tensors for file, header in zip(plan.files, headers, strict=True)}
    sizes = {key: entries[key[0]][key[1]].end - entries[key[0]][key[1]].begin for key in sink.differences}
    left = dict(sink.differences)
    as_good = 0
    for number, matrix in enumerate(plan.matrices):
        for place in matrix.places:
            key = (plan.files[matrix.file].name, place.tensor)
            difference = left.pop(key, None)
            if difference is None:
                continue
            error = errors.get(number)
            padded = any(last > matrix.filled for _, last in _rows(difference, place))
            if foreign and error is not None and not padded and _as_good(matrix.codec, error):
                as_good += 1
                continue
            row = place.rows(difference.first, difference.first + 1)[0]
            where = f"the first in row {row} of {matrix.rows}" if matrix.rows > 1 else f"the first is byte {difference.first}"
            by = f"; largest error {error.largest:.3g}, SNR {error.snr():.1f} dB" if error is not None else ""
            verdict.problems.append(_told(key, difference, sizes[key], where) + by)
    for key, difference in left.items():
        verdict.problems.append(_told(key, difference, sizes[key], f"the first is byte {difference.first}"))
    if as_good:
        verdict.warnings.append(f"{as_good} tensors are other bytes than streamconv writes, as close to the source as its format allows")
    for (file, name), count in sink.odd.items():
        verdict.warnings.append(f"{file}: {name}: {count} values are not finite")


def _as_good(codec: Codec, error: measured.Error) -> bool:
    """Another tool's values: within the error of the format and, where that is large, about as near as ours; or nearer than ours."""
    if error.wrong:
        return False
    if error.within and (not codec.quantizes or error.snr() >= error.best() - _SLACK):
        return True
    return codec.quantizes and error.snr() >= error.best()


def _told(key: tuple[str, str], difference: Difference, size: int, where: str) -> str:
    return f"{key[0]}: {key[1]}: {difference.bytes} of {size} bytes are not what this source gives, {where}"
