"""ModelOpt FP8 exports taken over, against a whole-matrix implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv.cli.convert_checkpoint import main as official
from streamconv.cli.main import main
from streamconv.quants.fp8_tensor import Fp8Shared
from tests import tiny

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


def export(
    folder: Path, *, kv: bool = False, inline: bool = False, shared: bool = False, skip: tuple[str, ...] = ()
) -> tuple[Path, Tensors]:
    """The tiny model as ModelOpt writes it; with `kv` an FP8 KV cache, `skip` names linear layers that stay as they are."""
    tiny.write(folder)
    held, made = load_file(folder / "model.safetensors"), Tensors()
    for number, (name, weight) in enumerate(held.items()):
        module = name.removesuffix(".weight")
        if not module.endswith(LINEAR) or name in skip:
            made[name] = weight
            continue
        scale = torch.tensor(0.001) if shared else weight.float().abs().max() / 448
        made[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        made[module + ".weight_scale"], made[module + ".input_scale"] = scale, torch.tensor(0.01 * (number + 1))
        if kv and module.endswith(("k_proj", "v_proj")):
            made[f"{module}.{module[-6]}_scale"] = torch.tensor(0.25 * (number + 1))
    save_file(made, folder / "model.safetensors")
    stated: dict[str, Any] = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8" if kv else None, "exclude_modules": ["lm_head"]}
    if inline:
        settings = tiny.config(quantization_config={"quant_method": "modelopt", **stated})
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": stated}))
    return folder, made


def run(model: Path, out: Path, *flags: object) -> dict[str, Any]:
    assert main(["convert", str(model), str(out), "--quiet", *map(str, flags)]) == 0
    assert main(["verify", str(out), "--source", str(model), "--quiet"]) == 0
    made: dict[str, Any] = json.loads((out / "config.json").read_text())
    return made


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("inline", "shared"), [(False, False), (True, True)])
def test_codes_and_scales(tmp_path: Path, tp: int, inline: bool, shared: bool) -> None:
    model, source = export(tmp_path / "in", inline=inline, shared=shared)
    config = run(model, tmp_path / "out", "--tp-size", tp)
    assert config["quantization"]["quant_algo"] == "FP8" and config["quantization"]["exclude_modules"] is None
    for number in range(tp):
        made = load_file(tmp_path / "out" / f"rank{number}.safetensors")
        for layer in range(tiny.LAYERS):
            at, to = f"model.layers.{layer}.", f"transformer.layers.{layer}."
            parts = [f"{at}self_attn.{name}_proj." for name in "qkv"]
            largest = torch.stack([source[part + "weight_scale"] for part in parts]).max()
            codes = []
            for part in parts:
                whole = source[part + "weight"].float() * source[part + "weight_scale"] / largest
                codes.append(whole.to(torch.float8_e4m3fn).chunk(tp)[number])
            assert same(made[to + "attention.qkv.weight"], torch.cat([c.view(torch.uint8) for c in codes]).view(torch.float8_e4m3fn))
            assert made[to + "attention.qkv.weights_scaling_factor"].tolist() == [largest.item()]
            fed = max(source[part + "input_scale"].item() for part in parts)
            assert made[to + "attention.qkv.activation_scaling_factor"].tolist() == [fed]
            names = {"attention.dense": ("self_attn.o_proj", 1), "mlp.fc": ("mlp.gate_proj", 0)}
            for module, (name, axis) in (names | {"mlp.gate": ("mlp.up_proj", 0), "mlp.proj": ("mlp.down_proj", 1)}).items():
                assert same(made[f"{to}{module}.weight"], source[f"{at}{name}.weight"].chunk(tp, axis)[number].clone())
                assert made[f"{to}{module}.weights_scaling_factor"].tolist() == [source[f"{at}{name}.weight_scale"].item()]
                assert made[f"{to}{module}.activation_scaling_factor"].tolist() == [source[f"{at}{name}.input_scale"].item()]


def test_the_kv_cache_scales(tmp_path: Path) -> None:
    model, source = export(tmp_path / "in", kv=True)
    config = run(model, tmp_path / "out", "--tp-size", 2)
    assert config["quantization"]["kv_cache_quant_algo"] == "FP8"
    made = load_file(tmp_path / "out" / "rank1.safetensors")
    for layer in range(tiny.LAYERS):
        both = [source[f"model.layers.{layer}.self_attn.{name}_proj.{name}_scale"].item() for name in "kv"]
        assert made[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"].tolist() == [max(both)]


def test_a_layer_that_the_export_left_out(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    model, source = export(tmp_path / "in", skip=(name,))
    excluded = run(model, tmp_path / "out")["quantization"]["exclude_modules"]
    assert excluded[-1] == "transformer.layers.1.mlp.proj" and "*lm_head" in excluded
    assert same(load_file(tmp_path / "out" / "rank0.safetensors")["transformer.layers.1.mlp.proj.weight"], source[name])
    assert main(["convert", str(model), str(tmp_path / "pp"), "--pp-size", "2"]) == 4


def test_the_drop_in_command(tmp_path: Path) -> None:
    model, _ = export(tmp_path / "in")
    run(model, tmp_path / "out")
    for flags in ([], ["--use_fp8"]):
        assert official(["--model_dir", str(model), "--output_dir", str(tmp_path / "other"), "--force", *flags]) == 0
        assert (tmp_path / "other" / "rank0.safetensors").read_bytes() == (tmp_path / "out" / "rank0.safetensors").read_bytes()
    run(model, tmp_path / "named", "--quant", "fp8")


def spoiled(folder: Path, **changes: torch.Tensor | None) -> Path:
    """`up_proj`'s scales of layer 0 replaced, or removed."""
    model, made = export(folder)
    for suffix, value in changes.items():
        made.pop(name := f"model.layers.0.mlp.up_proj.{suffix}")
        made |= {name: value} if value is not None else {}
    save_file(made, model / "model.safetensors")
    return model


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("value", [None, torch.tensor(float("nan")), torch.tensor(0.0), torch.ones(256)])
def test_scales_that_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str, value: torch.Tensor | None) -> None:
    model = spoiled(tmp_path / "in", **{suffix: value})
    assert main(["convert", str(model), str(tmp_path / "out")]) == 4
    assert f"model.layers.0.mlp.up_proj.{suffix}" in capfd.readouterr().err


