"""Where the tensors of a model lie in rank files: what the layout would read from each of them, and put there, turned round."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streamconv.checkpoint.derived_rows import less_one
from streamconv.checkpoint.dtypes import F8_E4M3, F32, I8, MODEL_DTYPES, DType
from streamconv.checkpoint.header_parse import TensorEntry
from streamconv.checkpoint.rows import Extent, PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import RefusedError, TensorError, printable
from streamconv.families.matching import example
from streamconv.lazy import Bytes, np
from streamconv.planning.matrix_table import MatrixTable
from streamconv.planning.plan import Matrix
from streamconv.planning.span_table import SpanTable
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.given_codes import GivenIntegers
from streamconv.quants.gptq import PackedWeight
from streamconv.quants.layout import laid_out
from streamconv.quants.plain import Plain
from streamconv.quants.weight_only import WeightOnly
from streamconv.targets.trtllm.import_scales import is_scale
from streamconv.targets.trtllm.lookup import SCALE, ZERO, TensorLookup
from streamconv.targets.trtllm.rank_peers import RankFile


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


_INPUT_SCALE, _PRE_SCALE = ".input_scale", ".pre_quant_scale"
"""As ModelOpt's Hugging Face directories call them, after the name of a module."""


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


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in the rank files.

    Attributes:
        blocks: what makes it up, one above the other (axis 0) or side by side (axis 1), each with its matrix.
    """

    tensor: SourceTensor
    axis: int
    blocks: Sequence[tuple[Block, Matrix]]
    ranks: Sequence[RankFile]

    def views(self) -> dict[str, SourceTensor]:
        """The tensor, and what belongs to it where it is stored as codes, see `views_of`."""
        name, codec, inputs = self.tensor.name, self.blocks[0][1].codec, self.tensor.name.removesuffix(".weight")
        if isinstance(codec, Plain):
            plain = self._weight(codec.dtype)
            tensors = {name: less_one(plain) if codec.add_one else plain}
            if codec.dtype == F8_E4M3:
                tensors[name + SCALE] = self._scalar(name + SCALE, "weights_scaling_factor")
                tensors[inputs + _INPUT_SCALE] = self._scalar(inputs + _INPUT_SCALE, "activation_scaling_factor")
            return tensors
        if isinstance(codec, GivenIntegers):
            return self._paired()
        if isinstance(codec, PackedWeight):
            groups = {name + SCALE: "weights_scaling_factor", name + ZERO: "zero"}
            scales = {scale: self._groups(scale, stored) for scale, stored in groups.items()}
            return {name: laid_out(self._weight(codec.dtype), codec.layout), **scales}
        if not isinstance(codec, WeightOnly | Fp8Rowwise):
            raise RefusedError([f"{printable(name)} is stored as {codec.name}, which is not read back"])
        rows, cuts = self.tensor.rows, len(self.blocks) if self.axis else 1
        kind = codec.dtype if isinstance(codec, WeightOnly) else codec.scale
        weight = laid_out(self._weight(codec.dtype), codec.layout) if isinstance(codec, WeightOnly) else self._weight(F8_E4M3)
        return {name: weight, name + SCALE: SourceTensor(name + SCALE, kind, (rows, cuts), self._pieces(1), self.axis)}

    def _weight(self, dtype: DType) -> SourceTensor:
        return SourceTensor(self.tensor.name, dtype, self.tensor.shape, self._pieces(0), self.axis)

    def _pieces(self, part: int) -> tuple[Extent, ...]:
        """Where the rows of the blocks lie; a head that is stored once stands there twice.

        Args:
            part: 0 for the weight, 1 for its scales, one for each row.
        """
        extents = list[Extent]()
        for block, matrix in self.blocks:
            place, cols, size = matrix.places[part], 1 if part else block.right - block.left, block.twice
            count = size or block.stop - block.start
            for head in range((block.stop - block.start) // (2 * size) if size else 1):
                at = Extent(matrix.file, place.extent(block.row + head * count, 0)[0], count, cols)
                extents += [at, at] if size else [at]
        return tuple(extents)

    def _entries(self, stored: str) -> Iterator[tuple[Block, int, TensorEntry]]:
        """(block, file, tensor of that last name beside its matrix)."""
        for block, matrix in self.blocks:
            file, name = matrix.file, f"{matrix.name}.{stored}"
            if name not in self.ranks[file].tensors:
                raise TensorError(f"rank{file}.safetensors: {name} is missing, which its codes need")
            yield block, file, self.ranks[file].tensors[name]

    def _groups(self, name: str, stored: str, by_channel: bool = False) -> SourceTensor:
        """Scales or zeros [groups, N], or [N, groups]: a rank has all groups of its channels, or its groups of all channels."""
        pieces, kind = list[Extent](), F32
        for block, file, entry in self._entries(stored):
            (count, width), kind, channels = entry.shape, entry.dtype, block.stop - block.start
            if by_channel:
                pieces.append(Extent(file, entry.begin + block.row * width * kind.itemsize, channels, width))
            else:
                pieces.append(Extent(file, entry.begin + block.row * kind.itemsize, count, channels, width * kind.itemsize))
        axis = self.axis if by_channel else 1 - self.axis
        rows = pieces[0].rows if axis else sum(piece.rows for piece in pieces)
        cols = sum(piece.cols for piece in pieces) if axis else pieces[0].cols
        return SourceTensor(name, kind, (rows, cols), tuple(pieces), axis)

    def _paired(self) -> dict[str, SourceTensor]:
        """W4A16_AWQ as ModelOpt exports it; what it lays out for a GPU is refused."""
        for _, _, entry in self._entries("weight"):
            if entry.dtype != I8:
                raise RefusedError([f"{entry.name} is {entry.dtype}: W4A16_AWQ that is laid out for a GPU already is not read back"])
        name, first = self.tensor.name, self.blocks[0][1]
        module, pairs = name.removesuffix(".weight"), tuple(piece._replace(rows=piece.rows // 2) for piece in self._pieces(0))
        codes = PackedTensor(name, I8, self.tensor.shape, pairs, self.axis, packing="modelopt", module=module)
        views = {name: codes, name + SCALE: self._groups(name + SCALE, "weights_scaling_factor", by_channel=True)}
        if f"{first.name}.prequant_scaling_factor" in self.ranks[first.file].tensors:  # of each input [K]
            factors = list(self._entries("prequant_scaling_factor"))[: None if self.axis else 1]
            pieces = tuple(Extent(file, entry.begin, entry.shape[-1], 1) for _, file, entry in factors)
            shape = (sum(piece.rows for piece in pieces),)
            views[module + _PRE_SCALE] = SourceTensor(module + _PRE_SCALE, factors[0][2].dtype, shape, pieces)
        return views

    def _scalar(self, name: str, stored: str) -> SourceTensor:
        """The scale of a whole weight [1]; of rows [N, 1] where it is made of matrices with scales of their own.

        Raises:
            TensorError: it is no scale. RefusedError: ranks have other scales for the same rows.
        """
        steps, pieces = list[tuple[int, float]](), list[Extent]()
        for block, file, entry in self._entries(stored):
            with self.ranks[file].shard.window(entry.begin, entry.begin + 4) as data:
                value = float(struct.unpack("<f", bytes(data))[0])
            if not is_scale(value):
                raise TensorError(f"rank{file}.safetensors: {printable(entry.name)} is {value:g}, no scale")
            steps.append((block.stop - block.start, value))
            pieces.append(Extent(file, entry.begin, 1, 1))
        if len({value for _, value in steps}) == 1:
            return SourceTensor(name, F32, (1,), (pieces[0],))
        if self.axis:
            message = "the ranks have scales of their own for parts of the same rows, which is not read back"
            raise RefusedError([f"{printable(name)}: {message}"])
        return Steps(name, F32, (sum(rows for rows, _ in steps), 1), tuple(pieces), 0, tuple(steps))


def views_of(roles: Imagined, matrices: MatrixTable, spans: SpanTable, ranks: Sequence[RankFile]) -> dict[str, SourceTensor]:
    """The tensors that a layout asked for, at their places in the rank files.

    A weight that is stored as codes is a tensor of codes, and one of scales [N, 1], or [N, ranks] where each rank has measured its own
    part of the inputs. Of group-wise integers scales and zeros are [groups, N], but [N, groups] and [K] for W4A16_AWQ. FP8 per tensor
    has a scale [1], or [N, 1] where matrices with scales of their own make up the weight, and one of its input.

    Args:
        matrices, spans: what the layout made of them.

    Raises:
        RefusedError: codes that are not read back.
    """
    blocks: dict[str, list[Block]] = {name: [] for name in roles.asked}
    for span in spans:
        twice = span.op.block // 2 if span.op.kind == "dedup" else 0
        blocks[span.source.name] += [Block(span.start, span.stop, *dest.cols[0], dest.matrix, dest.row, twice) for dest in span.dests]
    views: dict[str, SourceTensor] = {}
    for name, tensor in roles.asked.items():
        axis = int(any(block.right - block.left < tensor.cols for block in blocks[name]))
        stored = [(block, matrices[block.matrix]) for block in _once(tensor, blocks[name], axis)]
        views |= _Stored(tensor, axis, stored, ranks).views()
    return views


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
