"""How each quant_algo stores a linear layer: names, shapes and dtypes.

A format is a function (facts, module, rows N, columns K, (local experts,) or ()) -> the ways to store the module, the usual one first: last
names and tensors.
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


_Format = Callable[[Facts, str, int, int, tuple[int, ...]], Iterator[ModuleSpec]]


def _tensor(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec((dtype,), shape)


def _weight_only(bits: int) -> _Format:
    def forms(facts: Facts, module: str, rows: int, cols: int, lead: tuple[int, ...]) -> Iterator[ModuleSpec]:
        yield {"weight": _tensor("I8", *lead, cols, rows * bits // 8), "per_channel_scale": _tensor(facts.dtype, *lead, rows)}
        yield {"weight": _tensor(facts.dtype, *lead, rows, cols)}  # quantized when it is loaded

    return forms


def _gptq(bits: int) -> _Format:
    def forms(facts: Facts, module: str, rows: int, cols: int, lead: tuple[int, ...]) -> Iterator[ModuleSpec]:
        scales = _tensor(facts.dtype, *lead, cols // _group(facts), rows)
        packed = _tensor(facts.dtype, *lead, cols, rows * bits // (8 * _BYTES[facts.dtype]))
        zero = {"zero": scales} if facts.quantization.get("has_zero_point") else {}
        yield {"weight": packed, "weights_scaling_factor": scales} | zero

    return forms


def _awq(facts: Facts, module: str, rows: int, cols: int, lead: tuple[int, ...]) -> Iterator[ModuleSpec]:
    dtype, groups = facts.dtype, cols // _group(facts)
    exported = {"weight": _tensor("I8", rows // 2, cols), "weights_scaling_factor": TensorSpec(("F32", dtype), (rows, groups))}
    laid_out = {"weight": _tensor(dtype, cols, rows // (2 * _BYTES[dtype])), "weights_scaling_factor": _tensor(dtype, groups, rows)}
    for form, shape in ((exported, (cols,)), (laid_out, (1, cols))):
        yield form | ({"prequant_scaling_factor": _tensor(dtype, *shape)} if facts.quantization.get("pre_quant_scale") else {})


def _smooth(facts: Facts, module: str, rows: int, cols: int, lead: tuple[int, ...]) -> Iterator[ModuleSpec]:
    vector = "PER_CHANNEL" in str(facts.algo) or module.endswith("attention.qkv")
    form = {"weight": _tensor("I8", rows, cols), "per_channel_scale": _tensor("F32", 1, rows if vector else 1)}
    if "PER_TOKEN" not in str(facts.algo):
        form["act_scale"] = _tensor("F32", 1, 1)
    if module.endswith(("attention.dense", "mlp.proj")):
        form["smoother"] = _tensor("F32", 1, cols)
    yield form


def _fp8(facts: Facts, module: str, rows: int, cols: int, lead: tuple[int, ...]) -> Iterator[ModuleSpec]:
    scales = {"weights_scaling_factor": _tensor("F32", *lead, 1), "activation_scaling_factor": _tensor("F32", 1)}
    yield {"weight": TensorSpec(("F8_E4M3", "I8"), (*lead, rows, cols))} | scales


def _fp8_rowwise(facts: Facts, module: str, rows: int, cols: int, lead: tuple[int, ...]) -> Iterator[ModuleSpec]:
    yield {"weight": TensorSpec(("F8_E4M3", "I8"), (rows, cols)), "per_channel_scale": _tensor("F32", rows)}


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
SPECS: dict[str, _Format] = {
    "W8A16": _weight_only(8),
    "W4A16": _weight_only(4),
    "W8A16_GPTQ": _gptq(8),
    "W4A16_GPTQ": _gptq(4),
    "W4A16_AWQ": _awq,
    "FP8": _fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_rowwise,
} | dict.fromkeys(SMOOTH, _smooth)
"""quant_algo -> how its linear layers are stored."""
