"""Rank files as a source: cut anew they are the bytes of a direct conversion, and back they are the model's own tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamconv
from streamconv import HuggingFace, Resources, TensorRTLLM
from streamconv.errors import CheckpointError, RefusedError
from tests.golden import generate

SPECS = {spec["name"]: spec for spec in generate.load_specs()}
FLOATS = [name for name, spec in SPECS.items() if not spec.get("gptq") and not spec.get("awq") and spec["arch"] != "meta"]
QUICK = {"llama_dupkv", "llama_oddvocab_fp32", "mixtral_4e", "qwen2_bias", "qwen3_moe", "phi3_gqa", "gemma2_gqa", "internlm2_gqa"}
QUICK |= {"granite", "exaone_gqa", "llama_attnbias_ropelinear"}
CPU = Resources(device="cpu", workers=1)


def _models(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def _convert(source: Path, out: Path, target: Any) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    streamconv.convert(source, out, target, resources=CPU)
    return out


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "streamconv.json"}


def _grids(spec: dict[str, Any]) -> list[dict[str, int]]:
    """tp 1 -> 2 -> 4 -> 2 x pp 2 -> 1, as far as the family knows pipelines."""
    staged = [] if spec["arch"] in ("phi3", "gemma", "gemma2") else [{"tp_size": 2, "pp_size": 2}]
    split = [{"tp_size": size, "pp_size": 1} for size in (2, 4) if spec["heads"] % size == 0]
    return [{"tp_size": 1, "pp_size": 1}, *split, *staged]


@pytest.mark.parametrize("name", _models(FLOATS))
@pytest.mark.parametrize("recorded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_round_trip(name: str, recorded: bool, golden_inputs: Path, tmp_path: Path) -> None:
    """Without the manifest the model's config is worked out from the checkpoint's, as of NVIDIA's own."""
    source, spec = golden_inputs / "inputs" / name, SPECS[name]
    more: dict[str, Any] = {"remove_duplicated_kv_heads": True} if spec.get("dup_kv") else {}
    direct = [_convert(source, tmp_path / f"direct{n}", TensorRTLLM(**grid, **more)) for n, grid in enumerate(_grids(spec))]
    if not recorded:
        for folder in direct:
            (folder / "streamconv.json").unlink()
    at = direct[0]
    for number, grid in [*[*enumerate(_grids(spec))][1:], (0, _grids(spec)[0])]:
        at = _convert(at, tmp_path / f"cut{number}", TensorRTLLM(**grid))
        if not recorded:
            (at / "streamconv.json").unlink()
        assert _files(at) == _files(direct[number]), grid
    _check_back(source, _convert(direct[-1], tmp_path / "back", HuggingFace()), spec, recorded)


def _check_back(source: Path, back: Path, spec: dict[str, Any], recorded: bool) -> None:
    """Every tensor is there, in the dtype of the checkpoint, and equal if that is the model's."""
    with streamconv.open(source) as first, streamconv.open(back) as second:
        assert set(second) == set(first) - ({"lm_head.weight"} if spec.get("tied_with_head") else set())
        for name in second:
            want, got = first[name].torch(), second[name].torch()
            if spec["arch"].startswith("gemma") and "norm" in name:  # stored as value + 1, which rounds
                want = (want.float() + 1).to(want.dtype).float() - 1
            if spec["dtype"] == "float32":  # converted to float16
                want = want.half()
            assert bool((got == want.to(got.dtype)).all()) and got.shape == want.shape, name
    if recorded and spec["dtype"] != "float32":
        assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize(("old", "new"), [("0.16", "1.2"), ("1.2", "0.16"), ("1.2", "1.0")])
def test_from_one_release_to_another(old: Any, new: Any, golden_inputs: Path, tmp_path: Path) -> None:
    source = golden_inputs / "inputs" / "qwen2_tied"
    made = _convert(source, tmp_path / "old", TensorRTLLM(tp_size=2, target_version=old))
    again = _convert(made, tmp_path / "new", TensorRTLLM(target_version=new))
    assert _files(again) == _files(_convert(source, tmp_path / "direct", TensorRTLLM(tp_size=2, target_version=new)))


def test_what_is_not_given_is_kept(golden_inputs: Path, tmp_path: Path) -> None:
    """dtype, split embedding, FP8 KV cache and its factors; what is given counts, a default too."""
    source = golden_inputs / "inputs" / "llama_mha"
    options: dict[str, Any] = {"dtype": "float32", "use_parallel_embedding": True, "embedding_sharding_dim": 1, "kv_cache": "fp8"}
    made = _convert(source, tmp_path / "made", TensorRTLLM(tp_size=2, **options))
    assert _files(_convert(made, tmp_path / "same", TensorRTLLM())) == _files(made)
    again = _convert(made, tmp_path / "again", TensorRTLLM(tp_size=4))
    assert _files(again) == _files(_convert(source, tmp_path / "direct", TensorRTLLM(tp_size=4, **options)))
    left = "the scales of the FP8 KV cache are left out"
    assert left in streamconv.plan(made, HuggingFace()).warnings and left not in streamconv.plan(made, TensorRTLLM()).warnings
    one = _convert(made, tmp_path / "one", TensorRTLLM(tp_size=1, dtype="bfloat16"))
    assert _files(one) == _files(_convert(source, tmp_path / "direct", TensorRTLLM(**options | {"dtype": "bfloat16"})))


