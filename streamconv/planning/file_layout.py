"""Where every tensor of the output files lies, and the headers that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.header_build import build_header
from streamconv.checkpoint.limits import MAX_HEADER, MAX_OUTPUT_TENSORS, MAX_TENSORS
from streamconv.errors import RefusedError
from streamconv.planning.matrix_table import MatrixTable
from streamconv.planning.plan import Constant, OutputFile


@dataclass(slots=True)
class Fixed:
    """A small tensor whose bytes are known when the plan is made."""

    file: int
    name: str
    dtype: DType
    shape: tuple[int, ...]
    data: bytes


def layout(
    named: Sequence[tuple[str, Mapping[str, str] | None]], matrices: MatrixTable, fixed: Sequence[Fixed]
) -> tuple[list[OutputFile], list[Constant]]:
    """Place every tensor, and build the headers that say where.

    Args:
        named: name and metadata of each file.
        fixed: the tensors whose bytes are known.

    Raises:
        RefusedError: a file would hold more than a reader takes.
    """
    matrices_of, counts = matrices.held(len(named))
    known: list[list[Fixed]] = [[] for _ in named]
    for one in fixed:
        known[one.file].append(one)
        counts[one.file] += 1
    most, total = max(counts, default=0), sum(counts)
    if most > MAX_TENSORS or total > MAX_OUTPUT_TENSORS:
        what = f"{most} tensors in one file" if most > MAX_TENSORS else f"{total} tensors in all files together"
        limit = MAX_TENSORS if most > MAX_TENSORS else MAX_OUTPUT_TENSORS
        raise RefusedError([f"the output would have {what}, above streamconv's own limit of {limit}"])
    files, constants = [], list[Constant]()
    for file, ((name, metadata), numbers, own) in enumerate(zip(named, matrices_of, known, strict=True)):
        names, parts, tensors = matrices.tensors(numbers)
        text, size, order, begins = build_header(names + [one.name for one in own], [*parts, *own], metadata)
        if len(text) > MAX_HEADER:
            raise RefusedError([f"{name} would have a header of {len(text)} bytes, above streamconv's own limit of {MAX_HEADER}"])
        matrices.data_starts.append(len(text))
        for position, (at, begin) in enumerate(zip(order, begins, strict=True)) if own else ():
            if at >= len(names):
                one = own[at - len(names)]
                constants.append(Constant(file, one.name, len(text) + begin, one.data, position))
        matrices.put(tensors, order, begins)
        files.append(OutputFile(name, size, text, len(order)))
    return files, constants
