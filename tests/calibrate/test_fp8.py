"""FP8 per tensor and the FP8 KV cache from ranges, against ModelOpt's formulas written once more in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from streamconv.cli.main import main
from streamconv.verification.check import verify
from tests import tiny

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
F = np.float32


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path, dict[str, Any], dict[str, Any]]:
    """Model folder, ranges file, weights, ranges."""
    weights = tiny.tensors(seed=3)
    weights["model.layers.1.mlp.down_proj.weight"][:] = 0
    random = np.random.default_rng(5)
    ranges = {}
    for name, weight in weights.items():
        if "_proj" in name:
            module = name.removesuffix(".weight")
            ranges[module + ".x"] = random.uniform(0, 30, weight.shape[1]).astype(F)
            ranges[module + ".y"] = random.uniform(0, 900 if ".0." in name else 300, weight.shape[0]).astype(F)
    for layer in range(tiny.LAYERS):  # they see the same input
        for name in ("k_proj", "v_proj"):
            ranges[f"model.layers.{layer}.self_attn.{name}.x"] = ranges[f"model.layers.{layer}.self_attn.q_proj.x"]
    save_file(ranges, tmp_path / "ranges.safetensors")
    return tiny.write(tmp_path / "model", weights), tmp_path / "ranges.safetensors", weights, ranges


def _e4m3(values: Any) -> Any:
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8)


def _wanted(weights: dict[str, Any], ranges: dict[str, Any], layer: int, names: list[str]) -> tuple[list[Any], Any, Any]:
    """Bytes of each weight, the scale of all, the scale of their input."""
    paths = [f"model.layers.{layer}.{name}" for name in names]
    top = max(F(np.abs(weights[path + ".weight"].astype(F)).max()) for path in paths)
    scale = (top if top else F(448)) / F(448)
    inputs = max(ranges[path + ".x"].max() for path in paths) / F(448)
    return [_e4m3(weights[path + ".weight"].astype(F) / scale) for path in paths], scale, inputs


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_scales_and_bytes(job: Any, tmp_path: Path, tp: int, pp: int) -> None:
    model, file, weights, ranges = job
    out = tmp_path / "out"
    flags = ["--quant", "fp8", "--kv-cache", "fp8", "--activation-ranges", str(file), "--tp-size", str(tp), "--pp-size", str(pp)]
    assert main(["convert", str(model), str(out), *flags, "--quiet"]) == 0
    size, checked = tiny.HIDDEN // tiny.HEADS, 0
    for layer in range(tiny.LAYERS):
        for rank in range(tp):
            got = load_file(out / f"rank{rank + (layer if pp == 2 else 0) * tp}.safetensors")
            at = f"transformer.layers.{0 if pp == 2 else layer}."
            modules = {
                "attention.qkv": [f"self_attn.{n}_proj" for n in "qkv"],
                "attention.dense": ["self_attn.o_proj"],
                "mlp.fc": ["mlp.gate_proj"],
                "mlp.gate": ["mlp.up_proj"],
                "mlp.proj": ["mlp.down_proj"],
            }
            for name, sources in modules.items():
                made, scale, inputs = _wanted(weights, ranges, layer, sources)
                if name == "attention.qkv":
                    kv = rank * tiny.KV // tp if tp >= tiny.KV else 0
                    rows = max(tiny.KV // tp, 1) * size
                    cut = [made[0].chunk(tp)[rank], *(part[kv * size : kv * size + rows] for part in made[1:])]
                elif name in ("attention.dense", "mlp.proj"):
                    cut = [made[0].chunk(tp, dim=1)[rank]]
                else:
                    cut = [made[0].chunk(tp)[rank]]
                weight = got[at + name + ".weight"]
                assert weight.dtype == torch.float8_e4m3fn
                assert torch.equal(weight.view(torch.uint8), torch.cat(cut)), name
                assert got[at + name + ".weights_scaling_factor"].tolist() == [float(scale)], name
                assert got[at + name + ".activation_scaling_factor"].tolist() == [float(inputs)], name
                checked += 1
            top = max(ranges[f"model.layers.{layer}.self_attn.{n}_proj.y"].max() for n in "kv")
            assert got[at + "attention.kv_cache_scaling_factor"].tolist() == [float(max(F(1), top / F(448)))]
    assert checked == 5 * tiny.LAYERS * tp
    verdict = verify(str(out), str(model))
    assert not verdict.problems
    assert min(e.snr_db for e in verdict.errors if e.name.endswith("qkv.weight")) > 25


def test_only_the_kv_cache(job: Any, tmp_path: Path) -> None:
    model, file, *_ = job
    assert main(["convert", str(model), str(tmp_path / "a"), "--kv-cache", "fp8", "--quiet"]) == 0
    assert main(["convert", str(model), str(tmp_path / "b"), "--kv-cache", "fp8", "--activation-ranges", str(file), "--quiet"]) == 0
    plain, measured = load_file(tmp_path / "a/rank0.safetensors"), load_file(tmp_path / "b/rank0.safetensors")
    differ = [name for name in plain if not torch.equal(plain[name], measured[name])]
    at = "transformer.layers.0.attention."  # layer 1 is below the floor
    factor, inverse = f"{at}kv_cache_scaling_factor", f"{at}kv_cache_rcp_scaling_factor"
    assert sorted(differ) == [inverse, factor]
    assert plain[factor].tolist() == plain[inverse].tolist() == [1.0]
    assert measured[factor].item() > 1 and measured[inverse].item() == (1 / measured[factor]).item()


@pytest.mark.parametrize(
    ("flags", "status", "says"), [([], 2, "--quant fp8 needs activation ranges"), (["--tp-size", "3"], 4, "does not divide")]
)
def test_refused(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, says: str) -> None:
    ranges = ["--activation-ranges", str(job[1])] if flags else []
    assert main(["convert", str(job[0]), str(tmp_path / "out"), "--quant", "fp8", *ranges, *flags]) == status
    assert says in capsys.readouterr().err
