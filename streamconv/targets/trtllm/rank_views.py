"""Where the tensors of a model lie in rank files: what the layout would read from each of them, and put there, turned round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from streamconv.checkpoint.derived_rows import less_one, paired_rows
from streamconv.checkpoint.dtypes import F8_E4M3, I8, MODEL_DTYPES, DType
from streamconv.checkpoint.header_parse import Header
from streamconv.checkpoint.rows import Extent, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import RefusedError, printable
from streamconv.families.matching import example
from streamconv.planning.matrix_table import MatrixTable
from streamconv.planning.plan import Matrix
from streamconv.planning.span_table import SpanTable
from streamconv.quants.awq import PairedWeight
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.gptq import PackedWeight
from streamconv.quants.laid_out import laid_out
from streamconv.quants.plain import Plain
from streamconv.quants.weight_only import WeightOnly
from streamconv.targets.trtllm.lookup import TensorLookup
from streamconv.targets.trtllm.rank_scales import Block, Held, by_channel, by_input, groups, scalar

SCALE, ZERO = "_scale", "_zero"
"""What is put after the name of a weight that is stored as codes: the names of its scales and zeros."""
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
        encoding, pieces = held[0][1].encoding, _pieces(held, 0)
        if isinstance(encoding, Plain):
            plain = SourceTensor(name, encoding.dtype, tensor.shape, pieces, axis)
            found[name] = less_one(plain) if encoding.add_one else plain
            if encoding.dtype == F8_E4M3:
                for scale, stored in ((name + SCALE, "weights"), (name.removesuffix(".weight") + _INPUT_SCALE, "activation")):
                    found[scale] = scalar(scale, f"{stored}_scaling_factor", held, axis, headers, shards)
            continue
        if isinstance(encoding, PairedWeight):
            found |= _paired(SourceTensor(name, I8, tensor.shape, pieces, axis), held, headers)
            continue
        if isinstance(encoding, PackedWeight):
            found[name] = laid_out(SourceTensor(name, encoding.dtype, tensor.shape, pieces, axis), encoding.layout)
            for suffix, stored in ((SCALE, "weights_scaling_factor"), (ZERO, "zero")):
                found[name + suffix] = groups(name + suffix, stored, held, axis, headers)
            continue
        if isinstance(encoding, WeightOnly):
            found[name] = laid_out(SourceTensor(name, encoding.dtype, tensor.shape, pieces, axis), encoding.layout)
            kind = encoding.dtype
        elif isinstance(encoding, Fp8Rowwise):
            found[name] = SourceTensor(name, F8_E4M3, tensor.shape, pieces, axis)
            kind = encoding.scale
        else:
            raise RefusedError([f"{printable(name)} is stored as {encoding.name}, which is not read back"])
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
    found: dict[str, SourceTensor] = {name: paired_rows(weight), name + SCALE: by_channel(name + SCALE, held, weight.axis, headers)}
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
