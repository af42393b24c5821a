"""The plan: a frozen value that fixes every output byte's place before the first weight byte is read.

    files     what is written, with every tensor's byte range
    matrices  encoded weight matrices; each owns one or more of those tensors
    spans     what is read, in order: source rows and the matrices that need them
    constants small tensors whose bytes follow from the options alone

Everything here is independent of budget, workers and tile size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import lcm
from typing import Protocol

from streamconv.checkpoint.dtypes import F32, DType
from streamconv.options import Options
from streamconv.quants.base import Encoding, Reduction


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a rank file; `begin` and `end` are absolute byte offsets in the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class OutputFile:
    name: str
    size: int
    header: bytes
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True, slots=True)
class PartPlace:
    """Where a part of a matrix lies: bytes [offset + n*row_bytes, ...) of the file hold output row n."""

    tensor: str
    offset: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """One encoded matrix of one rank.

    Attributes:
        file: index into Plan.files.
        name: module path, e.g. "transformer.layers.0.attention.qkv".
        rows: output rows, over all experts.
        cols: source columns of each row.
        filled: rows that come from sources; the rest, at the end, is zero padding.
        places: one for each part of the encoding.
        note: why it is or is not quantized, for the plan's table.
    """

    file: int
    name: str
    rows: int
    cols: int
    filled: int
    encoding: Encoding
    places: tuple[PartPlace, ...]
    note: str = ""


class Source(Protocol):
    """Something rows can be read from: a tensor of the checkpoint, or a generated table."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous row-major block [rows, cols] in a source file; `begin` is an absolute offset."""

    shard: int
    begin: int
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the checkpoint seen as a matrix: a vector is a column, leading dimensions are flattened into rows.

    Attributes:
        axis: 0 if `pieces` lie one above the other, 1 if side by side.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    axis: int = 0

    @property
    def rows(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows if len(self.shape) > 1 else (self.shape[0] if self.shape else 1)

    @property
    def cols(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def nbytes(self) -> int:
        return self.rows * self.cols * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Blank:
    """One zero in the place of a source: the encoding gives the stored values from reductions alone."""

    name: str
    dtype: DType = F32
    rows: int = 1
    cols: int = 1


@dataclass(frozen=True, slots=True)
class PackedTensor(SourceTensor):
    """An integer weight [N, K] that the source stores packed; reading it gives signed int8, one row per output channel.

    Attributes:
        shape: (N, K); `dtype` is I8; the one piece covers the stored bytes (its rows and cols are those of the file).
        bits: 4 or 8.
        packing: how the file stores it (quantization spec §4.2, §5.2, §5.3): "gptq", int32 [K*bits/32, N] along K;
            "awq", int32 [K, N/8] along shuffled channels; "modelopt", one byte for two neighbouring channels [N/2, K].
        module: name without the last component, e.g. "model.layers.0.mlp.up_proj".
    """

    bits: int = 4
    packing: str = "gptq"
    module: str = ""

    @property
    def stored_row_bytes(self) -> int:
        """Bytes that a channel has in the file."""
        return self.cols * self.bits // 8


@dataclass(frozen=True, slots=True)
class RowOp:
    """What happens to source rows before they are encoded; `block` source rows always stay together.

    Attributes:
        kind: "none"; "rope", undo Meta's interleaved rotary rows inside each head (checkpoint spec §5.5);
            "dedup", keep the first of two equal heads after checking that they are equal (§3.4).
        block: source rows that belong together.
    """

    kind: str = "none"
    block: int = 1

    def out_rows(self, rows: int) -> int:
        return rows // 2 if self.kind == "dedup" else rows

    def source_rows(self, rows: int) -> int:
        return rows * 2 if self.kind == "dedup" else rows


PLAIN_ROWS = RowOp()


@dataclass(frozen=True, slots=True)
class Dest:
    """A matrix that takes the rows of a span.

    Attributes:
        matrix: index into Plan.matrices.
        row: output row of the span's first row.
        cols: source columns, as (begin, end) pairs joined side by side.
    """

    matrix: int
    row: int
    cols: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Source rows [start, stop) that are read once, for every matrix that needs them.

    Attributes:
        reduce: nothing is written; the rows contribute to this reduction (an earlier pass over them).
    """

    source: Source
    start: int
    stop: int
    op: RowOp
    dests: tuple[Dest, ...]
    align: int
    reduce: Reduction | None = None

    @property
    def row_bytes(self) -> int:
        return self.source.cols * self.source.dtype.itemsize

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of the file that a row is read from."""
        return self.source.stored_row_bytes if isinstance(self.source, PackedTensor) else self.row_bytes

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.stored_row_bytes


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor known at plan time."""

    file: int
    tensor: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Identity of a source file: what a resume and a verify compare.

    Attributes:
        name: its path in the checkpoint.
        header_hash: SHA-256 (hex) of what fixes where its tensors lie.
    """

    name: str
    size: int
    header_hash: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the output, fixed.

    Attributes:
        files: the rank files; each has `name`, `size` in bytes, and `tensors` with their `name`, `dtype`, `shape` and byte range.
        bytes_read, bytes_written: of the source, and of all files with config.json.
        config: bytes of config.json.
        warnings: things the user should know, one line each.
        decisions: module suffix -> how it is stored and why, for the plan's table.
    """

    family: str
    options: Options
    dtype: DType
    config: bytes
    files: tuple[OutputFile, ...]
    matrices: tuple[Matrix, ...]
    spans: tuple[Span, ...]
    constants: tuple[Constant, ...]
    sources: tuple[SourceFile, ...]
    warnings: tuple[str, ...] = ()
    decisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        return sum(span.nbytes for span in self.spans if isinstance(span.source, SourceTensor))

    @property
    def passes(self) -> int:
        """How often the most read source rows are read: 1 unless a format needs maxima over whole matrices first."""
        if not any(span.reduce for span in self.spans):
            return 1
        counts: dict[str, set[str]] = {}
        for span in self.spans:
            counts.setdefault(span.source.name, set()).add(span.reduce.key if span.reduce else "")
        return max((len(found) for found in counts.values()), default=1)

    @property
    def bytes_written(self) -> int:
        return sum(file.size for file in self.files) + len(self.config)

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the output: options, sources, config.json and all headers."""
        digest = hashlib.sha256()
        options = self.options.to_json()
        del options["activation_ranges"]  # its content counts, in `sources`, and not its place
        asked = {"options": options, "family": self.family, "dtype": self.dtype.name}
        digest.update(json.dumps(asked, sort_keys=True).encode())
        for source in self.sources:
            digest.update(f"{source.name}\0{source.size}\0{source.header_hash}\n".encode())
        digest.update(self.config)
        for file in self.files:
            digest.update(file.name.encode() + file.header)
        return digest.hexdigest()


def align_of(row_aligns: Collection[int], op: RowOp) -> int:
    """Source rows that a tile must hold a multiple of, for encodings with these `row_align`."""
    rows = lcm(*row_aligns)
    return lcm(op.source_rows(rows), op.block)