def test_a_cache_factor_goes_along(golden_inputs: Path, tmp_path: Path) -> None:
    from tests.golden.cases import load

    case = load()["gqa_kv8"]
    source = golden_inputs / str(case.model)
    ranges = str(Path(__file__).parent / "act_ranges" / str(case.activation_ranges))
    options: dict[str, Any] = {"kv_cache": "int8", "activation_ranges": ranges}
    made = _convert(source, tmp_path / "made", TensorRTLLM(tp_size=2, **options))
    again = _convert(made, tmp_path / "again", TensorRTLLM(tp_size=1))
    assert _files(again) == _files(_convert(source, tmp_path / "direct", TensorRTLLM(**options)))


def test_opened_it_has_the_names_and_values_of_the_model(golden_inputs: Path, tmp_path: Path) -> None:
    source = golden_inputs / "inputs" / "llama_mha"
    made = _convert(source, tmp_path / "made", TensorRTLLM(tp_size=4, pp_size=2))
    with streamconv.open(source) as first, streamconv.open(made) as second:
        assert set(first) == set(second)
        for name in ("model.layers.3.self_attn.o_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
            want, got = first[name].numpy(raw=True), second[name]
            assert np.array_equal(got.numpy(raw=True), want)
            assert np.array_equal(got[5:90:3].numpy(raw=True), want[5:90:3])
            assert np.array_equal(got[::-1].numpy(raw=True), want[::-1])
            assert np.array_equal(got[-1].numpy(raw=True), want[-1])


def test_what_is_not_whole_is_refused(golden_inputs: Path, tmp_path: Path) -> None:
    source = golden_inputs / "inputs" / "llama_mha"
    made = _convert(source, tmp_path / "made", TensorRTLLM(tp_size=2))
    (tmp_path / "text.txt").write_text("some text\n")
    with pytest.raises(RefusedError, match="measured on a Hugging Face model"):
        streamconv.calibrate(made, tmp_path / "ranges.safetensors", tmp_path / "text.txt")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"expected .* from config\.json"):
        streamconv.plan(made)
    (made / "config.json").write_text(json.dumps(config))
    (made / "rank1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rank1"):
        streamconv.plan(made)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("llama_mha", {"quant": "int8", "tp_size": 2}, [{"target_sm": 90}, {"pp_size": 2, "target_sm": 89}, {"target_version": "0.16"}]),
        ("llama_gqa_llama3rope", {"quant": "int4"}, [{"target_version": "0.16", "target_sm": 90}, {"pp_size": 2}, {"target_sm": 75}]),
        ("mixtral_4e", {"quant": "int4", "tp_size": 2, "moe_ep_size": 2}, [{"target_sm": 90}, {"pp_size": 2}]),
        ("phi3_gqa", {"quant": "int8", "tp_size": 2}, [{"target_sm": 90}]),
        ("llama_mha", {"quant": "fp8_rowwise", "tp_size": 2}, [{"pp_size": 4}, {"target_version": "0.16"}, {"pp_size": 1}]),
        ("llama_mha", {"quant": "fp8_rowwise", "use_meta_fp8_rowwise_recipe": True}, [{"pp_size": 2}]),
    ],
)
def test_codes_are_kept(
    name: str, options: dict[str, Any], steps: list[dict[str, Any]], golden_inputs: Path, tmp_path: Path
) -> None:
    source, asked = golden_inputs / "inputs" / name, {"target_sm": 80} | options
    at = _convert(source, tmp_path / "made", TensorRTLLM(**asked))
    for number, step in enumerate(steps):
        asked |= step
        at = _convert(at, tmp_path / f"cut{number}", TensorRTLLM(**step))
        assert _files(at) == _files(_convert(source, tmp_path / "direct", TensorRTLLM(**asked))), step


@pytest.mark.parametrize(("version", "sm"), [("0.16", 70), ("0.16", 80), ("0.16", 90), ("1.2", 80), ("1.2", 90)])
@pytest.mark.parametrize(("quant", "half"), [("int8", 128), ("int4", 8)])
def test_integers_are_decoded_whatever_their_layout(
    version: Any, sm: int, quant: str, half: int, golden_inputs: Path, tmp_path: Path
) -> None:
    """Without a manifest nothing says for which generation they are laid out; the values are those of the definition."""
    source = golden_inputs / "inputs" / "llama_mha"
    made = _convert(source, tmp_path / "made", TensorRTLLM(quant=quant, target_sm=sm, target_version=version, tp_size=2))
    (made / "streamconv.json").unlink()
    back = _convert(made, tmp_path / "back", HuggingFace())
    with streamconv.open(source) as first, streamconv.open(back) as second:
        for module, cuts in (("self_attn.v_proj", 1), ("self_attn.o_proj", 2), ("mlp.gate_proj", 1), ("mlp.down_proj", 2)):
            name = f"model.layers.2.{module}.weight"
            for want, got in zip(first[name].torch().chunk(cuts, 1), second[name].torch().chunk(cuts, 1), strict=True):
                scale = want.float().abs().amax(1, keepdim=True) / half
                ratio = want.float() / scale
                whole = (ratio.abs() + 0.5).floor().copysign(ratio).clamp(-half, half - 1)
                whole[want.abs().amax(1) == 0] = 0
                assert bool((got == (whole * scale.bfloat16().float()).bfloat16()).all()), name


