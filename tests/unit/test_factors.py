"""Scales that are not finite, or zero where an engine divides, are never written; the error names the range and its value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from streamconv import api
from streamconv.checkpoint.dtypes import BF16, F16, F32
from streamconv.errors import DataError, StreamconvError
from streamconv.quants.factors import nonfinite, problem
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny

MODULE = "model.layers.1.mlp.down_proj"
FORMATS: dict[str, dict[str, Any]] = {
    "per tensor": {"quant": "smoothquant"},
    "per channel": {"quant": "smoothquant", "per_channel": True},
    "per token": {"quant": "smoothquant", "per_token": True},
    "both": {"quant": "smoothquant", "per_channel": True, "per_token": True},
    "alpha 1": {"quant": "smoothquant", "smoothquant": 1.0},
    "alpha 0": {"quant": "smoothquant", "smoothquant": 0.0},
    "fp8": {"quant": "fp8", "kv_cache": "fp8"},
    "kv int8": {"kv_cache": "int8"},
}


def _ranges(path: Path, change: dict[str, float]) -> Path:
    found = {}
    for name, held in tiny.tensors().items():
        if "_proj" in name:
            for end, axis in ((".x", 1), (".y", 0)):
                key = name.removesuffix(".weight") + end
                found[key] = torch.full((held.shape[axis],), change.get(key, 3.0))
    save_file(found, path)
    return path


@pytest.mark.parametrize("value", [1e-45, 3e38, *(pytest.param(value, marks=pytest.mark.slow) for value in (1e-40, 1e-30, 1e30))])
@pytest.mark.parametrize("end", [".x", ".y"])
@pytest.mark.parametrize("kind", FORMATS)
def test_extreme_ranges(tmp_path: Path, kind: str, end: str, value: float) -> None:
    """Refused with the range's name and value, or converted with every factor finite."""
    modules = [MODULE, "model.layers.1.self_attn.k_proj"]
    ranges = _ranges(tmp_path / "ranges.safetensors", {module + end: value for module in modules})
    source = tiny.write(tmp_path / "in")
    try:
        api.convert(source, tmp_path / "out", TensorRTLLM(activation_ranges=str(ranges), **FORMATS[kind]))
    except DataError as error:
        assert re.search(r"layers\.1\.(mlp\.down_proj|self_attn\.[qk]_proj)", str(error)) and f"{np.float32(value):g}"[:3] in str(error)
        assert not (tmp_path / "out").exists()
        return
    verdict = verify(tmp_path / "out", source)
    assert not verdict.problems and not [line for line in verdict.warnings if "not finite" in line]


def test_ordinary_ranges_pass(tmp_path: Path) -> None:
    ranges, source = _ranges(tmp_path / "ranges.safetensors", {}), tiny.write(tmp_path / "in")
    for number, options in enumerate(FORMATS.values()):
        api.convert(source, tmp_path / str(number), TensorRTLLM(activation_ranges=str(ranges), **options))


def test_fp8_weights_too_small_for_a_scale(tmp_path: Path) -> None:
    weights = tiny.tensors(dtype="float32")
    weights[MODULE + ".weight"] = np.full_like(weights[MODULE + ".weight"], 1e-42)
    source = tiny.write(tmp_path / "in", weights, tiny.config(torch_dtype="float32"))
    ranges = _ranges(tmp_path / "ranges.safetensors", {})
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.proj\.weights_scaling_factor: 2\.8026e-45 is too small to divide by"):
        api.convert(source, tmp_path / "out", TensorRTLLM(quant="fp8", activation_ranges=str(ranges)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_taken_over(tmp_path: Path, value: float) -> None:
    """fbgemm's scales of channels, which are copied."""
    weights: dict[str, Any] = {name: torch.from_numpy(held) for name, held in tiny.tensors().items()}
    for name in [name for name in weights if "_proj" in name]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[name + "_scale"] = torch.ones(len(weights[name]), 1)
    weights[MODULE + ".weight_scale"][7] = value
    folder = tmp_path / "in"
    tiny.write(folder, settings=tiny.config(quantization_config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match=rf"layers\.1\.mlp\.proj\.per_channel_scale: {value:g} .* from {re.escape(MODULE)}\.weight_scale"):
        api.convert(folder, tmp_path / "out", TensorRTLLM())


@pytest.mark.parametrize("bound", [float("inf"), 0.0])
def test_a_clamp_that_is_none(tmp_path: Path, bound: float) -> None:
    told = tiny.config(quantization_config={"quant_method": "fbgemm_fp8", "activation_scale_ub": bound})
    with pytest.raises(StreamconvError, match="activation_scale_ub"):
        api.open_and_plan(tiny.write(tmp_path / "in", settings=told), TensorRTLLM())


def test_which_values_are_wrong() -> None:
    def held(dtype: Any, *values: float) -> Any:
        return torch.tensor(values, dtype=getattr(torch, dtype.torch)).view(torch.uint8).numpy()

    for dtype in (F16, BF16, F32):
        assert problem("a.per_channel_scale", dtype, held(dtype, 0.0, 1.0), False) is None
        assert "inf" in str(problem("a.per_channel_scale", dtype, held(dtype, 1.0, float("-inf")), False))
        assert "nan" in str(problem("a.zero", dtype, held(dtype, float("nan")), False))
        assert problem("a.smoother", dtype, held(dtype, 1.0, 0.0), False)
        assert problem("a.weight", dtype, held(dtype, float("nan")), False) is None
        assert nonfinite(dtype, held(dtype, 1.0, float("nan"), float("inf"), -2.0)) == 2
    assert problem("a.weights_scaling_factor", F16, held(F16, 0.0), False) is None
    assert problem("a.weights_scaling_factor", F32, held(F32, 1e-42), True)
