"""Half a model is none: what --to hf refuses for any architecture; and side files that are none of the model's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import streamconv
from streamconv import api
from streamconv.errors import CheckpointError, StreamconvError
from streamconv.open_plan import open_and_plan
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

FP8 = HuggingFace(quant="fp8_dynamic")
Tensors = dict[str, np.ndarray[Any, Any]]


def nothing(held: Tensors) -> None:
    """Leave all."""


def written(folder: Path, change: Callable[[Tensors], object] = nothing, name: str = "model.safetensors", **config: object) -> Path:
    held = dict(tiny.tensors())
    change(held)
    folder.mkdir()
    save_file(held, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny.config(**config)))
    return folder


def without(part: str) -> Callable[[Tensors], object]:
    def change(held: Tensors) -> None:
        names = [name for name in held if part in name]
        assert names
        for name in names:
            del held[name]

    return change


def cut(held: Tensors) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    held[name] = np.ascontiguousarray(held[name][:-32])


BROKEN: dict[str, tuple[Callable[[Tensors], object], dict[str, object], str]] = {
    "layer": (without("layers.1."), {}, r"layers\.1 is missing, config\.json tells of 2"),
    "up_proj": (without("layers.0.mlp.up_proj"), {}, r"layers\.0\.mlp\.up_proj is missing"),
    "gate_proj": (without("layers.0.mlp.gate_proj"), {}, r"layers\.0\.mlp\.gate_proj is missing"),
    "head": (without("lm_head"), {"tie_word_embeddings": False}, "lm_head.weight is missing"),
    "halves": (cut, {}, "gate_proj is .* and up_proj"),
    "count": (nothing, {"num_hidden_layers": 3}, r"layers\.2 is missing"),
    "type": (nothing, {"model_type": ["llama"]}, r"model_type is \['llama'\], not a name"),
    "words": (nothing, {"num_hidden_layers": "two"}, "no number of layers"),
}


@pytest.mark.parametrize("quant", ["fp8_dynamic", "none", "keep"])
@pytest.mark.parametrize("broken", BROKEN)
def test_half_a_model_is_refused(broken: str, quant: str, tmp_path: Path) -> None:
    change, config, says = BROKEN[broken]
    source = written(tmp_path / "in", change, **config)
    with pytest.raises(CheckpointError, match=says):
        api.convert(source, tmp_path / "out", HuggingFace(quant=quant))
    assert not (tmp_path / "out").exists()


def refusal(source: Path) -> str:
    """What planning says of a source; "" if it takes it."""
    try:
        open_and_plan(source, FP8, None)[0].close()
    except CheckpointError as error:
        return error.message
    return ""


@pytest.mark.parametrize("name", [name for name in tiny.tensors() if "lm_head" not in name])
def test_every_tensor_counts(name: str, tmp_path: Path) -> None:
    """The one layer that is left without it, or all layers: convert refuses, and verify of such a directory fails."""
    every = name.replace("layers.0.", "layers.").replace("layers.1.", "layers.")
    part, module = every.split("layers.")[-1], name.removesuffix(".weight")
    for folder, lost in (("all", [other for other in tiny.tensors() if other.endswith(part)]), ("one", [name])):
        source = written(tmp_path / folder, lambda held, lost=lost: [held.pop(one) for one in lost])  # type: ignore[misc]
        assert module in refusal(source)
    assert any(module in line for line in streamconv.verify(source).problems)


@pytest.mark.parametrize("key", [*tiny.config(), "text_config", "dtype", "quantization_config", "rope_scaling", "head_dim", "layer_types"])
def test_any_value_of_the_config_is_read_or_refused(key: str, tmp_path: Path) -> None:
    source = written(tmp_path / "in")
    for value in (["x"], {"x": [1]}, 1.5, None, "x"):
        (source / "config.json").write_text(json.dumps(tiny.config() | {key: value}))
        for options in (FP8, TensorRTLLM(quant="int8", target_sm=90)):
            try:
                open_and_plan(source, options, None)[0].close()
            except StreamconvError as error:
                assert str(error).strip(), value


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "num_hidden_layers", "head_dim")


@pytest.mark.parametrize("key", SIZES)
def test_every_size_of_the_config_counts(key: str, tmp_path: Path) -> None:
    source = written(tmp_path / "in")
    for value in (7, 3, -1, True, "two", 1 << 70, 1.5):
        (source / "config.json").write_text(json.dumps(tiny.config(**{key: value})))
        assert key in refusal(source) or "config.json tells of" in refusal(source), value
    assert any(key in line for line in streamconv.verify(source).problems)


def test_sizes_of_a_type_that_is_not_known_are_told(tmp_path: Path) -> None:
    source = written(tmp_path / "in", model_type="new", architectures=["NewForCausalLM"], intermediate_size=300)
    verdict = streamconv.verify(source)
    assert not verdict.problems and any("intermediate_size" in line and "not known here" in line for line in verdict.warnings)
    assert any("intermediate_size" in line for line in streamconv.plan(source, FP8).warnings)


MOE: dict[str, tuple[Callable[[Tensors], object], dict[str, object], str]] = {
    "one": (without("layers.1.block_sparse_moe.experts.2."), {}, r"layers\.1\.block_sparse_moe\.experts\.2 is missing"),
    "last": (without("block_sparse_moe.experts.3."), {}, r"experts\.3 is missing"),
    "all": (without("layers.0.block_sparse_moe.experts."), {}, r"layers\.0\.block_sparse_moe\.experts is missing"),
    "part": (without("layers.0.block_sparse_moe.experts.1.w2"), {}, r"experts\.1\.w2\.weight is missing"),
    "router": (without("layers.0.block_sparse_moe.gate"), {}, r"block_sparse_moe(\.gate\.weight)? is missing"),
    "fewer": (nothing, {"num_local_experts": 3}, r"experts\.3 is there, config\.json tells of 3 experts"),
    "more": (nothing, {"num_local_experts": 5}, r"experts\.4 is missing"),
    "width": (nothing, {"intermediate_size": 64}, r"w1\.weight has shape .*intermediate_size"),
}


@pytest.mark.parametrize("broken", MOE)
def test_experts(broken: str, tmp_path: Path) -> None:
    change, config, says = MOE[broken]
    source = written(tmp_path / "in", lambda held: (mixture(held), change(held)), **(MIXTURE | config))
    assert re.search(says, refusal(source)), refusal(source)
    assert any(re.search(says, line) for line in streamconv.verify(source).problems)


MIXTURE: dict[str, object] = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}


def mixture(held: Tensors) -> None:
    """Four experts in the place of each MLP."""
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}."
        parts = [held.pop(f"{at}mlp.{part}.weight") for part in ("gate_proj", "down_proj", "up_proj")]
        moe = at + "block_sparse_moe."
        held[moe + "gate.weight"] = np.zeros((4, tiny.HIDDEN), np.float16)
        for expert in range(4):
            held |= {f"{moe}experts.{expert}.w{n}.weight": part.copy() for n, part in enumerate(parts, 1)}


ODD = ([1], "fp8", 5, True, {"quant_method": 5}, {"quant_method": None}, {"quant_method": "fp9"},
       {"quant_method": "fp8", "weight_block_size": "128"}, {"quant_method": "compressed-tensors", "config_groups": {"group_0": None}},
       {"quant_method": "compressed-tensors", "config_groups": "x"},
       {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": {"targets": "Linear", "weights": "8"}}},
       {"quant_method": "compressed-tensors", "format": [], "config_groups": {"g": {"targets": [[]], "weights": {"num_bits": [8]}}}},
       {"quant_method": "gptq", "bits": "4", "group_size": 128}, {"quant_method": "gptq", "bits": 4, "group_size": None},
       {"quant_method": "modelopt", "quant_algo": ["FP8"]}, {"quant_method": "fp8", "ignored_layers": {"a": 1}})  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("odd")
    api.convert(written(top / "in"), top / "out", FP8)
    (top / "out/streamconv.json").unlink()
    return top / "out"


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_an_odd_statement_of_a_source_is_refused(odd: object, quantized: Path) -> None:
    """Each kind that JSON has, where another one belongs: a typed error of both targets, and a problem of verify."""
    (quantized / "config.json").write_text(json.dumps(tiny.config(quantization_config=odd)))
    for target in (HuggingFace(quant="none"), HuggingFace(quant="keep"), TensorRTLLM()):
        with pytest.raises(StreamconvError):
            open_and_plan(quantized, target, None)
    assert streamconv.verify(quantized).problems


def test_a_mixture_is_taken(tmp_path: Path) -> None:
    source = written(tmp_path / "in", mixture, **MIXTURE)
    assert not refusal(source) and not streamconv.verify(source).problems


def test_layers_that_share_keys_and_values_are_taken(tmp_path: Path) -> None:
    """Where config.json says so, or of a model type that is not known."""
    change = without("layers.1.self_attn.k_proj"), without("layers.1.self_attn.v_proj")
    source = written(tmp_path / "in", lambda held: [one(held) for one in change], model_type="new", architectures=["New"])
    assert not refusal(source) and not streamconv.verify(source).problems


def test_a_hybrid_model_is_taken(tmp_path: Path) -> None:
    """Linear attention, Mamba or a convolution in the place of attention; a layer that has nothing there is refused."""

    def hybrid(held: Tensors) -> None:
        without("layers.0.self_attn")(held)
        held["model.layers.0.linear_attn.in_proj_qkvz.weight"] = np.zeros((64, tiny.HIDDEN), np.float16)

    source = written(tmp_path / "in", hybrid, model_type="qwen3_next", architectures=["Qwen3NextForCausalLM"])
    assert not refusal(source) and not streamconv.verify(source).problems
    assert "layers.0.self_attn" in refusal(written(tmp_path / "less", without("layers.0.self_attn"), model_type="new"))


def test_a_shard_that_its_names_tell_of(tmp_path: Path) -> None:
    source = written(tmp_path / "in", name="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        api.convert(source, tmp_path / "out", FP8)


def test_the_whole_model_is_taken(tmp_path: Path) -> None:
    api.convert(written(tmp_path / "in"), tmp_path / "out", FP8)


def test_codes_without_scales_are_not_kept(tmp_path: Path) -> None:
    api.convert(written(tmp_path / "in"), tmp_path / "out", FP8)
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    path = tmp_path / "out/model.safetensors"
    held = load_file(path)
    del held["model.layers.0.mlp.up_proj.weight_scale"]
    save(held, path)
    with pytest.raises(CheckpointError, match="up_proj has codes and no scales"):
        api.convert(tmp_path / "out", tmp_path / "kept", HuggingFace(quant="keep"))


def test_links_out_of_the_model_and_odd_names_are_left_out(tmp_path: Path) -> None:
    source = written(tmp_path / "in")
    (tmp_path / "secret").write_text("a key")
    for name in ("LICENSE", "README.md"):
        (source / name).symlink_to(tmp_path / "secret")
    odd = os.fsencode(source) + b"/bad\xff.txt"
    with open(odd, "w") as file:
        file.write("odd")
    report = api.convert(source, tmp_path / "out", FP8)
    assert not (tmp_path / "out/LICENSE").exists()
    assert not any(b"a key" in path.read_bytes() for path in (tmp_path / "out").iterdir())
    told = next(line for line in report.warnings if "not copied" in line)
    assert "LICENSE" in told and "README.md" in told and "bad" in told and told.isprintable()
