"""The quantizations, found by being in this folder.

Each file that defines formats has a tuple QUANTS of objects with the attributes of `Quant`. An import error is fatal.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

from streamconv.checkpoint.dtypes import DType
from streamconv.errors import UsageError
from streamconv.quants.base import Encoding, QuantInfo
from streamconv.targets.trtllm.unsupported import refuse

if TYPE_CHECKING:
    from streamconv.targets.trtllm.options import TensorRTLLM

__all__ = ["Module", "Quant", "all_quants", "quant_of"]


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

    def encoding(self, module: Module, options: TensorRTLLM, dtype: DType) -> Encoding | None:
        """How this module is stored, or None to leave it in the model dtype."""

    def problems(self, module: Module, options: TensorRTLLM, dtype: DType) -> str | None:
        """Why this module cannot be stored so, naming sizes; None if it can."""

    def reason(self, module: Module, options: TensorRTLLM) -> str:
        """Why a module is left unquantized."""


@cache
def all_quants() -> dict[str, Quant]:
    """key -> quant, in the order of their keys' files."""
    found: dict[str, Quant] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for quant in getattr(loaded, "QUANTS", ()):
            found[quant.info.key] = quant
    return found


def quant_of(key: str) -> Quant:
    """The quant for a --quant value.

    Raises:
        UsageError: no such key; the message lists those there are.
        RefusedError: a format that only another tool can make; the hint says which.
    """
    quants = all_quants()
    if key not in quants:
        refuse(key)
        raise UsageError(f"unknown --quant {key!r}", hint=f"one of {', '.join(quants)}")
    return quants[key]
