"""What a quantization is: how rows of a weight matrix become the tensors of a checkpoint, and back.

Each codec is a `Codec` in a file of this folder; targets say which weights get which. A codec is row-streaming: each part
stores a record of bytes for every so many output rows, decided by these rows alone, so tiles may be cut at any multiple of
`row_align` rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from streamconv.checkpoint.dtypes import DType
from streamconv.lazy import Array, np, torch

if TYPE_CHECKING:
    from streamconv.quants.screen import Screen


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of an encoded matrix.

    Attributes:
        role: what it is to the codec, e.g. "weight" or "scale"; targets spell tensor names from it.
        dtype: stored type.
        shape: recorded shape.
        record_bytes: bytes of a record.
        record_rows: output rows of a record: rows [i * record_rows, (i + 1) * record_rows) are bytes [i * record_bytes,
            (i + 1) * record_bytes). The last record of a matrix may have fewer rows, and has as many bytes.
    """

    role: str
    dtype: DType
    shape: tuple[int, ...]
    record_bytes: int
    record_rows: int = 1

    def nbytes(self, rows: int) -> int:
        """Bytes of `rows` output rows from the start of a record."""
        return -(-rows // self.record_rows) * self.record_bytes


@dataclass(slots=True)
class EncodeStats:
    """What encoding met on the way: counts of elements.

    Attributes:
        nonfinite: NaN or infinity in a matrix that is quantized.
        overflow: finite values that became infinite in the model dtype.
    """

    nonfinite: int = 0
    overflow: int = 0

    def add(self, other: EncodeStats) -> None:
        self.nonfinite += other.nonfinite
        self.overflow += other.overflow


@dataclass(slots=True)
class Errors:
    """Decoded values against the source's, over elements that are finite on both sides.

    Attributes:
        noise, signal: sums of squares.
        largest, peak: largest absolute error and source value.
        wrong: elements or rows that are farther off than the encoding allows.
    """

    noise: float = 0.0
    signal: float = 0.0
    largest: float = 0.0
    peak: float = 0.0
    wrong: int = 0

    def add(self, other: Errors) -> None:
        self.noise, self.signal, self.wrong = self.noise + other.noise, self.signal + other.signal, self.wrong + other.wrong
        self.largest, self.peak = max(self.largest, other.largest), max(self.peak, other.peak)


class FinishedReductions(Protocol):
    """Finished reductions; `get` waits for one."""

    def get(self, key: str) -> np.ndarray[Any, Any]: ...


class Reduction(ABC):
    """A maximum over all rows of one or more sources, which must be complete before other rows can be encoded.

    Attributes:
        key: what the result is called; sources with the same key are reduced together.
        needs: keys of reductions that must be complete before.
        bytes_per_element: working memory of `tile` for each source element.
        bytes_per_column: the same for each column, however many rows there are.
    """

    key: str
    needs: tuple[str, ...] = ()
    bytes_per_element: int = 32
    bytes_per_column: int = 0

    @abstractmethod
    def tile(self, block: torch.Tensor, known: FinishedReductions) -> torch.Tensor:
        """The definition: source rows [r, cols] -> their maxima; those of all tiles are merged by an elementwise maximum."""

    def kernel(self, source: DType) -> ReduceKernel | None:
        """The fused CPU kernel for this source dtype, or None to run the torch definition."""
        return None


ReduceKernel = Callable[["np.ndarray[Any, Any]", int, int], "np.ndarray[Any, Any]"]
"""A fused CPU kernel of a reduction: kernel(flat, rows, cols), `flat` as for `Kernel`, rows side by side; gives the maxima."""

Kernel = Callable[["np.ndarray[Any, Any]", int, int, int, int, "Sequence[np.ndarray[Any, Any]]"], EncodeStats]
"""A fused CPU kernel: kernel(flat, start, stride, rows, cols, outs).

`flat` is a 1-D contiguous array of the source storage type (u2 for BF16/F16, u4 for F32, u1 for one-byte types);
element (r, c) of the block is flat[start + r*stride + c]. `outs` are 1-D uint8 arrays of exactly `Part.nbytes(rows)` bytes, one
for each part. It must release the interpreter lock while it works.
"""


ErrorKernel = Callable[["np.ndarray[Any, Any]", int, int, int, int, "Sequence[np.ndarray[Any, Any]]"], Errors]
"""Source and what was stored of it, as for `Kernel`, to their errors in one pass; `wrong` counts rows."""


class Codec(ABC):
    """How the rows of one matrix are stored. Instances are small, immutable and hashable (frozen dataclasses)."""

    name: str = ""
    """What a plan prints for it, e.g. "int8 per channel, layout of sm80"."""

    row_align: int = 1
    """Tiles hold a multiple of this many output rows; so does the matrix, unless `partial`."""

    partial: bool = False
    """The last tile of a matrix may hold fewer rows than `row_align`."""

    quantizes: bool = False
    """True if NaN and infinity must stop the conversion."""

    computed: bool = False
    """True if a finite value that becomes infinite must stop the conversion: a factor that was computed is the cause, and no cast."""

    needs: tuple[str, ...] = ()
    """Keys of the reductions that must be complete before rows can be encoded."""

    loads_torch: bool = False
    """Something that comes before the kernel takes torch."""

    torch_bytes_per_element: int = 24
    """Working memory of the torch definition, bytes per source element (its peak, inputs and outputs not counted)."""

    torch_bytes_per_column: int = 0
    """Working memory for each source column, however many rows a tile has."""

    kernel_bytes_per_column: int = 16
    """The same of the fused kernel, which holds a row in float32 and, for packing, once more in bytes; 0 if it works in blocks."""

    def bind(self, known: FinishedReductions, source: str) -> Codec:
        """This encoding with the results it needs, for rows of the source tensor `source`."""
        return self

    def keyed(self, key: str) -> Codec:
        """The same for another weight, where only the key of what it needs tells which weight it is for; "" is any weight."""
        return self

    def cause(self) -> str:
        """What its scales follow from beside the weights, for errors; empty if nothing."""
        return ""

    @abstractmethod
    def parts(self, rows: int, cols: int, experts: int = 0) -> tuple[Part, ...]:
        """The tensors stored for a matrix [rows, cols], or [experts, rows, cols] when experts > 0.

        Row counts of a matrix with experts run over experts * rows.
        """

    @abstractmethod
    def encode(self, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        """The definition: source rows [r, cols] in the source dtype -> one 1-D uint8 tensor for each part, on block's device."""

    @abstractmethod
    def decode(self, parts: Sequence[torch.Tensor], rows: int, cols: int) -> torch.Tensor:
        """Inverse of encode up to the rounding of the format: 1-D uint8 tensors -> float32 [rows, cols]."""

    def values(self, block: torch.Tensor) -> torch.Tensor:
        """What `decode` should give back for these source rows, float32: the yardstick of `verify --source`."""
        return block.to(torch.float32)

    @abstractmethod
    def error(self, block: torch.Tensor) -> torch.Tensor:
        """The most that `decode(encode(block))` may be off `values(block)`, for finite rows that overflow nothing.

        Returns:
            float32, of a shape that broadcasts against `values(block)`; zeros for what is kept as it is.
        """

    def kernel(self, source: DType) -> Kernel | None:
        """The fused CPU kernel for this source dtype, or None to run the torch definition."""
        return None

    def error_kernel(self, source: DType) -> ErrorKernel | None:
        """The fused CPU kernel that holds stored rows against their source, or None to decode them."""
        return None

    def screen(self, source: DType) -> Screen | None:
        """A look at stored rows that spares decoding them where all is well; None without one."""
        return None

    def supposed(self) -> Codec | None:
        """The same with results of its reductions that are made up, to compile its kernel with; None if its kernel is not tried."""
        return None

    def prepare(self, source: DType) -> None:
        """Load and compile what rows of this dtype will need, where that cannot be tried before the reductions are known."""
        codec, cols = self.supposed(), 16
        kernel = codec.kernel(source) if codec is not None else None
        if codec is None or kernel is None:
            torch.zeros(1, dtype=torch.float16).double().pow(0.5)
        else:
            outs = [np.empty(part.nbytes(1), np.uint8) for part in codec.parts(1, cols)]
            kernel(np.zeros(cols, source.storage), 0, cols, 1, cols, outs)


class Exact(Codec):
    """What `decode` gives back without an error."""

    def error(self, block: torch.Tensor) -> torch.Tensor:
        return self.values(block) * 0.0


@dataclass(frozen=True)
class OfMaximum(Codec):
    """What follows from one number, which a maximum, that of `key`, gives.

    Attributes:
        number: what it gave, a float32 value; None until `bind`.
    """

    key: str
    number: float | None = field(default=None, kw_only=True)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,)

    def keyed(self, key: str) -> Codec:
        return replace(self, key=key)

    @abstractmethod
    def number_of(self, amax: Array) -> float:
        """The number that a maximum, float32 [], gives."""

    def bind(self, known: FinishedReductions, source: str) -> Codec:
        return replace(self, number=self.number_of(known.get(self.key)))

    def supposed(self) -> Codec:
        return replace(self, number=1.0)

    @property
    def known(self) -> float:
        if self.number is None:
            raise AssertionError(f"{self.key}: encoded before its reduction")
        return self.number
