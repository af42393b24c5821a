"""Where the tensors of a model lie in rank files: what the layout would read from each of them, and put there, turned round."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streamconv.checkpoint.derived_rows import less_one
from streamconv.checkpoint.dtypes import F8_E4M3, F32, I8, MODEL_DTYPES, DType
from streamconv.checkpoint.header_parse import Header, TensorEntry
from streamconv.checkpoint.rows import Extent, PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import RefusedError, TensorError, printable
from streamconv.families.matching import example
from streamconv.lazy import Bytes, np
from streamconv.planning.matrix_table import MatrixTable
from streamconv.planning.plan import Matrix
from streamconv.planning.span_table import SpanTable
from streamconv.quants.awq import PairedWeight
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.gptq import PackedWeight
from streamconv.quants.laid_out import laid_out
from streamconv.quants.plain import Plain
from streamconv.quants.weight_only import WeightOnly
from streamconv.targets.trtllm.import_scales import is_scale
from streamconv.targets.trtllm.lookup import SCALE, ZERO, TensorLookup


class Block(NamedTuple):
    """Rows [start, stop) and columns [left, right) of a tensor are those from `row` on of a matrix.

    Attributes:
        twice: rows of a head that is stored once for two equal ones; 0 for none.
    """

    start: int
    stop: int
    left: int
    right: int
    matrix: int
    row: int
    twice: int


Held = Sequence[tuple[Block, Matrix]]
"""The blocks that make up a weight, each with its matrix."""


def _entries(held: Held, stored: str, headers: Sequence[Header]) -> Iterator[tuple[Block, int, TensorEntry]]:
    """(block, file, tensor of that last name beside its matrix)."""
    for block, matrix in held:
        entry = headers[matrix.file].tensors.get(f"{matrix.name}.{stored}")
        if entry is None:
            raise TensorError(f"rank{matrix.file}.safetensors: {matrix.name}.{stored} is missing, which its codes need")
        yield block, matrix.file, entry


def group_scales(name: str, stored: str, held: Held, axis: int, headers: Sequence[Header], by_channel: bool = False) -> SourceTensor:
    """Scales or zeros [groups, N]: a rank has all groups of its channels, or its groups of all channels.

    Args:
        stored: last part of their name there.
        by_channel: they are [N, groups].
    """
    pieces, kind = list[Extent](), F32
    for block, file, entry in _entries(held, stored, headers):
        (count, width), kind, channels = entry.shape, entry.dtype, block.stop - block.start
        at = (
            entry.begin + block.row * (width if by_channel else 1) * kind.itemsize,
            *((channels, width) if by_channel else (count, channels)),
        )
        pieces.append(Extent(file, *at, stride=0 if by_channel else width * kind.itemsize))
    axis = axis if by_channel else 1 - axis
    rows = pieces[0].rows if axis else sum(piece.rows for piece in pieces)
    cols = sum(piece.cols for piece in pieces) if axis else pieces[0].cols
    return SourceTensor(name, kind, (rows, cols), tuple(pieces), axis)


def by_input(name: str, held: Held, axis: int, headers: Sequence[Header]) -> SourceTensor:
    """What each input is multiplied by before it meets the weights, [K]."""
    found = list(_entries(held if axis else held[:1], "prequant_scaling_factor", headers))
    pieces = tuple(Extent(file, entry.begin, entry.shape[-1], 1) for _, file, entry in found)
    return SourceTensor(name, found[0][2].dtype, (sum(piece.rows for piece in pieces),), pieces)


@dataclass(frozen=True, slots=True)
class Steps(SourceTensor):
    """A column of a few float32 numbers, each for many rows.

    Attributes:
        steps: (rows, number), one above the other.
    """

    steps: tuple[tuple[int, float], ...] = ()

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        first, to = 0, out.view(np.float32)
        for rows, number in self.steps:
            to[max(first - start, 0) : max(first + rows - start, 0)] = number
            first += rows


def scalar(name: str, stored: str, held: Held, axis: int, headers: Sequence[Header], shards: Sequence[Shard]) -> SourceTensor:
    """The scale of a whole weight [1]; of rows [N, 1] where it is made of matrices with scales of their own.

    Raises:
        TensorError: it is no scale. RefusedError: ranks have other scales for the same rows.
    """
    found = list[tuple[Block, float]]()
    pieces = list[Extent]()
    for block, file, entry in _entries(held, stored, headers):
        with shards[file].window(entry.begin, entry.begin + 4) as data:
            value = float(struct.unpack("<f", bytes(data))[0])
        if not is_scale(value):
            raise TensorError(f"rank{file}.safetensors: {printable(entry.name)} is {value:g}, no scale")
        found.append((block, value))
        pieces.append(Extent(file, entry.begin, 1, 1))
    if len({value for _, value in found}) == 1:
        return SourceTensor(name, F32, (1,), (pieces[0],))
    if axis:
        raise RefusedError([f"{printable(name)}: the ranks have scales of their own for parts of the same rows, which is not read back"])
    steps = tuple((block.stop - block.start, value) for block, value in found)
    return Steps(name, F32, (sum(rows for rows, _ in steps), 1), tuple(pieces), 0, steps)


_INPUT_SCALE, _PRE_SCALE = ".input_scale", ".pre_quant_scale"
"""As ModelOpt's Hugging Face directories call them, after the name of a module."""


