"""AutoAWQ's container as an output: its words taken apart here, by the layout that its own unpacking has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv import api
from streamconv.cli.main import main
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny

GROUP = 64
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Channel of the n-th nibble of a word, from the lowest."""


def unpacked(words: torch.Tensor) -> np.ndarray[Any, Any]:
    """int32 [R, N / 8] -> int [R, N]."""
    stored = words.numpy().view(np.uint32)
    made = np.zeros((len(stored), stored.shape[1], 8), int)
    for nibble, channel in enumerate(ORDER):
        made[:, :, channel] = (stored >> (4 * nibble)) & 15
    return made.reshape(len(stored), -1)


def decoded(made: dict[str, torch.Tensor], module: str) -> np.ndarray[Any, Any]:
    """float32 [N, K]."""
    codes, zeros = (unpacked(made[f"{module}.{leaf}"]) for leaf in ("qweight", "qzeros"))
    scales = made[f"{module}.scales"].float().numpy()
    return ((codes - zeros.repeat(GROUP, 0)).astype(np.float32) * scales.repeat(GROUP, 0)).T


def model(folder: Path, dtype: str, small: float = 1e-7) -> dict[str, np.ndarray[Any, Any]]:
    weights = tiny.tensors(dtype="float32")
    up = weights["model.layers.0.mlp.up_proj.weight"]
    up[3, :GROUP], up[4, :GROUP], up[5, :GROUP] = 0, np.abs(up[4, :GROUP]) + 1, small  # zeros; far from zero; subnormal scales
    kind = getattr(torch, dtype)
    weights = {name: torch.from_numpy(values).to(kind).float().numpy() for name, values in weights.items()}
    tiny.write(folder, weights, tiny.config(torch_dtype=dtype))
    save_file({name: torch.from_numpy(values).to(kind) for name, values in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_zero_points_and_codes_are_those_of_the_definition(dtype: str, tmp_path: Path) -> None:
    weights = model(tmp_path / "in", dtype)
    api.convert(tmp_path / "in", tmp_path / "out", HuggingFace(quant="w4a16", format="awq", group_size=GROUP))
    made = load_file(tmp_path / "out/model.safetensors")
    kind = torch.float16 if dtype == "float32" else getattr(torch, dtype)
    for name in ("0.mlp.up_proj", "1.mlp.down_proj", "1.self_attn.k_proj"):
        module = f"model.layers.{name}"
        groups = weights[f"{module}.weight"].reshape(len(weights[f"{module}.weight"]), -1, GROUP)
        low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
        scale = torch.from_numpy((high - low) / np.float32(15)).to(kind).float().numpy()
        scale = np.maximum(np.where(scale == 0, np.float32(1), scale), np.float32(2.0**-14))
        zero = np.clip(np.rint(-low / scale), 0, 15)
        codes = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, 15).reshape(len(groups), -1)
        assert made[f"{module}.scales"].dtype == torch.float16 and np.array_equal(made[f"{module}.scales"].float().numpy(), scale.T)
        assert np.array_equal(unpacked(made[f"{module}.qzeros"]), zero.T) and np.array_equal(unpacked(made[f"{module}.qweight"]), codes.T)
    stated = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    told = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    assert stated == told | {"modules_to_not_convert": ["lm_head"]}
    assert not verify(tmp_path / "out", tmp_path / "in").problems
    (tmp_path / "out/streamconv.json").unlink()
    assert not verify(tmp_path / "out", tmp_path / "in").problems
    # as a source: the same floats, and the same codes in another container
    api.convert(tmp_path / "out", tmp_path / "back", HuggingFace(dtype="float32"))
    back, module = load_file(tmp_path / "back/model.safetensors"), "model.layers.0.mlp.up_proj"
    assert np.array_equal(back[f"{module}.weight"].numpy(), decoded(made, module))
    api.convert(tmp_path / "out", tmp_path / "kept", HuggingFace(quant="keep", format="compressed-tensors"))
    words = load_file(tmp_path / "kept/model.safetensors")[f"{module}.weight_packed"].numpy().view(np.uint32)
    kept = np.stack([(words >> (4 * place)) & 15 for place in range(8)], 2).reshape(len(words), -1)
    assert np.array_equal(kept, unpacked(made[f"{module}.qweight"]).T)


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_a_method_has_the_values_of_the_other_containers(method: str, tmp_path: Path) -> None:
    model(tmp_path / "in", "bfloat16", 1e-2)
    common: dict[str, Any] = {"quant": "w4a16", "group_size": GROUP, "method": method}
    for container in ("awq", "compressed-tensors"):
        api.convert(tmp_path / "in", tmp_path / container, HuggingFace(format=container, **common))
    made = load_file(tmp_path / "awq/model.safetensors")
    api.convert(tmp_path / "compressed-tensors", tmp_path / "back", HuggingFace(dtype="float32"))
    for name, values in load_file(tmp_path / "back/model.safetensors").items():
        if f"{name[:-7]}.qweight" in made:
            assert bool((made[f"{name[:-7]}.qzeros"] == -0x77777778).all())  # eight nibbles of 8
            assert np.array_equal(decoded(made, name[:-7]), values.numpy())
    assert not verify(tmp_path / "awq", tmp_path / "in").problems
    api.convert(tmp_path / "awq", tmp_path / "ranks", TensorRTLLM(tp_size=2, target_sm=80))


def test_what_has_no_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(tmp_path / "in", "float16")
    api.convert(tmp_path / "in", tmp_path / "ct", HuggingFace(quant="w4a16", group_size=GROUP))
    awq = ["--to", "hf", "--format", "awq"]
    for source, flags, status, said in (
        ("in", [*awq, "--quant", "w8a16"], 2, "it has compressed-tensors and modelopt"),
        ("in", [*awq, "--quant", "w4a16", "--group-size", "96"], 4, "does not divide into groups of 96"),
        ("ct", [*awq, "--quant", "w4a16", "--group-size", "64"], 2, "--quant none first"),
        ("ct", [*awq, "--quant", "keep"], 2, "have no place in --format awq"),
    ):
        assert main(["convert", str(tmp_path / source), str(tmp_path / "out"), *flags]) == status
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
