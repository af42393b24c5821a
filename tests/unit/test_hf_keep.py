"""--quant keep: codes stay bit for bit while the container changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv import api
from streamconv.errors import CheckpointError, DataError, UsageError
from streamconv.options import Resources
from streamconv.targets.hf.target import HuggingFace
from streamconv.verification.check import verify
from tests import tiny
from tests.unit.test_hf_decode import Tensors, integer_weight, packed, source

INTO_CT = HuggingFace(quant="keep", format="compressed-tensors")
AT = "model.layers.0.mlp.down_proj"
HEAD = {"lm_head.weight": torch.ones(8, 8, dtype=torch.float16)}


def named(made: Tensors, at: str = AT) -> Tensors:
    return {f"{at}.{leaf}": tensor for leaf, tensor in made.items()} | HEAD


def config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("rows", [None, 8])
def test_awq(tmp_path: Path, rows: int | None) -> None:
    made, weight = integer_weight(72, 128, 32, "awq")
    stated = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    folder = source(tmp_path / "source", stated, named(made))
    api.convert(folder, tmp_path / "out", INTO_CT, Resources(tile_rows=rows))
    got = load_file(tmp_path / "out/model.safetensors")
    assert {name: (str(t.dtype), [*t.shape]) for name, t in got.items() if name not in HEAD} == {
        f"{AT}.weight_packed": ("torch.int32", [72, 16]),
        f"{AT}.weight_scale": ("torch.float16", [72, 4]),
        f"{AT}.weight_zero_point": ("torch.int32", [9, 4]),
        f"{AT}.weight_shape": ("torch.int64", [2]),
    }
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = ((got[f"{AT}.weight_packed"][..., None] >> shifts) & 15).reshape(72, 128).double()
    zeros = ((got[f"{AT}.weight_zero_point"][:, None, :] >> shifts[None, :, None]) & 15).reshape(72, 4).double()
    scales = got[f"{AT}.weight_scale"].double()
    back = (codes.reshape(72, 4, 32) - zeros[..., None]) * scales[..., None]
    assert np.array_equal(back.reshape(72, 128).numpy(), weight) and got[f"{AT}.weight_shape"].tolist() == [72, 128]
    args = config(tmp_path / "out")["config_groups"]["group_0"]["weights"]
    assert (args["symmetric"], args["group_size"], args["num_bits"]) == (False, 32, 4) and config(tmp_path / "out")["ignore"] == ["lm_head"]
    assert verify(tmp_path / "out", folder).problems == []
    for name, decoded in (("one", folder), ("two", tmp_path / "out")):  # both containers mean the same weights, in any tiles
        api.convert(decoded, tmp_path / name, HuggingFace(dtype="float16"), Resources(tile_rows=rows))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    (tmp_path / "out/streamconv.json").unlink()
    assert verify(tmp_path / "out", folder).problems == []
    (tmp_path / "out/config.json").write_text((tmp_path / "out/config.json").read_text().replace('"symmetric": false', '"symmetric": true'))
    assert verify(tmp_path / "out").problems


def symmetric(n: int, k: int, group: int, bits: int, v2: bool) -> tuple[Tensors, np.ndarray[Any, Any]]:
    random, middle = np.random.default_rng(1), 1 << (bits - 1)
    codes = random.integers(0, 1 << bits, (k, n))
    zeros = np.full((k // group, n), middle - (0 if v2 else 1))
    scales = torch.from_numpy(random.uniform(0.01, 0.02, (k // group, n)).astype(np.float16))
    return {"qweight": packed(codes, bits, 0), "qzeros": packed(zeros, bits, 1), "scales": scales}, codes.T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq(tmp_path: Path, bits: int, v2: bool) -> None:
    made, codes = symmetric(40, 128, 64, bits, v2)
    form = "gptq_v2" if v2 else "gptq"
    stated = {"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": False, "sym": True, "checkpoint_format": form}
    folder = source(tmp_path / "source", stated, named(made))
    api.convert(folder, tmp_path / "out", INTO_CT)
    got = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(got[f"{AT}.weight_packed"], packed(codes, bits, 1)) and f"{AT}.weight_zero_point" not in got
    assert torch.equal(got[f"{AT}.weight_scale"], made["scales"].T)
    assert verify(tmp_path / "out", folder).problems == []
    for name, decoded in (("one", folder), ("two", tmp_path / "out")):  # both containers mean the same weights
        api.convert(decoded, tmp_path / name, HuggingFace(dtype="float16"))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_gptq_with_zero_points_is_refused(tmp_path: Path) -> None:
    """The config says symmetric, the tensors do not: only reading them tells."""
    made, _ = symmetric(40, 128, 64, 4, False)
    made["qzeros"][1, 2] ^= 3
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    folder = source(tmp_path / "source", stated, named(made))
    with pytest.raises(DataError, match="symmetric"):
        api.convert(folder, tmp_path / "out", INTO_CT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq_with_zero_points(tmp_path: Path, bits: int, v2: bool) -> None:
    """sym: false: both containers mean the same weights."""
    made, weight = integer_weight(72, 128, 32, "gptq", bits=bits, v2=v2)
    stated = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    folder = source(tmp_path / "source", stated, named(made))
    report = api.convert(folder, tmp_path / "out", INTO_CT, Resources(tile_rows=8, read="map"))
    got = load_file(tmp_path / "out/model.safetensors")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = ((got[f"{AT}.weight_packed"][..., None] >> shifts) & (2**bits - 1)).reshape(72, 4, 32).double()
    zeros = ((got[f"{AT}.weight_zero_point"][:, None, :] >> shifts[None, :, None]) & (2**bits - 1)).reshape(72, 4).double()
    back = (codes - zeros[..., None]) * got[f"{AT}.weight_scale"].double()[..., None]
    assert np.array_equal(back.reshape(72, 128).numpy(), weight)
    assert config(tmp_path / "out")["config_groups"]["group_0"]["weights"]["symmetric"] is False
    assert any("zero points" in line for line in report.warnings)
    assert verify(tmp_path / "out", folder).problems == []


def test_a_zero_point_of_sixteen(tmp_path: Path) -> None:
    made, _ = integer_weight(72, 128, 32, "gptq")
    made["qzeros"][2, 3] |= 15 << 8
    folder = source(tmp_path / "source", {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, named(made))
    with pytest.raises(DataError, match="zero point of 16"):
        api.convert(folder, tmp_path / "out", INTO_CT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("told", [True, False])
def test_act_order(tmp_path: Path, told: bool) -> None:
    """g_idx counts, whatever the config says of it."""
    made, codes = symmetric(40, 128, 64, 4, False)
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": told}
    index = torch.arange(128, dtype=torch.int32) // 64
    folder = source(tmp_path / "source", stated, named(made | {"g_idx": index}))
    api.convert(folder, tmp_path / "out", INTO_CT)
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[f"{AT}.weight_packed"], packed(codes, 4, 1))
    save_file(named(made | {"g_idx": index.flip(0).contiguous()}), folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"down_proj has act order"):
        api.open_and_plan(folder, INTO_CT)


def nvfp4(folder: Path, inputs: bool) -> Path:
    random = torch.Generator().manual_seed(1)
    weights: Tensors = dict(HEAD)
    for at in (AT, AT.replace("down", "up")):
        weights[f"{at}.weight"] = torch.randint(0, 256, (32, 64), dtype=torch.uint8, generator=random)
        weights[f"{at}.weight_scale"] = torch.randint(48, 127, (32, 8), dtype=torch.uint8, generator=random).view(torch.float8_e4m3fn)
        weights[f"{at}.weight_scale_2"] = torch.tensor(0.0003)
        if inputs:
            weights[f"{at}.input_scale"] = torch.tensor(0.007)
    weights["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
    stated = {"quant_method": "modelopt", "quant_algo": "NVFP4" if inputs else "W4A16_NVFP4", "ignore": ["lm_head"]}
    made = source(folder, stated, weights)
    (made / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": stated["quant_algo"]}}))
    return made


@pytest.mark.parametrize("inputs", [True, False])
def test_nvfp4_both_ways(tmp_path: Path, inputs: bool) -> None:
    folder = nvfp4(tmp_path / "source", inputs)
    api.convert(folder, tmp_path / "ct", INTO_CT)
    there, here = load_file(tmp_path / "ct/model.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(there[f"{AT}.weight_packed"], here[f"{AT}.weight"]) and not (tmp_path / "ct/hf_quant_config.json").exists()
    assert torch.equal(there[f"{AT}.weight_global_scale"], (1 / here[f"{AT}.weight_scale_2"]).reshape(1))
    assert (f"{AT}.input_global_scale" in there) == inputs
    assert torch.equal(there["model.layers.0.self_attn.k_scale"], torch.tensor([0.5]))
    group = config(tmp_path / "ct")["config_groups"]["group_0"]
    assert ("input_activations" in group) == inputs and config(tmp_path / "ct")["kv_cache_scheme"]["num_bits"] == 8
    assert verify(tmp_path / "ct", folder).problems == []
    api.convert(tmp_path / "ct", tmp_path / "back", HuggingFace(quant="keep", format="modelopt"))
    back = load_file(tmp_path / "back/model.safetensors")
    assert {name: tensor.shape for name, tensor in back.items()} == {name: tensor.shape for name, tensor in here.items()}
    for name, tensor in here.items():
        if tensor.dim():
            assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
        else:  # twice a reciprocal
            assert torch.allclose(back[name], tensor, 2e-7), name
    assert config(tmp_path / "back")["quant_algo"] == ("NVFP4" if inputs else "W4A16_NVFP4")
    assert (tmp_path / "back/hf_quant_config.json").exists() and verify(tmp_path / "back", tmp_path / "ct").problems == []


def test_a_scale_of_zero_stops(tmp_path: Path) -> None:
    folder = nvfp4(tmp_path / "source", True)
    weights = load_file(folder / "model.safetensors") | {f"{AT}.input_scale": torch.tensor(0.0)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match="input_scale"):
        api.convert(folder, tmp_path / "out", INTO_CT)


@pytest.mark.parametrize("quant", ["fp8_dynamic", "fp8_block", "w4a16", "nvfp4a16", "mxfp4"])
@pytest.mark.parametrize("split", [None, 1 << 20])
def test_a_copy(tmp_path: Path, quant: str, split: int | None) -> None:
    api.convert(tiny.write(tmp_path / "plain"), tmp_path / "source", HuggingFace(quant=quant))
    api.convert(tmp_path / "source", tmp_path / "out", HuggingFace(quant="keep", max_shard_size=split))
    got: Tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        got |= load_file(path)
    want = load_file(tmp_path / "source/model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)) for name in want)
    assert config(tmp_path / "out") == config(tmp_path / "source") and verify(tmp_path / "out", tmp_path / "source").problems == []


def test_a_modelopt_copy_keeps_its_second_file(tmp_path: Path) -> None:
    api.convert(tiny.write(tmp_path / "plain"), tmp_path / "source", HuggingFace(quant="fp8_dynamic", format="modelopt"))
    api.convert(tmp_path / "source", tmp_path / "out", HuggingFace(quant="keep"))
    assert (tmp_path / "out/hf_quant_config.json").read_bytes() == (tmp_path / "source/hf_quant_config.json").read_bytes()


def test_what_has_no_way(tmp_path: Path) -> None:
    plain = tiny.write(tmp_path / "plain")
    with pytest.raises(UsageError, match="not quantized"):
        api.convert(plain, tmp_path / "out", HuggingFace(quant="keep"))
    api.convert(plain, tmp_path / "fp8", HuggingFace(quant="fp8_dynamic"))
    with pytest.raises(UsageError, match="no place in --format hf"):
        api.convert(tmp_path / "fp8", tmp_path / "out", HuggingFace(quant="keep", format="hf"))
    with pytest.raises(UsageError, match="--dtype"):
        api.convert(tmp_path / "fp8", tmp_path / "out", HuggingFace(quant="keep", dtype="float16"))


def test_mxfp8_in_two_containers(tmp_path: Path) -> None:
    """The same numbers under other names, and both are read back alike."""
    plain = tiny.write(tmp_path / "plain")
    for container in ("modelopt", "hf"):
        api.convert(plain, tmp_path / container, HuggingFace(quant="mxfp8", format=container))
        (tmp_path / container / "streamconv.json").unlink()
        assert verify(tmp_path / container).problems == []
        api.convert(tmp_path / container, tmp_path / f"{container}_back", HuggingFace())
    one, two = (load_file(tmp_path / container / "model.safetensors") for container in ("modelopt", "hf"))
    assert {name.replace("weight_scale", "weight_scale_inv"): t.view(torch.uint8).tolist() for name, t in one.items() if t.dim()} == {
        name: t.view(torch.uint8).tolist() for name, t in two.items() if t.dim()
    }
    assert (tmp_path / "modelopt_back/model.safetensors").read_bytes() == (tmp_path / "hf_back/model.safetensors").read_bytes()
    assert config(tmp_path / "hf")["weight_block_size"] == [1, 32] and config(tmp_path / "hf")["ignored_layers"] == ["lm_head"]


@pytest.mark.parametrize("rows", [None, 8])
def test_an_order_is_judged_as_a_whole(tmp_path: Path, rows: int | None) -> None:
    """g_idx of the second tile does not begin with the first group."""
    made, _ = integer_weight(72, 128, 32, "gptq")
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    made["g_idx"] = torch.arange(128, dtype=torch.int32) // 32
    folder = source(tmp_path / "source", stated, named(made))
    api.convert(folder, tmp_path / "out", HuggingFace(quant="keep"), Resources(tile_rows=rows))
    assert verify(tmp_path / "out", folder).problems == []
    made["g_idx"][100] = 0
    save_file(named(made), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="an order of its own"):
        api.convert(folder, tmp_path / "other", HuggingFace(quant="keep"), Resources(tile_rows=rows))