@dataclass(slots=True)
class Imagined(TensorLookup):
    """Every tensor that the layout asks for, there or not.

    Attributes:
        dtype: of what is not said otherwise.
        asked: the tensors, in the order in which they were asked for.
    """

    dtype: DType = MODEL_DTYPES["float16"]
    asked: dict[str, SourceTensor] = field(default_factory=dict)

    def has(self, role: str, layer: int = -1) -> bool:
        return not role.startswith("experts_") and role in self.family.tensors

    def require(self, role: str, shape: tuple[int, ...], layer: int = -1, expert: int = -1) -> SourceTensor | None:
        name = example(self.family, role, layer, expert)
        rows, cols = (shape[0], 1) if len(shape) == 1 else (shape[0], shape[1])
        return self.asked.setdefault(name, SourceTensor(name, self.dtype, shape, (Extent(0, 0, rows, cols),)))


def views_of(
    roles: Imagined, matrices: MatrixTable, spans: SpanTable, headers: Sequence[Header], shards: Sequence[Shard]
) -> dict[str, SourceTensor]:
    """The tensors that a layout asked for, at their places in the rank files.

    A weight that is stored as codes is a tensor of codes, and one of scales [N, 1], or [N, ranks] where each rank has measured its own
    part of the inputs. Of group-wise integers scales and zeros are [groups, N], but [N, groups] and [K] for W4A16_AWQ. FP8 per tensor
    has a scale [1], or [N, 1] where matrices with scales of their own make up the weight, and one of its input.

    Args:
        matrices, spans: what the layout made of them.
        headers, shards: of the rank files.

    Raises:
        RefusedError: codes that are not read back.
    """
    blocks: dict[str, list[Block]] = {name: [] for name in roles.asked}
    for span in spans:
        for dest in span.dests:
            left, right = dest.cols[0]
            twice = span.op.block // 2 if span.op.kind == "dedup" else 0
            blocks[span.source.name].append(Block(span.start, span.stop, left, right, dest.matrix, dest.row, twice))
    found: dict[str, SourceTensor] = {}
    for name, tensor in roles.asked.items():
        axis = int(any(block.right - block.left < tensor.cols for block in blocks[name]))
        held = [(block, matrices[block.matrix]) for block in _once(tensor, blocks[name], axis)]
        codec, pieces = held[0][1].codec, _pieces(held, 0)
        if isinstance(codec, Plain):
            plain = SourceTensor(name, codec.dtype, tensor.shape, pieces, axis)
            found[name] = less_one(plain) if codec.add_one else plain
            if codec.dtype == F8_E4M3:
                for scale, stored in ((name + SCALE, "weights"), (name.removesuffix(".weight") + _INPUT_SCALE, "activation")):
                    found[scale] = scalar(scale, f"{stored}_scaling_factor", held, axis, headers, shards)
            continue
        if isinstance(codec, PairedWeight):
            found |= _paired(SourceTensor(name, I8, tensor.shape, pieces, axis), held, headers)
            continue
        if isinstance(codec, PackedWeight):
            found[name] = laid_out(SourceTensor(name, codec.dtype, tensor.shape, pieces, axis), codec.layout)
            for suffix, stored in ((SCALE, "weights_scaling_factor"), (ZERO, "zero")):
                found[name + suffix] = group_scales(name + suffix, stored, held, axis, headers)
            continue
        if isinstance(codec, WeightOnly):
            found[name] = laid_out(SourceTensor(name, codec.dtype, tensor.shape, pieces, axis), codec.layout)
            kind = codec.dtype
        elif isinstance(codec, Fp8Rowwise):
            found[name] = SourceTensor(name, F8_E4M3, tensor.shape, pieces, axis)
            kind = codec.scale
        else:
            raise RefusedError([f"{printable(name)} is stored as {codec.name}, which is not read back"])
        cuts = len(held) if axis else 1
        found[name + SCALE] = SourceTensor(name + SCALE, kind, (tensor.rows, cuts), _pieces(held, 1), axis)
    return found


