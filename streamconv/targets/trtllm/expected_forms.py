"""How each quant_algo stores a linear layer: names, shapes and dtypes.

A format is a function (facts, module, rows N, columns K, local experts or 0) -> the ways to store the module, the usual one first.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.errors import VerifyError, printable
from streamconv.options import Version
from streamconv.targets.trtllm.parallel import ParallelMapping

EXCLUDED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate")
"""What `exclude_modules: null` means."""
_BYTES = {"F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor.

    Attributes:
        dtypes: accepted, the usual one first.
        shape: None where any will do.
        required: whether the loader stops without it.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, ...] | None
    required: bool = True


ModuleSpec = dict[str, TensorSpec]
"""Name -> tensor: one way to store a module."""


@dataclass(slots=True)
class Facts:
    """config.json, with the loader's defaults."""

    config: Mapping[str, Any]
    hidden: int
    layers: int
    heads: int
    kv: int
    size: int
    width: int
    expert_width: int
    rotary: int
    vocab: int
    positions: int
    dtype: str
    grid: ParallelMapping
    version: Version
    algo: str | None
    quantization: Mapping[str, Any]
    experts: int

    def quantized(self, module: str, layer: int) -> bool:
        """Whether a linear layer is stored in the format of `algo`.

        Args:
            layer: global number.
        """
        if self.algo is None:
            return False
        if self.algo.endswith("_PLUGIN"):
            return True
        if self.algo == "FP8_PER_CHANNEL_PER_TOKEN" and self.quantization.get("use_meta_recipe"):
            return ".mlp." in module and layer not in (0, self.layers - 1)
        patterns = self.quantization.get("exclude_modules") or EXCLUDED
        return not any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def _weight_only(bits: int) -> Callable[[Facts, str, int, int, int], Iterator[ModuleSpec]]:
    def forms(facts: Facts, module: str, rows: int, cols: int, experts: int) -> Iterator[ModuleSpec]:
        lead = (experts,) if experts else ()
        yield {
            f"{module}.weight": TensorSpec(("I8",), (*lead, cols, rows * bits // 8)),
            f"{module}.per_channel_scale": TensorSpec((facts.dtype,), (*lead, rows)),
        }
        yield {f"{module}.weight": TensorSpec((facts.dtype,), (*lead, rows, cols))}  # quantized when it is loaded

    return forms


def _gptq(bits: int) -> Callable[[Facts, str, int, int, int], Iterator[ModuleSpec]]:
    def forms(facts: Facts, module: str, rows: int, cols: int, experts: int) -> Iterator[ModuleSpec]:
        lead = (experts,) if experts else ()
        scales = TensorSpec((facts.dtype,), (*lead, cols // _group(facts), rows))
        packed = (*lead, cols, rows * bits // (8 * _BYTES[facts.dtype]))
        zero = {f"{module}.zero": scales} if facts.quantization.get("has_zero_point") else {}
        yield {f"{module}.weight": TensorSpec((facts.dtype,), packed), f"{module}.weights_scaling_factor": scales} | zero

    return forms


def _awq(facts: Facts, module: str, rows: int, cols: int, experts: int) -> Iterator[ModuleSpec]:
    prequant = facts.quantization.get("pre_quant_scale")
    groups = cols // _group(facts)
    exported = {f"{module}.prequant_scaling_factor": TensorSpec((facts.dtype,), (cols,))} if prequant else {}
    yield {
        f"{module}.weight": TensorSpec(("I8",), (rows // 2, cols)),
        f"{module}.weights_scaling_factor": TensorSpec(("F32", facts.dtype), (rows, groups)),
    } | exported
    laid_out = {f"{module}.prequant_scaling_factor": TensorSpec((facts.dtype,), (1, cols))} if prequant else {}
    yield {
        f"{module}.weight": TensorSpec((facts.dtype,), (cols, rows // (2 * _BYTES[facts.dtype]))),
        f"{module}.weights_scaling_factor": TensorSpec((facts.dtype,), (groups, rows)),
    } | laid_out


def _smooth(facts: Facts, module: str, rows: int, cols: int, experts: int) -> Iterator[ModuleSpec]:
    vector = "PER_CHANNEL" in str(facts.algo) or module.endswith("attention.qkv")
    form = {
        f"{module}.weight": TensorSpec(("I8",), (rows, cols)),
        f"{module}.per_channel_scale": TensorSpec(("F32",), (1, rows if vector else 1)),
    }
    if "PER_TOKEN" not in str(facts.algo):
        form[f"{module}.act_scale"] = TensorSpec(("F32",), (1, 1))
    if module.endswith(("attention.dense", "mlp.proj")):
        form[f"{module}.smoother"] = TensorSpec(("F32",), (1, cols))
    yield form


def _fp8(facts: Facts, module: str, rows: int, cols: int, experts: int) -> Iterator[ModuleSpec]:
    lead = (experts,) if experts else ()
    yield {
        f"{module}.weight": TensorSpec(("F8_E4M3", "I8"), (*lead, rows, cols)),
        f"{module}.weights_scaling_factor": TensorSpec(("F32",), (experts, 1) if experts else (1,)),
        f"{module}.activation_scaling_factor": TensorSpec(("F32",), (1,)),
    }


def _fp8_rowwise(facts: Facts, module: str, rows: int, cols: int, experts: int) -> Iterator[ModuleSpec]:
    yield {
        f"{module}.weight": TensorSpec(("F8_E4M3", "I8"), (rows, cols)),
        f"{module}.per_channel_scale": TensorSpec(("F32",), (rows,)),
    }


def _group(facts: Facts) -> int:
    group = facts.quantization.get("group_size", 128)
    if type(group) is not int or group < 1:
        raise VerifyError(f"config.json: quantization.group_size is {printable(repr(group), 60)}, not a size")
    return group


SMOOTH = (
    "W8A8_SQ_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
)
SPECS: dict[str, Callable[[Facts, str, int, int, int], Iterator[ModuleSpec]]] = {
    "W8A16": _weight_only(8),
    "W4A16": _weight_only(4),
    "W8A16_GPTQ": _gptq(8),
    "W4A16_GPTQ": _gptq(4),
    "W4A16_AWQ": _awq,
    "FP8": _fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_rowwise,
} | dict.fromkeys(SMOOTH, _smooth)
"""quant_algo -> how its linear layers are stored."""
