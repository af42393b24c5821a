"""Scales of activations and of the KV cache, from activation ranges."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from streamconv import api
from streamconv.errors import RefusedError, TensorError, UsageError
from streamconv.targets.hf.target import HuggingFace
from streamconv.verification.check import verify
from tests import tiny

Arrays = dict[str, "np.ndarray[Any, Any]"]


def ranges_of(weights: Arrays) -> Arrays:
    random = np.random.default_rng(7)
    made: Arrays = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            module = name.removesuffix(".weight")
            made[f"{module}.x"] = random.uniform(0.5, 9, weight.shape[1]).astype(np.float32)
            made[f"{module}.y"] = random.uniform(0.5, 9, weight.shape[0]).astype(np.float32)
    return made


def experts(count: int = 3) -> Arrays:
    random = np.random.default_rng(2)
    shapes = {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}
    names = {f"model.layers.0.mlp.experts.{e}.{leaf}.weight": shape for e in range(count) for leaf, shape in shapes.items()}
    names["model.layers.0.mlp.gate.weight"] = (count, 128)
    return {name: random.normal(0, 0.05, shape).astype(np.float16) for name, shape in names.items()}


def setting(tmp_path: Path, weights: Arrays, ranges: Arrays) -> tuple[Path, str]:
    source = tiny.write(tmp_path / "source", weights, tiny.config(num_hidden_layers=tiny.layers(weights)))
    save_file(ranges, tmp_path / "ranges.safetensors")
    return source, str(tmp_path / "ranges.safetensors")


def scales(folder: Path) -> Arrays:
    """The tensors in float32."""
    found = load_file(folder / "model.safetensors")
    return {name: tensor.numpy() for name, tensor in found.items() if tensor.dtype == torch.float32}


def numbers(folder: Path, suffix: str) -> dict[str, float]:
    return {name: float(value.reshape(())) for name, value in scales(folder).items() if name.endswith(suffix) and value.size == 1}


@pytest.mark.parametrize(
    ("quant", "container", "suffix", "scale", "shape"),
    [
        ("fp8_static", "modelopt", "input_scale", lambda x: x / np.float32(448), ()),
        ("fp8_static", "compressed-tensors", "input_scale", lambda x: x / np.float32(448), (1,)),
        ("nvfp4", "modelopt", "input_scale", lambda x: x / np.float32(2688), ()),
        ("nvfp4", "compressed-tensors", "input_global_scale", lambda x: np.float32(2688) / x, (1,)),
    ],
)
def test_inputs(tmp_path: Path, quant: str, container: str, suffix: str, scale: Any, shape: tuple[int, ...]) -> None:
    weights = tiny.tensors()
    ranges = ranges_of(weights)
    source, file = setting(tmp_path, weights, ranges)
    api.convert(source, tmp_path / "out", HuggingFace(quant=quant, format=container, activation_ranges=file))
    got = {name: value for name, value in scales(tmp_path / "out").items() if name.endswith(suffix)}
    assert len(got) == 14 and {value.shape for value in got.values()} == {shape}
    at = "model.layers.1.self_attn"
    shared = max(ranges[f"{at}.{leaf}_proj.x"].max() for leaf in "qkv")
    for leaf in "qkv":
        assert got[f"{at}.{leaf}_proj.{suffix}"].reshape(()) == scale(shared)
    assert got[f"{at}.o_proj.{suffix}"].reshape(()) == scale(ranges[f"{at}.o_proj.x"].max())
    assert verify(tmp_path / "out", source).problems == []
    moved = (tmp_path / "ranges.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert verify(tmp_path / "out", source, activation_ranges=str(moved)).problems == []


@pytest.mark.parametrize("missing", [False, True])
def test_experts_without_tokens_take_the_layers_largest(tmp_path: Path, missing: bool) -> None:
    weights = experts()
    ranges = ranges_of(weights)
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.1.{leaf}.x"
        if missing:
            del ranges[name]
        else:
            ranges[name][:] = 0
    source, file = setting(tmp_path, weights, ranges)
    api.convert(source, tmp_path / "out", HuggingFace(quant="fp8_static", activation_ranges=file))
    got, at = numbers(tmp_path / "out", "input_scale"), "model.layers.0.mlp.experts"
    for leaves in (("gate_proj", "up_proj"), ("down_proj",)):
        largest = max(ranges[f"{at}.{e}.{leaf}.x"].max() for e in (0, 2) for leaf in leaves)
        assert all(got[f"{at}.1.{leaf}.input_scale"] == np.float32(largest) / np.float32(448) for leaf in leaves)
    assert min(got.values()) > 0


@pytest.mark.parametrize("container", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("quant", ["fp8_dynamic", "nvfp4"])
def test_cache(tmp_path: Path, quant: str, container: str) -> None:
    weights = tiny.tensors()
    ranges = ranges_of(weights)
    source, file = setting(tmp_path, weights, ranges)
    api.convert(source, tmp_path / "out", HuggingFace(quant=quant, format=container, activation_ranges=file, kv_cache="fp8"))
    got, at = numbers(tmp_path / "out", "_scale"), "model.layers.1.self_attn"
    for which in "kv":
        name = f"{at}.{which}_proj.{which}_scale" if container == "modelopt" else f"{at}.{which}_scale"
        assert got[name] == ranges[f"{at}.{which}_proj.y"].max() / np.float32(448)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    if container == "modelopt":
        second = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
        assert second["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert verify(tmp_path / "out", source).problems == []


def test_the_ranges_count_by_content(tmp_path: Path) -> None:
    weights = tiny.tensors()
    source, file = setting(tmp_path, weights, ranges_of(weights))
    wanted = HuggingFace(quant="fp8_static", activation_ranges=file)
    save_file(ranges_of(weights), tmp_path / "copy.safetensors")
    (tmp_path / "folder").mkdir()
    copy = (tmp_path / "copy.safetensors").rename(tmp_path / "folder/ranges.safetensors")
    prints = [
        api.open_and_plan(source, options)[1].fingerprint()
        for options in (wanted, dataclasses.replace(wanted, activation_ranges=str(copy)))
    ]
    assert prints[0] == prints[1]
    save_file({name: value * np.float32(2) for name, value in ranges_of(weights).items()}, copy)
    assert api.open_and_plan(source, dataclasses.replace(wanted, activation_ranges=str(copy)))[1].fingerprint() != prints[0]


def test_refusals(tmp_path: Path) -> None:
    weights = tiny.tensors()
    ranges = ranges_of(weights)
    source, file = setting(tmp_path, weights, ranges)
    for options, message in (
        (HuggingFace(quant="nvfp4"), "--quant nvfp4 needs activation ranges"),
        (HuggingFace(quant="fp8_dynamic", kv_cache="fp8"), "--kv-cache fp8 needs activation ranges"),
        (HuggingFace(quant="fp8_dynamic", activation_ranges=file), "nothing that is asked for needs them"),
        (HuggingFace(quant="fp8_block", kv_cache="fp8", activation_ranges=file), "hold scales of the cache"),
        (HuggingFace(kv_cache="fp8", activation_ranges=file), "hold scales of the cache"),
        (HuggingFace(quant="fp8_static", activation_ranges=str(tmp_path / "none")), "no such file"),
    ):
        with pytest.raises(UsageError, match=message):
            api.open_and_plan(source, options)
    del ranges["model.layers.0.mlp.down_proj.x"]
    ranges["model.layers.1.mlp.down_proj.x"][3] = np.nan
    save_file(ranges, file)
    with pytest.raises(TensorError, match=r"(?s)layers\.0\.mlp\.down_proj\.x is missing.*layers\.1\.mlp\.down_proj\.x: not finite"):
        api.open_and_plan(source, HuggingFace(quant="fp8_static", activation_ranges=file))
    tiny.write(source, experts(), tiny.config(num_hidden_layers=1))
    save_file(ranges_of(experts()), file)
    with pytest.raises(RefusedError, match="no k_proj and v_proj"):
        api.open_and_plan(source, HuggingFace(quant="fp8_dynamic", kv_cache="fp8", activation_ranges=file))


def test_scales_of_a_cache_beside_weights_that_stayed(tmp_path: Path) -> None:
    """`verify --source` without a manifest: nothing of the source has these names."""
    weights = tiny.tensors()
    model, ranges = setting(tmp_path, weights, ranges_of(weights))
    target = HuggingFace(quant="fp8_static", kv_cache="fp8", ignore=("*.self_attn.*",), activation_ranges=ranges)
    api.convert(model, tmp_path / "out", target)
    (tmp_path / "out" / "streamconv.json").unlink()
    assert not verify(tmp_path / "out", model).problems