def _paired(weight: SourceTensor, held: Held, headers: Sequence[Header]) -> dict[str, SourceTensor]:
    """W4A16_AWQ as ModelOpt exports it; what it lays out for a GPU is refused."""
    for _, matrix in held:
        stored = headers[matrix.file].tensors[f"{matrix.name}.weight"].dtype
        if stored != I8:
            raise RefusedError([f"{matrix.name}.weight is {stored}: W4A16_AWQ that is laid out for a GPU already is not read back"])
    name, first = weight.name, held[0][1]
    pairs = tuple(piece._replace(rows=piece.rows // 2) for piece in weight.pieces)
    codes = PackedTensor(name, I8, weight.shape, pairs, weight.axis, packing="modelopt", module=name.removesuffix(".weight"))
    scales = group_scales(name + SCALE, "weights_scaling_factor", held, weight.axis, headers, by_channel=True)
    found: dict[str, SourceTensor] = {name: codes, name + SCALE: scales}
    if f"{first.name}.prequant_scaling_factor" in headers[first.file].tensors:
        inputs = name.removesuffix(".weight") + _PRE_SCALE
        found[inputs] = by_input(inputs, held, weight.axis, headers)
    return found


def _once(tensor: SourceTensor, blocks: Sequence[Block], axis: int) -> list[Block]:
    """Blocks that make up a tensor, one above the other or side by side; of equal ones on several ranks the first."""
    at, taken = 0, list[Block]()
    for block in sorted(blocks, key=lambda block: (block.left if axis else block.start, block.matrix)):
        begin, end = (block.left, block.right) if axis else (block.start, block.stop)
        if begin == at:
            taken.append(block)
            at = end
    if at != (tensor.cols if axis else tensor.rows):
        raise AssertionError(f"{tensor.name}: the ranks hold {at} of it")
    return taken


def _pieces(held: Sequence[tuple[Block, Matrix]], part: int) -> tuple[Extent, ...]:
    """Where the rows of blocks lie; a head that is stored once stands there twice.

    Args:
        part: 0 for the weight, 1 for its scales, one for each row.
    """
    found = list[Extent]()
    for block, matrix in held:
        place, cols, size = matrix.places[part], 1 if part else block.right - block.left, block.twice
        begin = place.offset + block.row * place.record_bytes
        if not size:
            found.append(Extent(matrix.file, begin, block.stop - block.start, cols))
            continue
        heads = range((block.stop - block.start) // (2 * size))
        found += [Extent(matrix.file, begin + head * size * place.record_bytes, size, cols) for head in heads for _ in range(2)]
    return tuple(found)
