"""What a source says about how it was quantized: config.json, quantize_config.json, hf_quant_config.json."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.untrusted import read_json, shown_value
from streamconv.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class SourceQuantization:
    """Stated facts; None where the source states nothing.

    Attributes:
        method: "gptq", "awq", "fbgemm_fp8", "modelopt" or another tool's name, lower case.
        algo: ModelOpt's quant_algo, upper case.
        group_size: input channels that share a scale; -1 for a whole column.
        format: checkpoint_format of GPTQ ("gptq", "gptq_v2"), which its tool calls format too, or the version of AWQ ("gemm").
        act_order: desc_act of GPTQ.
        symmetric: sym of GPTQ: every zero point is the middle one.
        activation_bound: activation_scale_ub of fbgemm.
        stated_in: file name, for messages.
        kv_algo: ModelOpt's kv_cache_quant_algo, upper case.
    """

    method: str
    algo: str | None = None
    bits: int | None = None
    group_size: int | None = None
    format: str | None = None
    act_order: bool = False
    symmetric: bool = True
    activation_bound: float | None = None
    stated_in: str = "config.json"
    kv_algo: str | None = None

    @property
    def title(self) -> str:
        """For messages: "modelopt FP8", "gptq, 4 bits"."""
        bits = f", {self.bits} bits" if self.bits else ""
        return f"{self.method}{' ' + self.algo if self.algo else ''}{bits}"

    @property
    def brings_scales(self) -> bool:
        """FP8 with a scale for each matrix and its input: nothing is left to calibrate."""
        return self.method == "modelopt" and self.algo == "FP8"


_MODELOPT, _GPTQ = "hf_quant_config.json", "quantize_config.json"
STATEMENTS = ("quantization_config", "compression_config")
"""Keys of config.json that say how weights are quantized; the second is compressed-tensors' until 2024."""
INNER = ("text_config", "llm_config", "language_config")
"""Keys of config.json below which a language model inside a larger one has its own."""
_MOST = 1 << 20
_LARGEST = 3.4028234e38
"""Of float32, in which a checkpoint states the bound."""


_COMPANION = re.compile(r"scale|zero|absmax|quant|packed|g_idx|SCB|amax")
"""Last parts of the names of what only quantized weights have beside them."""
_FLOATS = ("F16", "BF16", "F32", "F64")
AUTO_ROUND = ("auto-round", "auto_round")
"""Values of quant_method that are AutoRound."""
AUTO_ROUND_FORMS = {"auto_round": "gptq_v2", "auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "gemm"}
"""packing_format of AutoRound -> the format that it is: its own stores zero points as they are."""
_IN_FLOAT = ("bitnet",)
"""Methods whose weights are stored in a float type and quantized by the model itself."""


def source_quantization(index: Index) -> SourceQuantization | None:
    """Facts of the source, or None for an unquantized one (and for a GPTQ file without any statement).

    Raises:
        CheckpointError: a file is not a JSON object.
    """
    quantization = stated_quantization(index.config, index.root)
    return None if quantization is not None and _is_left_over(index, quantization) else quantization


def left_over(index: Index) -> str | None:
    """A warning, if the source says that it is quantized and its tensors that it is not (a merge saved with the old config)."""
    quantization = stated_quantization(index.config, index.root)
    if quantization is None or not _is_left_over(index, quantization):
        return None
    return f"{quantization.stated_in} says {quantization.title}, but no tensor is quantized: it is taken for an unquantized model"


def _is_left_over(index: Index, quantization: SourceQuantization) -> bool:
    if quantization.method in _IN_FLOAT:
        return False
    return all(r.dtype.name in _FLOATS and not _COMPANION.search(name.rpartition(".")[2]) for name, r in index.tensors.items())


def stated_quantization(config: Mapping[str, Any], root: Path) -> SourceQuantization | None:
    """What the files beside the weights say.

    Args:
        root: the source, a folder or a file in it.

    Raises:
        CheckpointError: a file is not a JSON object, or states what is none, no name of a method or no bound.
    """
    pair = statement(config, root)
    if pair is None:
        return None
    section, name = pair
    if name == _MODELOPT:
        return _modelopt(section, name)
    method = section.get("quant_method", "gptq" if name == _GPTQ else "unknown")
    if not isinstance(method, str):
        raise CheckpointError(f"{name}: quant_method is {shown_value(method)}, no name")
    method = method.lower()
    if method.startswith("modelopt") and name != _GPTQ:
        return _modelopt(section, name)
    return _facts(method, section, name)


def statement(config: Mapping[str, Any], root: Path) -> tuple[dict[str, Any], str] | None:
    """The statement that counts, and its file; None if there is none. As of `stated_quantization`.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    folder = root if os.path.isdir(root) else root.parent
    section = stated_in(config)
    if isinstance(section, dict):
        return section, "config.json"
    if section is not None:
        raise CheckpointError(f"config.json: quantization_config is {shown_value(section)}, no object")
    for name in (_MODELOPT, _GPTQ):
        if os.path.lexists(folder / name):
            return read_json(folder / name, _MOST), name
    return None


def stated_in(config: Mapping[str, Any]) -> Any:
    """`quantization_config` of config.json, as it is; None if there is none.

    Where the whole model has none, that of its language model, or compressed-tensors' older key: vLLM reads either.
    """
    sections = (part.get(key) for part in (config, *inner_configs(config).values()) for key in STATEMENTS)
    return next((section for section in sections if section is not None), None)


def inner_configs(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Key -> what config.json says of a language model inside a larger one."""
    return {key: part for key in INNER if isinstance(part := config.get(key), dict)}


def without_statement(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same without any statement of `stated_in`."""
    inner = {key: without_statement(part) for key, part in inner_configs(config).items()}
    return {key: inner.get(key, value) for key, value in config.items() if key not in STATEMENTS or value is None}


def gptq_format(config: Mapping[str, Any]) -> object:
    """The layout of GPTQ; its tools write it under either name."""
    return config.get("checkpoint_format", config.get("format"))


def _facts(method: str, config: Mapping[str, Any], name: str) -> SourceQuantization:
    form = gptq_format(config) if method == "gptq" else config.get("checkpoint_format", config.get("version"))
    if method in AUTO_ROUND:
        form = AUTO_ROUND_FORMS.get(str(config.get("packing_format")), config.get("packing_format"))
    bound = config.get("activation_scale_ub")
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound <= _LARGEST):
        raise CheckpointError(f"{name}: activation_scale_ub is {shown_value(bound)}, not a positive float32")
    return SourceQuantization(
        method=method,
        bits=_int(config.get("bits", config.get("w_bit"))),
        group_size=_int(config.get("group_size", config.get("q_group_size"))),
        format=str(form).lower() if form is not None else None,
        act_order=bool(config.get("desc_act", False)),
        symmetric=config.get("sym") is not False,
        activation_bound=None if bound is None else float(bound),
        stated_in=name,
    )


def _modelopt(config: Mapping[str, Any], name: str) -> SourceQuantization:
    inner = config.get("quantization", config)
    inner = inner if isinstance(inner, dict) else {}
    algo = inner.get("quant_algo")
    return SourceQuantization(
        method="modelopt",
        algo=str(algo).upper() if algo else None,
        group_size=_int(inner.get("group_size")),
        stated_in=name,
        kv_algo="FP8" if isinstance(inner.get("kv_cache_scheme"), dict) else str(inner.get("kv_cache_quant_algo") or "").upper() or None,
    )


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