def test_what_depends_on_the_cut_is_refused(golden_inputs: Path, tmp_path: Path) -> None:
    source = golden_inputs / "inputs" / "llama_mha"
    made = _convert(source, tmp_path / "made", TensorRTLLM(quant="int8", target_sm=80, tp_size=2))
    for options, why in (
        ({"tp_size": 1}, "with another scale"), ({"quant": "int4"}, "made with --quant int8"),
        ({"dtype": "float16"}, "scales in bfloat16"), ({"encoding": "raw"}, "--encoding raw"),
    ):  # fmt: skip
        with pytest.raises(RefusedError, match=why):
            streamconv.plan(made, TensorRTLLM(**options))  # type: ignore[arg-type]
    assert streamconv.plan(made, TensorRTLLM(dtype="bfloat16", tp_size=2)).files
    ranges = str(Path(__file__).parent / "act_ranges" / "llama_mha.sq.act_range.safetensors")
    smooth = _convert(source, tmp_path / "smooth", TensorRTLLM(quant="smoothquant", activation_ranges=ranges))
    with pytest.raises(RefusedError, match="not read back"):
        streamconv.plan(smooth)


@pytest.mark.parametrize("version", ["1.2", pytest.param("0.16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama_gptq_g64", {"quant": "int4_gptq", "group_size": 64}),
        pytest.param("llama_gptq8_g64", {"quant": "int8_gptq", "group_size": 64}, marks=pytest.mark.slow),
        ("hf_awq", {"quant": "int4_gptq", "group_size": 64}),
    ],
)
def test_group_wise_integers_are_kept(name: str, options: dict[str, Any], version: Any, golden_inputs: Path, tmp_path: Path) -> None:
    source, asked = golden_inputs / "inputs" / name, {"target_sm": 80, "target_version": version} | options
    at = _convert(source, tmp_path / "made", TensorRTLLM(**asked))
    for number, step in enumerate(({"tp_size": 2}, {"target_sm": 90}, {"tp_size": 1})):
        asked |= step
        at = _convert(at, tmp_path / f"cut{number}", TensorRTLLM(**step))
        assert _files(at) == _files(_convert(source, tmp_path / "direct", TensorRTLLM(**asked))), step


def test_group_wise_integers_are_decoded(golden_inputs: Path, tmp_path: Path) -> None:
    """0.16 for SM 90 stores them in order: two in a byte, scales and zeros [groups, N] beside them."""
    from safetensors.torch import load_file

    source = golden_inputs / "inputs" / "llama_gptq_g64"
    target = TensorRTLLM(quant="int4_gptq", group_size=64, target_sm=90, target_version="0.16")
    plain = load_file(_convert(source, tmp_path / "plain", target) / "rank0.safetensors")
    module = "transformer.layers.1.mlp.proj"
    codes = plain[f"{module}.weight"].contiguous().view(torch.uint8).reshape(256, -1)  # N, two inputs in a byte
    numbers = torch.stack([codes & 15, codes >> 4], 2).reshape(256, 256).to(torch.int32)
    numbers = (numbers ^ 8) - 8
    scales, zeros = (plain[f"{module}.{name}"].double().repeat_interleave(64, 0).T for name in ("weights_scaling_factor", "zero"))
    want = (numbers * scales + zeros).half()
    made = _convert(source, tmp_path / "made", TensorRTLLM(quant="int4_gptq", group_size=64, target_sm=80, tp_size=2))
    with streamconv.open(_convert(made, tmp_path / "back", HuggingFace())) as back:
        got = back["model.layers.1.mlp.down_proj.weight"].torch()
    assert bool(((got - want).abs() <= want.abs() * 2**-10).all()) and float((got == want).float().mean()) > 0.99


def test_group_wise_integers_of_an_unknown_layout_are_refused(golden_inputs: Path, tmp_path: Path) -> None:
    target = TensorRTLLM(quant="int4_gptq", group_size=64, target_sm=80)
    made = _convert(golden_inputs / "inputs" / "llama_gptq_g64", tmp_path / "made", target)
    (made / "streamconv.json").unlink()
    with pytest.raises(RefusedError, match="nothing says for which GPU generation"):
        streamconv.plan(made)
