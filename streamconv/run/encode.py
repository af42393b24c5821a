"""Encode a tile's rows for every matrix that takes them; equal requests are encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.dtypes import DType
from streamconv.planning.plan import Dest, Matrix, Span
from streamconv.quants.base import Encoding, Findings
from streamconv.quants.plain import Plain

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Request = tuple[tuple[tuple[int, int], ...], Encoding]
"""(columns, encoding): two destinations with the same request get the same bytes."""


def requests(span: Span, matrices: Sequence[Matrix]) -> dict[Request, list[Dest]]:
    """The span's destinations grouped by what they need, in order."""
    found: dict[Request, list[Dest]] = {}
    for dest in span.dests:
        found.setdefault((dest.cols, matrices[dest.matrix].encoding), []).append(dest)
    return found


def is_copy(request: Request, dtype: DType) -> bool:
    """The stored bytes are the source's, column slices apart."""
    encoding = request[1]
    return isinstance(encoding, Plain) and encoding.dtype == dtype and not encoding.add_one and not encoding.halved(dtype)


def is_whole_copy(request: Request, span: Span) -> bool:
    """The stored bytes are the rows as they were read: nothing to do."""
    return is_copy(request, span.source.dtype) and request[0] == ((0, span.source.cols),)


def width(request: Request) -> int:
    return sum(stop - start for start, stop in request[0])


def row_costs(request: Request, span: Span) -> tuple[int, int]:
    """(bytes of output, bytes of working memory) that encoding one row takes."""
    if is_whole_copy(request, span):
        return 0, 0
    encoding, columns = request[1], width(request)
    align = encoding.row_align
    out = -(-sum(part.nbytes(align) for part in encoding.parts(align, columns)) // align)
    if is_copy(request, span.source.dtype):
        return out, 0
    gathered = columns * span.source.dtype.itemsize if len(request[0]) > 1 else 0
    if encoding.kernel(span.source.dtype) is not None:
        return out, gathered
    return out, gathered + columns * encoding.torch_bytes_per_element() + out


def encode(request: Request, span: Span, rows: int, block: Bytes, space: Bytes, findings: Findings) -> list[Bytes]:
    """The bytes of each part for `rows` rows.

    Args:
        block: uint8, rows * span.row_bytes bytes, row-major.
        space: uint8, where outputs (and a gathered copy) may go.

    Returns:
        One uint8 array per part, views of block or space.
    """
    columns, encoding = request
    dtype, total = span.source.dtype, span.source.cols
    if is_whole_copy(request, span):
        return [block]
    item = dtype.itemsize
    if is_copy(request, dtype):
        return [_gather(columns, block, space, rows, total, item)]
    if len(columns) > 1:
        gathered = _gather(columns, block, space, rows, total, item)
        space = space[gathered.size :]
        block, start, stride, cols = gathered, 0, width(request), width(request)
    else:
        start, stride, cols = columns[0][0], total, columns[0][1] - columns[0][0]
    outs = []
    for part in encoding.parts(encoding.row_align, cols):
        size = part.nbytes(rows)
        outs.append(space[:size])
        space = space[-(-size // 64) * 64 :]
    kernel = encoding.kernel(dtype)
    if kernel is not None:
        findings.add(kernel(block.view(dtype.storage), start, stride, rows, cols, outs))
        return outs
    import torch

    flat = torch.from_numpy(block).view(getattr(torch, dtype.torch))
    matrix = flat.reshape(rows, stride)[:, start : start + cols]
    for out, made in zip(outs, encoding.encode(matrix, findings), strict=True):
        out[:] = made.cpu().numpy()
    return outs


def _gather(columns: tuple[tuple[int, int], ...], block: Bytes, space: Bytes, rows: int, total: int, item: int) -> Bytes:
    cols = sum(stop - start for start, stop in columns)
    out = space[: rows * cols * item]
    source, target, at = block.reshape(rows, total * item), out.reshape(rows, cols * item), 0
    for start, stop in columns:
        target[:, at : at + (stop - start) * item] = source[:, start * item : stop * item]
        at += (stop - start) * item
    return out
