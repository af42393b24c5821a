"""What a weight format of TensorRT-LLM is: which linear layers get which codec, and what `streamconv list quants` says of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from streamconv.checkpoint.dtypes import DType
from streamconv.options import TARGET_VERSIONS, Version
from streamconv.quants.base import Codec
from streamconv.targets.trtllm.options import TensorRTLLM


@dataclass(frozen=True, slots=True)
class QuantInfo:
    """A line of `streamconv list quants`.

    Attributes:
        key: the value of --quant.
        algo: config.json quantization.quant_algo, None for an unquantized checkpoint.
        summary: one line for people.
        sm_dependent: the bytes depend on --target-sm.
        flags: further flags that decide how it is stored.
        stores: dtypes of a linear layer's tensors.
        least_sm: compute capability that the kernels need, None for all that TensorRT-LLM runs on.
        versions: TensorRT-LLM lines that read it.
        evidence: where its bytes are proven: "golden" conversions of NVIDIA's, or the specification alone.
    """

    key: str
    algo: str | None
    summary: str
    sm_dependent: bool = False
    flags: tuple[str, ...] = ()
    stores: str = ""
    least_sm: int | None = None
    versions: tuple[Version, ...] = TARGET_VERSIONS
    evidence: Literal["golden", "specification"] = "golden"


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer about to be encoded for one rank.

    Attributes:
        name: path inside a layer, e.g. "attention.qkv" or "mlp.fc".
        layer: global layer number; `layers` is their count.
        rows, cols: rank-local size of the matrix (of one expert).
        full_rows, full_cols: size before the tensor parallel split (KV heads counted after duplication).
        experts: experts on this rank, 0 for a dense layer.
        tp: size of the group it is split over.
    """

    name: str
    layer: int
    layers: int
    rows: int
    cols: int
    full_rows: int
    full_cols: int
    experts: int
    tp: int


class Quant(ABC):
    """One value of --quant.

    Attributes:
        packings: how the linear layers of a source must be packed to be taken over; None: they are floats.
        row_bias_once: the bias of a row-parallel layer is added before the all-reduce: ranks other than the first hold zeros.
    """

    __slots__ = ()
    packings: tuple[str, ...] | None = None
    row_bias_once: bool = False

    @property
    @abstractmethod
    def info(self) -> QuantInfo: ...

    @abstractmethod
    def codec(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | str:
        """How this module is stored, or why it is left in the model dtype.

        Raises:
            RefusedError: it cannot be stored so; names the sizes.
        """

    def constants(self, layer: int, layers: int, options: TensorRTLLM) -> list[tuple[str, DType, tuple[int, ...], bytes]]:
        """Tensors of a layer that no weight decides: (name inside the layer, dtype, shape, bytes)."""
        return []
