"""Rank files back to Hugging Face with their codes: bit for bit those of the model that the ranks were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from streamconv import HuggingFace, TensorRTLLM
from streamconv.errors import DataError, RefusedError, UsageError
from streamconv.verification.check import verify
from tests import tiny
from tests.unit import test_prequantized as given

Tensors = dict[str, torch.Tensor]


def tensors(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def ranks(source: Path, out: Path, **options: Any) -> Path:
    streamconv.convert(source, TensorRTLLM(tp_size=2, **options).to(out))
    return out


def back(source: Path, name: str, **options: Any) -> Path:
    out = source.parent / name
    streamconv.convert(source, HuggingFace(**options).to(out))
    assert verify(out).problems == []
    return out


def same(one: Tensors, other: Tensors) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


def stated(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, False)])
def test_group_wise_integers(bits: int, symmetric: bool, tmp_path: Path) -> None:
    made = given.linears(bits, 64)
    for one in made.values():
        one.z[:] = (1 << (bits - 1)) if symmetric else one.z
    source = given.source(tmp_path / "source", "v2", bits, 64, made)
    facts = json.loads((source / "config.json").read_text())
    facts["quantization_config"]["sym"] = symmetric
    (source / "config.json").write_text(json.dumps(facts))
    cut = ranks(source, tmp_path / "ranks", quant=f"int{bits}_gptq", group_size=64, target_sm=90)
    kept, want = back(cut, "kept", quant="keep"), back(source, "want", quant="keep", format="compressed-tensors")
    same(tensors(kept), tensors(want))
    assert stated(kept) == stated(want) and stated(kept)["config_groups"]["group_0"]["weights"]["symmetric"] == symmetric
    assert verify(kept, source=cut).problems == []


def test_zero_points_that_come_late_end_the_run(tmp_path: Path) -> None:
    """The first and last group of each weight say that there are none."""
    made = given.linears(4, 64)
    for one in made.values():
        one.z[:] = 8
    made["mlp.down_proj"].z[2, 5] = 3
    cut = ranks(given.source(tmp_path / "source", "v2", 4, 64, made), tmp_path / "ranks", quant="int4_gptq", group_size=64, target_sm=80)
    with pytest.raises(DataError, match="has zero points"):
        back(cut, "kept", quant="keep")


def awq(folder: Path) -> Path:
    """As ModelOpt exports it: q, k and v, and gate and up, see one pre-scale."""
    torch.manual_seed(3)
    plain = tiny.write(folder.parent / "plain")
    streamconv.convert(plain, HuggingFace(quant="w4a16", format="modelopt", group_size=64).to(folder))
    held = tensors(folder)
    shared: dict[str, torch.Tensor] = {}
    for name in [name for name in held if name.endswith("weight_scale")]:
        module = name.removesuffix(".weight_scale")
        key = module.rpartition(".")[0] + ("in" if module.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")) else module)
        cols = held[f"{module}.weight"].shape[1]
        held[f"{module}.pre_quant_scale"] = shared.setdefault(key, (torch.rand(cols) + 0.5).half())
    save_file({name: tensor.clone() for name, tensor in held.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "streamconv.json").unlink()  # it tells of the other file
    return folder


def test_awq_with_scales_of_its_inputs(tmp_path: Path) -> None:
    source = awq(tmp_path / "source")
    cut = ranks(source, tmp_path / "ranks", quant="int4_awq", group_size=64)
    kept = back(cut, "kept", quant="keep")
    same(tensors(kept), tensors(source))
    assert json.loads((kept / "hf_quant_config.json").read_text()) == json.loads((source / "hf_quant_config.json").read_text())
    held, found = tensors(source), tensors(back(cut, "plain_again"))
    same(found, tensors(back(source, "decoded")))
    for name in [name for name in held if name.endswith("weight_scale")]:
        module = name.removesuffix(".weight_scale")
        codes = held[f"{module}.weight"]
        whole = torch.stack([codes & 15, codes >> 4], 1).reshape(-1, codes.shape[1]).to(torch.int16)
        whole = ((whole ^ 8) - 8).double()
        want = whole * held[name].double().repeat_interleave(64, 1) * held[f"{module}.pre_quant_scale"].double()
        got = found[f"{module}.weight"].double()
        assert bool(((got - want).abs() <= want.abs() * 2.0**-11 * 1.001 + 2.0**-25).all()), name
    with pytest.raises(RefusedError, match="not cut anew"):
        streamconv.plan(cut, TensorRTLLM(tp_size=1))
    with pytest.raises(UsageError, match="no place in --format compressed-tensors"):
        streamconv.plan(cut, HuggingFace(quant="keep", format="compressed-tensors"))


def fp8(folder: Path) -> Path:
    """ModelOpt's FP8: q, k and v have one scale; o_proj of layer 0 is not quantized."""
    plain = tiny.tensors()
    made, facts = dict[str, torch.Tensor](), tiny.config()
    for name, array in plain.items():
        weight, module = torch.from_numpy(array), name.removesuffix(".weight")
        if "_proj" not in name or name == "model.layers.0.self_attn.o_proj.weight":
            made[name] = weight
            continue
        together = [part for part in ("q_proj", "k_proj", "v_proj") if name.endswith(f"{part}.weight")] and ("q_proj", "k_proj", "v_proj")
        whole = [module.rpartition(".")[0] + f".{part}.weight" for part in together] or [name]
        scale = torch.tensor(max(float(abs(plain[each]).max()) for each in whole) / 448)
        made[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        made[f"{module}.weight_scale"], made[f"{module}.input_scale"] = scale, torch.tensor(0.02 if together else 0.03)
    folder.mkdir()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    left = ["lm_head", "model.layers.0.self_attn.o_proj"]
    facts["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": left}
    (folder / "config.json").write_text(json.dumps(facts))
    told = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": left}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": told}))
    return folder


