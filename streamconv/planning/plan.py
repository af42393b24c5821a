"""The plan: a frozen value that fixes every output byte's place before the first weight byte is read.

    files     what is written, with every tensor's byte range
    matrices  encoded weight matrices; each owns one or more of those tensors
    spans     what is read, in order: source rows and the matrices that need them
    constants small tensors whose bytes follow from the options alone

Everything here is independent of budget, workers and tile size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.header_build import header_entries
from streamconv.checkpoint.rows import RowSource, SourceFile
from streamconv.digest import sha256
from streamconv.quants.base import Codec, Reduction

if TYPE_CHECKING:
    from streamconv.checkpoint.codes_file import Losses
    from streamconv.checkpoint.shard import Shard
    from streamconv.planning.matrix_table import MatrixTable
    from streamconv.planning.span_table import SpanTable


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A rank file.

    Attributes:
        header: its first bytes, which say where every tensor lies.
        tensors: how many there are.
    """

    name: str
    size: int
    header: bytes
    tensors: int

    def names(self) -> Iterator[str]:
        """The tensors, in the order of their data."""
        return (name for name, _, _ in self.tensors_of())

    def tensors_of(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors, in the order of their data."""
        return header_entries(self.header)


@dataclass(frozen=True, slots=True)
class PartLocation:
    """Where a part of a matrix lies in its file: record i (see `quants.base.Part`) begins at offset + i * record_bytes.

    Attributes:
        position: of the tensor in the order of the file's data.
    """

    tensor: str
    offset: int
    record_bytes: int
    position: int = 0
    record_rows: int = 1

    def extent(self, row: int, rows: int) -> tuple[int, int]:
        """File bytes [begin, end) of the records that begin with output rows [row, row + rows)."""
        first, last = (-(-at // self.record_rows) for at in (row, row + rows))
        return self.offset + first * self.record_bytes, self.offset + last * self.record_bytes

    def rows(self, begin: int, end: int) -> tuple[int, int]:
        """Output rows [first, last) that bytes [begin, end) of the tensor belong to."""
        return begin // self.record_bytes * self.record_rows, -(-end // self.record_bytes) * self.record_rows


@dataclass(frozen=True, slots=True)
class Matrix:
    """One encoded matrix of one rank.

    Attributes:
        file: index into Plan.files.
        name: module path, e.g. "transformer.layers.0.attention.qkv".
        rows: output rows, over all experts.
        cols: source columns of each row.
        filled: rows that come from sources; the rest, at the end, is zero padding.
        places: one for each part of the codec.
        note: why it is or is not quantized, for the plan's table.
    """

    file: int
    name: str
    rows: int
    cols: int
    filled: int
    codec: Codec
    places: tuple[PartLocation, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class RowOp:
    """What happens to source rows before they are encoded; `block` source rows always stay together.

    Attributes:
        kind: "none"; "rope", undo Meta's interleaved rotary rows inside each head;
            "dedup", keep the first of two equal heads after checking that they are equal.
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
class Destination:
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
class RowRange:
    """Source rows [start, stop) that are read once, for every matrix that needs them.

    Attributes:
        reduce: nothing is written; the rows contribute to this reduction (an earlier pass over them).
    """

    source: RowSource
    start: int
    stop: int
    op: RowOp
    dests: tuple[Destination, ...]
    align: int
    reduce: Reduction | None = None

    @property
    def row_bytes(self) -> int:
        return self.source.cols * self.source.dtype.itemsize

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of the files that a row is read from."""
        return self.source.stored_row_bytes

    @property
    def scratch_row_bytes(self) -> int:
        """Extra buffer that reading a row takes, for its row operation or for decoding."""
        return max(self.source.scratch_row_bytes, 0 if self.op.kind == "none" else self.row_bytes)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.stored_row_bytes


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor known at plan time; `position` as in PartLocation."""

    file: int
    tensor: str
    offset: int
    data: bytes
    position: int = 0


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the output that holds no tensors: bytes that the plan made, or a copy of a file of the source.

    Attributes:
        name: path below the output folder, with "/".
        size: bytes.
        data: its bytes; None for a copy.
        source: the file that is copied.
        fetch: brings it to `source` first, from the Hub.
    """

    name: str
    size: int
    data: bytes | None = None
    source: Path | None = None
    fetch: Callable[[], object] | None = field(default=None, compare=False)


class PlannedTarget(Protocol):
    """What a plan knows of its target: enough to tell two outputs apart, and to say what was asked for."""

    @property
    def key(self) -> str:
        """What the user calls it: `--to KEY`."""

    @property
    def allow_nonfinite(self) -> bool:
        """Weights that hold NaN or infinity are quantized all the same."""

    @property
    def files_read(self) -> tuple[Path, ...]:
        """Files beside the source that decide the output."""

    @property
    def headline(self) -> str:
        """What is made, for people, in a few words."""

    def to_json(self) -> dict[str, Any]:
        """The options, for the manifest."""

    def fingerprint(self) -> Mapping[str, Any]:
        """The options that decide bytes; files count by their content and not by their place."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the output, fixed.

    Attributes:
        family: what the model is, for people: the family, or the architecture where none is asked for.
        target: with everything settled that was left to the source.
        dtype: of the tensors that are not quantized.
        side_files: what is no tensor file; the last one, config.json, makes the folder a checkpoint.
        files: the tensor files; each has `name`, `size` in bytes, and `tensors`, how many there are.
        bytes_read, bytes_written: of the source, and of all files of the output.
        warnings: things the user should know, one line each.
        notes: what is right, and worth a line in the plan.
        decisions: module suffix -> how it is stored and why, for the plan's table.
        losses: what a search for INT4 codes lost in each layer, for the manifest; None if nothing was searched.
        beside: files that are read beside the source (ranges, codes), in the order of `sources`.
        source_config: config.json of the source, where the output does not hold it and the manifest is to tell it.
        bytes_checked: of the source, which are read once more, to hold it against what streamconv wrote of it; no part of what is planned.
        peak: largest resident set that planning took, 0 if it took no more than what came before it; no part of what is planned.
    """

    family: str
    target: PlannedTarget
    dtype: DType
    side_files: tuple[SideFile, ...]
    files: tuple[OutputFile, ...]
    matrices: MatrixTable
    spans: SpanTable
    constants: tuple[Constant, ...]
    sources: tuple[SourceFile, ...]
    warnings: tuple[str, ...] = ()
    decisions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    losses: Losses | None = None
    beside: tuple[Shard, ...] = field(default=(), compare=False)
    source_config: Mapping[str, Any] | None = None
    bytes_checked: int = field(default=0, compare=False)
    peak: int = field(default=0, compare=False)

    @property
    def config(self) -> bytes:
        """config.json."""
        return self.side_files[-1].data or b""

    @property
    def names(self) -> frozenset[str]:
        """Every file of the output, the manifest apart."""
        return frozenset([file.name for file in self.files] + [file.name for file in self.side_files])

    @property
    def bytes_read(self) -> int:
        """From the checkpoint, all passes together."""
        return self.spans.nbytes

    @property
    def passes(self) -> int:
        """How often the most read source rows are read: 1 unless a format needs maxima over whole matrices first."""
        return self.spans.passes()

    @property
    def bytes_written(self) -> int:
        return sum(file.size for file in self.files) + sum(file.size for file in self.side_files)

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the output: target, options, sources, side files and all headers."""
        digest = sha256()
        asked = {"target": self.target.key, "options": self.target.fingerprint(), "family": self.family, "dtype": self.dtype.name}
        digest.update(json.dumps(asked, sort_keys=True).encode())
        for source in self.sources:
            digest.update(f"{source.name}\0{source.size}\0{source.header_hash}\n".encode())
        for side in self.side_files:
            digest.update(f"{side.name}\0{side.size}\n".encode())
            digest.update(side.data or b"")
        for file in self.files:
            digest.update(file.name.encode())
            digest.update(file.header)
        return digest.hexdigest()


def align_of(row_aligns: Collection[int], op: RowOp) -> int:
    """Source rows that a tile must hold a multiple of, for codecs with these `row_align`."""
    rows = lcm(*row_aligns)
    return lcm(op.source_rows(rows), op.block)