def test_an_lm_head_or_a_part_of_qkv_that_does_not_fit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, made = export(tmp_path / "in", skip=("model.layers.0.self_attn.k_proj.weight",))
    assert main(["convert", str(model), str(tmp_path / "out")]) == 4
    assert "other weights that transformer.layers.0.attention.qkv fuses are not" in capfd.readouterr().err
    model, made = export(tmp_path / "head")
    made |= {"lm_head.weight": made["lm_head.weight"].to(torch.float8_e4m3fn)}
    made |= {f"lm_head.{kind}_scale": torch.tensor(1.0) for kind in ("weight", "input")}
    save_file(made, model / "model.safetensors")
    assert main(["convert", str(model), str(tmp_path / "out")]) == 4
    assert "lm_head.weight is FP8, but TensorRT-LLM keeps lm_head in the model dtype" in capfd.readouterr().err


@pytest.mark.parametrize("flags", [["--quant", "fp8"], ["--quant", "smoothquant"], ["--kv-cache", "int8"]])
def test_text_is_refused_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str]) -> None:
    model, _ = export(tmp_path / "in")
    (tmp_path / "text.txt").write_text("hello")
    assert main(["convert", str(model), str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), *flags]) == 4
    assert "quantized already (modelopt FP8)" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "text.txt"]


@pytest.mark.parametrize(
    "stated",
    [
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        None,
    ],
)
def test_calibrate_refuses_every_quantized_source(tmp_path: Path, capfd: pytest.CaptureFixture[str], stated: dict[str, Any] | None) -> None:
    model, _ = export(tmp_path / "in")
    (model / "hf_quant_config.json").unlink()
    if stated:
        (model / "config.json").write_text(json.dumps(tiny.config(quantization_config=stated)))
    (tmp_path / "text.txt").write_text("hello")
    assert main(["calibrate", str(model), "-o", str(tmp_path / "ranges"), "--text", str(tmp_path / "text.txt")]) == 4
    said = capfd.readouterr().err
    assert ("quantized already (" + stated["quant_method"] if stated else "F8_E4M3, a quantized weight") in said
    assert not (tmp_path / "ranges").exists()


def test_the_table_of_codes_is_the_arithmetic() -> None:
    """All 256 codes against torch, for scales that round in every way; and the kernel against the definition."""
    import numpy as np

    from streamconv.checkpoint.dtypes import F8_E4M3
    from streamconv.quants.base import EncodeStats

    codes = torch.arange(256, dtype=torch.uint8)
    for own, shared in ((1.0, 1.0), (0.5, 1.0), (0.7, 1.3), (0.001, 0.0017), (3e-5, 1.0), (0.875, 1.0), (0.9375, 1.0)):
        own32, shared32 = torch.tensor(own), torch.tensor(shared)
        encoding = Fp8Shared((("a", own32.item()), ("b", shared32.item())), own32.item())
        block = codes.view(torch.float8_e4m3fn).reshape(2, 128)
        wanted = (block.float() * own32 / shared32).to(torch.float8_e4m3fn).view(torch.uint8).reshape(-1)
        (made,) = encoding.encode(block, EncodeStats())
        assert torch.equal(made, wanted)
        kernel, out = encoding.kernel(F8_E4M3), np.empty(2 * 64, np.uint8)
        assert kernel is not None
        kernel(codes.numpy(), 32, 128, 2, 64, [out])
        assert (out.reshape(2, 64) == wanted.reshape(2, 128)[:, 32:96].numpy()).all()
        gap = (encoding.decode([made], 2, 128) - encoding.values(block)).abs()
        assert bool((gap <= encoding.error(block))[block.float().isfinite()].all())
