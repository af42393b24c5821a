"""A finished conversion taken apart: decoded values, what was read for them, and where they lie."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import Extent, NoSource, PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.planning.plan import Plan, RowRange
from streamconv.quants.gptq import GroupScales
from streamconv.run.encode import read_rows
from streamconv.run.order import ReductionResults
from streamconv.verification.measured import decoded

Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Decoded:
    """Tensors of one rank file by the name of their weight (first part), output channels first.

    Attributes:
        got: decoded; `error` what the format states; `derived` names that follow from the ranges, not from a source.
    """

    got: dict[str, torch.Tensor] = field(default_factory=dict)
    error: dict[str, torch.Tensor] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)
    quantized: set[str] = field(default_factory=set)


def decode(plan: Plan, index: Index, folder: Path) -> list[Decoded]:
    """Decode every matrix and hold it against `values` of its source rows.

    Raises:
        AssertionError: a value is farther from the source's than the format states.
    """
    files = [Shard(folder / file.name) for file in plan.files]
    results, made = ReductionResults(plan.spans), [Decoded() for _ in plan.files]
    try:
        for span in plan.spans:
            _decode_span(plan, span, index, files, results, made)
        for number, matrix in enumerate(plan.matrices):
            _check_padding(plan, number, files)
            if not matrix.filled:
                made[matrix.file].got[matrix.places[0].tensor] = torch.zeros(matrix.rows, matrix.cols)
    finally:
        for file in files:
            file.close()
    for matrix in plan.matrices:
        if isinstance(matrix.codec, GroupScales):  # groups are rows: turned to [N, groups, scale and zero]
            for held in (made[matrix.file].got, made[matrix.file].error):
                name = matrix.places[0].tensor
                scale, zero = held[name].chunk(2, 1)
                held[name] = torch.stack([scale.T, zero.T], 2)
    return made


def _decode_span(plan: Plan, span: RowRange, index: Index, files: list[Shard], results: ReductionResults, made: list[Decoded]) -> None:
    count = span.stop - span.start
    space = [np.empty(count * size, np.uint8) for size in (span.row_bytes, span.scratch_row_bytes)]
    rows = span.op.out_rows(count)
    block = torch.from_numpy(read_rows(index.shards, span, span.start, span.stop, *space).copy())
    whole = block.view(getattr(torch, span.source.dtype.torch)).reshape(rows, span.source.cols)
    if span.reduce is not None:
        results.add(span.reduce.key, rows, span.reduce.tile(whole, results).numpy())
    for dest in span.dests:
        matrix = plan.matrices[dest.matrix]
        encoding = matrix.codec.bind(results, span.source.name)
        part = torch.cat([whole[:, a:b] for a, b in dest.cols], 1)
        got, want = decoded(plan, dest, 0, rows, files, encoding), encoding.values(part)
        bound = encoding.error(part).expand(want.shape)
        name, held = matrix.places[0].tensor, made[matrix.file]
        worst = float(((got - want).abs() - bound).max())
        assert worst <= 0, f"{name} ({encoding.name}): values are {worst:g} farther from the source's than the format states"
        if name not in held.got:
            held.got[name], held.error[name] = torch.zeros(2, matrix.rows, got.shape[1])
        held.got[name][dest.row : dest.row + rows], held.error[name][dest.row : dest.row + rows] = got, bound
        if isinstance(span.source, NoSource) or "divided by the smoother" in encoding.name:
            held.derived.add(name)
        if encoding.quantizes:
            held.quantized.add(name)


def _check_padding(plan: Plan, number: int, files: list[Shard]) -> None:
    matrix = plan.matrices[number]
    for place in matrix.places:
        begin, end = place.extent(matrix.filled, matrix.rows - matrix.filled)
        rest = np.empty(end - begin, np.uint8)
        files[matrix.file].read_into(begin, rest.data)
        assert not rest.any(), f"{place.tensor}: padding rows are not zero"


# ---- what was read


def _blocks(source: SourceTensor, start: int, stop: int) -> list[tuple[Extent, int, tuple[slice, ...], tuple[int, ...]]]:
    """(piece, bytes of an element, what of it, its shape) for rows [start, stop)."""
    piece = source.pieces[0]
    if isinstance(source, PackedTensor):
        if source.packing == "modelopt":
            return [(piece, 1, (slice(start // 2, stop // 2),), (source.rows // 2, source.cols))]
        step = 1 if source.packing == "gptq" else 8
        height = source.cols * source.bits // 32 if step == 1 else source.cols
        return [(piece, 4, (slice(None), slice(start // step, stop // step)), (height, source.rows // step))]
    size, found, first = source.dtype.itemsize, [], 0
    for piece in source.pieces:
        low, high = (start, stop) if source.axis else (max(start - first, 0), min(stop - first, piece.rows))
        first += piece.rows
        if low < high:
            found.append((piece, size, (slice(low, high),), (piece.rows, piece.cols)))
    return found


def bytes_read(plan: Plan, index: Index) -> tuple[list[Counts], Counter[str]]:
    """(how often each byte of each file is read to be encoded, passes over a tensor for reductions)."""
    counts = [np.zeros(shard.size, np.int64) for shard in index.shards]
    passes: Counter[str] = Counter()
    for span in plan.spans:
        if not isinstance(span.source, SourceTensor):
            continue
        if span.reduce is not None:
            assert (span.start, span.stop) == (0, span.source.rows), f"{span.source.name}: a reduction over a part of it"
            passes[f"{span.source.name} for {span.reduce.key}"] += 1
            continue
        for piece, size, what, shape in _blocks(span.source, span.start, span.stop):
            whole = counts[piece.shard][piece.begin : piece.begin + size * shape[0] * shape[1]]
            whole.reshape(*shape, size)[what] += 1
    return counts, passes


def elements_used(plan: Plan) -> dict[str, Counts]:
    """Source tensor -> how often each element is stored, over all ranks."""
    found: dict[str, Counts] = {}
    for span in plan.spans:
        if span.reduce is not None or not isinstance(span.source, SourceTensor):
            continue
        held = found.setdefault(span.source.name, np.zeros((span.source.rows, span.source.cols), np.int64))
        for dest in span.dests:
            keep = getattr(plan.matrices[dest.matrix].codec, "keep", None)
            for first, last in [keep] if keep else dest.cols:
                held[span.start : span.stop, first:last] += 1
    return found


def check_places(plan: Plan) -> None:
    """Every byte of every file has one owner, and every row of a matrix one source, but for rows of padded vocabulary.

    Raises:
        AssertionError: names the tensor.
    """
    for number, file in enumerate(plan.files):
        owned = [(0, len(file.header), "header")]
        owned += [(c.offset, c.offset + len(c.data), c.tensor) for c in plan.constants if c.file == number]
        for matrix in plan.matrices:
            if matrix.file == number:
                owned += [(*p.extent(0, matrix.rows), p.tensor) for p in matrix.places]
        at = 0
        for begin, end, name in sorted(owned):
            assert begin == at, f"{file.name}: {name} begins at {begin}, the bytes before it end at {at}"
            at = end
        assert at == file.size, f"{file.name}: {file.size} bytes, its tensors end at {at}"
    rows = [np.zeros(matrix.rows, np.int64) for matrix in plan.matrices]
    for span in plan.spans:
        for dest in span.dests:
            before = rows[dest.matrix][: dest.row]
            assert before.all(), f"{plan.matrices[dest.matrix].name}: rows from {dest.row} come before the rows above them"
            rows[dest.matrix][dest.row : dest.row + span.op.out_rows(span.stop - span.start)] += 1
    for matrix, filled in zip(plan.matrices, rows, strict=True):
        name = matrix.places[0].tensor
        padded = matrix.name in ("lm_head", "transformer.vocab_embedding") or name.endswith("bias")
        assert (filled[: matrix.filled] == 1).all(), f"{name}: a row is written twice or not at all"
        assert not filled[matrix.filled :].any() and (padded or matrix.filled == matrix.rows), f"{name}: rows without a source"
