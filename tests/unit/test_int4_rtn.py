"""INT4 in groups without data: TensorRT-LLM's W4A16_AWQ and the directories of --quant w4a16, against a direct computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from streamconv import api
from streamconv.checkpoint.dtypes import BF16, F16, F32
from streamconv.cli.main import main
from streamconv.quants.base import EncodeStats
from streamconv.quants.int_group import RATIOS, round_to_nearest
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny

GROUP = 64


def rounded(values: np.ndarray[Any, Any], kind: torch.dtype) -> np.ndarray[Any, Any]:
    return torch.from_numpy(np.ascontiguousarray(values)).to(kind).float().numpy()


def nearest(weight: np.ndarray[Any, Any], kind: torch.dtype) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes [N, K] and scales [N, K/g], float32, by the definition: the scale rounded to `kind` before the codes are made."""
    groups = rounded(weight, kind).reshape(len(weight), -1, GROUP)
    scale = rounded(np.abs(groups).max(2) / np.float32(8), kind)
    scale = np.where(scale == 0, np.float32(1), scale)
    if kind == torch.float16:
        scale = np.maximum(scale, np.float32(2.0**-14))
    codes = np.clip(np.rint(groups / scale[..., None]), -8, 7)
    return codes.reshape(weight.shape), scale


def unpaired(stored: torch.Tensor) -> np.ndarray[Any, Any]:
    """[N/2, K] bytes, the even channel in the low nibble -> signed [N, K]."""
    packed = stored.view(torch.uint8).numpy().astype(np.int16)
    nibbles = np.stack([packed & 15, packed >> 4], 1).reshape(-1, packed.shape[1])
    return np.where(nibbles > 7, nibbles - 16, nibbles)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_every_rank_holds_slices_of_the_definition(dtype: str, tp: int, tmp_path: Path) -> None:
    weights = tiny.tensors(dtype="float32")
    weights["model.layers.0.mlp.up_proj.weight"][3, :GROUP] = 0  # a group of zeros
    weights["model.layers.0.mlp.up_proj.weight"][4, :GROUP] = np.abs(weights["model.layers.0.mlp.up_proj.weight"][4, :GROUP])
    weights["model.layers.0.mlp.up_proj.weight"][5, :GROUP] = 1e-7  # subnormal scales in float16
    model = tiny.write(tmp_path / "in", weights, tiny.config(torch_dtype="float32"))
    api.convert(model, tmp_path / "out", TensorRTLLM(quant="int4_awq", group_size=GROUP, dtype=dtype, tp_size=tp))
    ranks = [load_file(tmp_path / f"out/rank{rank}.safetensors") for rank in range(tp)]
    for name, source, axis in (("mlp.fc", "mlp.gate_proj", 0), ("mlp.gate", "mlp.up_proj", 0), ("mlp.proj", "mlp.down_proj", 1)):
        codes, scales = nearest(weights[f"model.layers.0.{source}.weight"], getattr(torch, dtype))
        at = f"transformer.layers.0.{name}."
        assert np.array_equal(np.concatenate([unpaired(rank[at + "weight"]) for rank in ranks], axis), codes)
        stored = [rank[at + "weights_scaling_factor"] for rank in ranks]
        assert all(part.dtype == torch.float32 for part in stored)
        assert np.array_equal(np.concatenate([part.numpy() for part in stored], axis), scales)
        for rank in ranks:
            ones = rank[at + "prequant_scaling_factor"]
            assert torch.equal(ones, torch.ones(codes.shape[1] // (tp if axis else 1), dtype=getattr(torch, dtype)))
    assert not verify(tmp_path / "out", model).problems


@pytest.mark.parametrize("container", ["compressed-tensors", "modelopt"])
def test_hugging_face_divides_by_8(container: str, tmp_path: Path) -> None:
    weights = tiny.tensors()
    model = tiny.write(tmp_path / "in", weights)
    api.convert(model, tmp_path / "out", HuggingFace(quant="w4a16", method="rtn", group_size=GROUP, format=container))
    made, at = load_file(tmp_path / "out/model.safetensors"), "model.layers.1.mlp.down_proj"
    codes, scales = nearest(weights[f"{at}.weight"], torch.float16)
    if container == "modelopt":
        assert np.array_equal(unpaired(made[f"{at}.weight"]), codes) and made[f"{at}.weight_scale"].dtype == torch.float32
    else:
        words = made[f"{at}.weight_packed"].numpy().view(np.uint32)
        unpacked = np.stack([(words >> (4 * place)) & 15 for place in range(8)], 2).reshape(codes.shape).astype(int) - 8
        assert np.array_equal(unpacked, codes)
    assert np.array_equal(made[f"{at}.weight_scale"].float().numpy(), scales)
    assert not verify(tmp_path / "out", model).problems


def test_the_search_finds_the_least_squared_error() -> None:
    """Every ratio tried in float64, ties to the larger."""
    weight = torch.randn(8, 4 * GROUP, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    encoding = round_to_nearest(GROUP, BF16, search=True)
    got = encoding.decode(encoding.encode(weight, EncodeStats()), 8, 4 * GROUP).reshape(-1, GROUP)
    groups = weight.float().reshape(-1, GROUP)
    tried = []
    for ratio in RATIOS:
        scale = (groups.abs().amax(1, keepdim=True) * ratio / 7).to(torch.bfloat16).float()
        tried.append((groups / scale).round().clamp(-8, 7) * scale)
    losses = torch.stack([(one - groups).double().square().sum(1) for one in tried])
    assert torch.allclose((got - groups).double().square().sum(1), losses.amin(0), rtol=1e-6)
    assert bool((losses[0] > losses.amin(0)).any())


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_kernel_and_definition_agree(dtype: Any) -> None:
    block = (torch.randn(64, 4 * GROUP, generator=torch.Generator().manual_seed(1)) / 30).to(getattr(torch, dtype.torch))
    encoding = round_to_nearest(GROUP, BF16 if dtype == BF16 else F16)
    wanted, kernel = encoding.encode(block, EncodeStats()), encoding.kernel(dtype)
    assert (kernel is None) == (dtype == F32)  # a source that is wider than the model is cast first
    if kernel is not None:
        outs = [np.zeros(part.nbytes(64), np.uint8) for part in encoding.parts(64, 4 * GROUP)]
        kernel(block.reshape(-1).view(torch.int16).numpy().view(np.uint16), 0, 4 * GROUP, 64, 4 * GROUP, outs)
        assert all(np.array_equal(out, part.numpy()) for out, part in zip(outs, wanted, strict=True))


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--quant", "int4_awq", "--group-size", "32"], 4, "groups of 64 and 128 only"),
        (["--quant", "int4_awq", "--group-size", "128", "--tp-size", "2"], 4, "inputs of a rank are not whole groups"),
        (["--quant", "int4_awq", "--dtype", "float32"], 4, "--dtype float16 or bfloat16"),
        (["--quant", "int4", "--target-sm", "80", "--method", "rtn"], 2, "--method has no effect with --quant int4"),
        (["--to", "hf", "--quant", "w8a16", "--method", "rtn"], 2, "--method has no effect"),
        (["--to", "hf", "--quant", "fp8_dynamic", "--method", "rtn"], 2, "--method has no effect"),
    ],
)
def test_refused(flags: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write(tmp_path / "in")
    assert main(["convert", str(model), str(tmp_path / "out"), *flags]) == status
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
