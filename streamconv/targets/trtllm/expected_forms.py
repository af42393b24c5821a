"""What config.json says, and how each quant_algo stores a linear layer: names, shapes and dtypes.

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
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
MOST_RANKS = 4096


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


def _whole(where: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value = where.get(key, default)
    value = default if value is None else value
    if type(value) is not int or not least <= value < 1 << 40:
        raise VerifyError(f"config.json: {key} is {printable(repr(value), 60)}, not a size")
    return value


class Facts:
    """config.json, with the loader's defaults.

    Raises:
        VerifyError: it lacks a size, or holds one that cannot be.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        mapping, self.quantization = config.get("mapping") or {}, config.get("quantization") or {}
        if not isinstance(mapping, dict) or not isinstance(self.quantization, dict):
            raise VerifyError("config.json: mapping and quantization must be objects")
        self.hidden, self.heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
        tp, pp = _whole(mapping, "tp_size", 1), _whole(mapping, "pp_size", 1)
        if tp * pp > MOST_RANKS:
            raise VerifyError(f"config.json: mapping: tp_size {tp} and pp_size {pp} cannot be")
        moe_ep, moe_tp = max(1, _whole(mapping, "moe_ep_size", 1, -1)), _whole(mapping, "moe_tp_size", -1, -1)
        self.grid = ParallelMapping(tp, pp, moe_tp if moe_tp > 0 else tp // moe_ep, moe_ep)
        moe = config.get("moe")
        experts = _whole(moe, "num_experts", 0, 0) if isinstance(moe, dict) else _whole(config, "moe_num_experts", 0, 0)
        self.experts = experts if experts > 1 else 0
        dtype, algo = config.get("dtype"), self.quantization.get("quant_algo")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise VerifyError(f"config.json: dtype is {printable(repr(dtype), 60)}, not one of {', '.join(_DTYPES)}")
        self.dtype, self.algo = _DTYPES[dtype], None if algo in (None, "NO_QUANT") else str(algo)
        self.layers = _whole(config, "num_hidden_layers")
        excluded = self.quantization.get("exclude_modules")
        if excluded is not None and not (isinstance(excluded, list) and all(isinstance(pattern, str) for pattern in excluded)):
            raise VerifyError(f"config.json: quantization.exclude_modules is {printable(repr(excluded), 60)}, not a list of names")
        old = "share_embedding_table" in config and self.layers % pp == 0  # both releases cut such a model alike
        self.version: Version = "0.16" if old else "1.2"
        self.kv = _whole(config, "num_key_value_heads", self.heads)
        self.size = _whole(config, "head_size", max(1, self.hidden // self.heads))
        self.width = _whole(config, "intermediate_size", 4 * self.hidden)
        self.expert_width = _whole(config, "moe_intermediate_size", 0, 0)
        self.rotary = _whole(config, "rotary_embedding_dim", 0, 0)
        self.vocab = _whole(config, "vocab_size")
        self.positions = _whole(config, "max_position_embeddings", 0, 0)

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
