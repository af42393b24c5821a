"""Where every tensor of the output files lies, and the headers that say so."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.header_build import HeaderBuilder
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
    held = [(array("I"), array("I")) for _ in named]  # matrices and constants of each file
    counts = [0] * len(named)
    for number in range(len(matrices)):
        held[matrices.file(number)][0].append(number)
        counts[matrices.file(number)] += len(matrices.parts(number))
    for number, one in enumerate(fixed):
        held[one.file][1].append(number)
        counts[one.file] += 1
    most, total = max(counts, default=0), sum(counts)
    if most > MAX_TENSORS or total > MAX_OUTPUT_TENSORS:
        what = f"{most} tensors in one file" if most > MAX_TENSORS else f"{total} tensors in all files together"
        limit = MAX_TENSORS if most > MAX_TENSORS else MAX_OUTPUT_TENSORS
        raise RefusedError([f"the output would have {what}, above streamconv's own limit of {limit}"])
    files, constants = [], list[Constant]()
    for file, (numbers, constant) in enumerate(held):
        # all that sorting needs, in one string each: a tuple takes three times as much
        listed = [_key(part.dtype, name, n, at) for name, part, n, at in matrices.tensors(numbers)]
        listed += [_key(fixed[n].dtype, fixed[n].name, n, _CONSTANT) for n in constant]
        listed.sort()
        header, own = HeaderBuilder(named[file][1]), list[tuple[int, int, int]]()
        add, put, owner = header.add, matrices.put, _OWNER.unpack
        for position, key in enumerate(listed):
            number, at = owner(key[-5:])
            part = fixed[number] if at == _CONSTANT else matrices.parts(number)[at]
            begin = add(key[1:-6].decode(), part.dtype, part.shape)
            if at == _CONSTANT:
                own.append((number, begin, position))
            else:
                put(number, at, begin, position)
        count = len(listed)
        listed.clear()  # before the header is copied: both are as large as the names
        text, size = header.finish()
        if len(text) > MAX_HEADER:
            told = f"{named[file][0]} would have a header of {len(text)} bytes, above streamconv's own limit of {MAX_HEADER}"
            raise RefusedError([told])
        matrices.data_starts.append(len(text))
        constants += [Constant(file, fixed[n].name, len(text) + begin, fixed[n].data, position) for n, begin, position in own]
        files.append(OutputFile(named[file][0], size, text, count))
    return files, constants


_CONSTANT = 255
_OWNER = struct.Struct(">IB")


def _key(dtype: DType, name: str, number: int, part: int) -> bytes:
    """Sorts as the stock writer does: by dtype, then by name; ends with the matrix (or constant) and the part that the tensor is."""
    return b"%c%b\0%b" % (255 - dtype.order, name.encode(), _OWNER.pack(number, part))