def test_fp8_per_tensor(tmp_path: Path) -> None:
    source = fp8(tmp_path / "source")
    cut = ranks(source, tmp_path / "ranks", quant="fp8")
    held = tensors(source)
    same(tensors(back(cut, "modelopt", quant="keep", format="modelopt")), held)
    kept = back(cut, "kept", quant="keep")
    whole = {name: tensor.reshape(1) if not tensor.dim() else tensor for name, tensor in held.items()}
    same(tensors(kept), whole)
    assert (stated(kept)["format"], stated(kept)["ignore"]) == ("float-quantized", ["lm_head", "model.layers.0.self_attn.o_proj"])
    for name, tensor in tensors(back(cut, "decoded")).items():
        scale = held.get(f"{name}_scale")
        assert torch.equal(tensor, held[name] if scale is None else (held[name].float() * scale).half()), name
    with pytest.raises(RefusedError, match="not cut anew"):
        streamconv.plan(cut, TensorRTLLM(tp_size=4))


@pytest.mark.parametrize(("quant", "tp_size"), [("int8", 1), ("int4", 2), ("fp8_rowwise", 1)])
def test_scales_of_channels(quant: str, tp_size: int, tmp_path: Path) -> None:
    """Scales are the bytes of the rank files; codes and scales together are what the ranks decode to."""
    cut = tmp_path / "ranks"
    streamconv.convert(tiny.write(tmp_path / "source"), TensorRTLLM(quant=quant, target_sm=80, tp_size=tp_size).to(cut))
    kept = back(cut, "kept", quant="keep")
    same(tensors(back(kept, "one")), tensors(back(cut, "two")))
    scales = [load_file(cut / f"rank{n}.safetensors")["transformer.layers.1.mlp.proj.per_channel_scale"] for n in range(tp_size)]
    assert torch.equal(tensors(kept)["model.layers.1.mlp.down_proj.weight_scale"], torch.stack([s.reshape(-1) for s in scales], 1))
    groups = stated(kept)["config_groups"]
    assert ("group_1" in groups) == (tp_size == 2)
    if tp_size == 2:
        assert groups["group_1"]["targets"] == ["re:.*\\.down_proj$"] or groups["group_2"]["targets"] == ["re:.*\\.down_proj$"]


def test_what_no_container_holds(tmp_path: Path) -> None:
    plain = tiny.write(tmp_path / "plain")
    cut = ranks(plain, tmp_path / "ranks", quant="fp8_rowwise")
    with pytest.raises(UsageError, match="scales of 2 ranks"):
        streamconv.plan(cut, HuggingFace(quant="keep"))
    with pytest.raises(UsageError, match="not quantized"):
        streamconv.plan(ranks(plain, tmp_path / "floats"), HuggingFace(quant="keep"))
