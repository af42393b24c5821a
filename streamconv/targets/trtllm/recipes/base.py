"""What a weight format of TensorRT-LLM is: which linear layers get which codec, and what `streamconv list quants` says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from streamconv.options import TARGET_VERSIONS, Version

if TYPE_CHECKING:
    from streamconv.checkpoint.dtypes import DType
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


class Quant(Protocol):
    """One value of --quant."""

    @property
    def info(self) -> QuantInfo: ...

    def encoding(self, module: Module, options: TensorRTLLM, dtype: DType) -> Codec | None:
        """How this module is stored, or None to leave it in the model dtype."""

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        """Why this module cannot be stored so, naming sizes; None if it can."""

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        """Why a module is left unquantized."""
