"""Experts that a quantizer stored apart are decoded into the stacked tensors that the model's own code reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv
from streamconv import HuggingFace, Resources
from streamconv.errors import CheckpointError
from streamconv.quants import stacked_rows

Tensors = dict[str, torch.Tensor]
E, HIDDEN, INNER = 3, 128, 256
CPU = Resources(device="cpu", workers=2)
KINDS = ("gpt_oss", "llama4_text", "gemma4_text", "openai_privacy_filter")
CASES = [
    ("gpt_oss", "w4a16", "modelopt"), ("llama4_text", "fp8_block", "compressed-tensors"), ("gemma4_text", "fp8_dynamic", None),
    pytest.param("gpt_oss", "nvfp4a16", "modelopt", marks=pytest.mark.slow),
    pytest.param("gemma4_text", "w4a16", "modelopt", marks=pytest.mark.slow),
    *(pytest.param(kind, quant, None, marks=pytest.mark.slow) for kind, quant in (
        ("gpt_oss", "fp8_dynamic"), ("gpt_oss", "w4a16"), ("llama4_text", "w8a16"), ("llama4_text", "mxfp4"),
        ("openai_privacy_filter", "int8_dynamic"),
    )),
]  # fmt: skip


def model(folder: Path, kind: str, **changes: Any) -> Path:
    """Two layers' experts, as transformers saves them."""
    random, weights = torch.Generator().manual_seed(7), {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    for layer in (0, 1):
        at = f"model.layers.{layer}.mlp.experts"
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.randn(HIDDEN, HIDDEN, generator=random).bfloat16()
        shapes = {"gate_up_proj": (E, HIDDEN, 2 * INNER), "down_proj": (E, INNER, HIDDEN)}
        if kind.startswith("gemma4"):
            shapes = {name: (e, out, in_) for name, (e, in_, out) in shapes.items()}
        if kind in ("gpt_oss", "openai_privacy_filter"):
            shapes |= {"gate_up_proj_bias": (E, 2 * INNER), "down_proj_bias": (E, HIDDEN)}
        weights |= {f"{at}.{name}": torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": kind, "architectures": ["Other"], "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
              "num_local_experts": E, "dtype": "bfloat16"} | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantized(folder: Path, kind: str, quant: str, form: str | None) -> Path:
    made = folder / "quantized"
    streamconv.convert(model(folder / "model", kind), made, HuggingFace(quant=quant, format=form, group_size=64), resources=CPU)
    return made


def renamed(folder: Path, place: Path, model_type: str, **changes: Any) -> Path:
    """The same directory for another model type, of which transformers reads experts apart."""
    place.mkdir()
    for name in ("model.safetensors", "hf_quant_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, place / name)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type} | changes
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return place


def by_hand(apart: Tensors, kind: str) -> Tensors:
    """What stacked tensors hold of experts [out, in]."""
    made: Tensors = {name: tensor for name, tensor in apart.items() if ".experts." not in name}
    for layer in (0, 1):
        at = f"model.layers.{layer}.mlp.experts"
        for leaf in ("weight", "bias"):
            if f"{at}.0.down_proj.{leaf}" not in apart:
                continue
            gate, up, down = (torch.stack([apart[f"{at}.{e}.{part}_proj.{leaf}"] for e in range(E)]) for part in ("gate", "up", "down"))
            both = torch.stack([gate, up], 2).flatten(1, 2) if kind == "gpt_oss" else torch.cat([gate, up], 1)
            turn = leaf == "weight" and not kind.startswith("gemma4")
            ending = "" if leaf == "weight" else "_bias"
            for name, tensor in (("gate_up_proj", both), ("down_proj", down)):
                made[f"{at}.{name}{ending}"] = tensor.transpose(1, 2) if turn else tensor
    return made


@pytest.mark.parametrize(("kind", "quant", "form"), CASES, ids=lambda value: str(value))
def test_the_stacked_tensors_hold_the_decoded_experts(
    kind: str, quant: str, form: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked_rows, "STRIPE", 1 << 14)  # many stripes, some that begin inside a group
    source = quantized(tmp_path, kind, quant, form)
    report = streamconv.convert(source, tmp_path / "out", HuggingFace(), resources=CPU)
    streamconv.convert(renamed(source, tmp_path / "other", "other"), tmp_path / "apart", HuggingFace(), resources=CPU)
    assert "model.layers.0.mlp.experts.0.down_proj.weight_scale" in load_file(source / "model.safetensors")
    found, original = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    want = by_hand(load_file(tmp_path / "apart/model.safetensors"), kind)
    assert found.keys() == original.keys() == want.keys()
    for name, tensor in found.items():
        assert tensor.shape == original[name].shape and torch.equal(tensor, want[name]), name
    assert not [line for line in report.warnings if "random values" in line]


@pytest.mark.parametrize("kind", ["gpt_oss", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_nothing_is_lost_that_was_not_quantized(kind: str, tmp_path: Path) -> None:
    """Experts that stand apart as floats give the original's bytes."""
    whole = load_file(model(tmp_path / "model", kind) / "model.safetensors")
    streamconv.convert(tmp_path / "model", tmp_path / "w", HuggingFace(quant="fp8_dynamic", ignore=("re:.*experts.*",)), resources=CPU)
    streamconv.convert(tmp_path / "w", tmp_path / "out", HuggingFace(), resources=CPU)
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items() if ".experts." in name)


def test_biases_of_experts_are_held_against_a_stacked_source(tmp_path: Path) -> None:
    """Without a manifest, too: an expert's bias is [N], and lies apart in the source."""
    made = quantized(tmp_path, "gpt_oss", "fp8_dynamic", None)
    (made / "streamconv.json").unlink()
    problems = streamconv.verify(made, tmp_path / "model").problems
    assert not [line for line in problems if "bias" in line], problems
    held = load_file(made / "model.safetensors")
    held["model.layers.1.mlp.experts.0.down_proj.bias"][3] += 1
    save_file(held, made / "model.safetensors", metadata={"format": "pt"})
    assert any("down_proj.bias" in line for line in streamconv.verify(made, tmp_path / "model").problems)


WRONG: dict[str, dict[str, Any]] = {
    "fewer experts": {"num_local_experts": 2}, "more experts": {"num_local_experts": 4}, "no count": {"num_local_experts": None},
    "another size": {"hidden_size": 64}, "of either form": {"model_type": "qwen3_vl_moe_text"},
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_proven_stays_apart(what: str, tmp_path: Path) -> None:
    source = quantized(tmp_path, "gpt_oss", "fp8_dynamic", None)
    place = renamed(source, tmp_path / "wrong", **{"model_type": "gpt_oss"} | WRONG[what])
    try:
        plan = streamconv.plan(place, HuggingFace())
    except CheckpointError:
        return  # refused, as before
    assert [line for line in plan.warnings if "random values" in line]
    assert sum(".experts.0." in name for file in plan.files for name in file.names())


def test_names_of_other_tools(tmp_path: Path) -> None:
    """llm-compressor's module of modules, and ModelOpt's stacked codes."""
    nested = quantized(tmp_path, "gpt_oss", "fp8_dynamic", None)
    (nested / "streamconv.json").unlink()
    held = {name.replace(".experts.", ".experts.experts."): tensor for name, tensor in load_file(nested / "model.safetensors").items()}
    save_file(held, nested / "model.safetensors", metadata={"format": "pt"})
    streamconv.convert(nested, tmp_path / "out", HuggingFace(), resources=CPU)
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(tmp_path / "model/model.safetensors").keys()
    source = model(tmp_path / "llama4", "llama4_text", quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    whole, want = load_file(source / "model.safetensors"), {}
    for name in [name for name in whole if ".experts." in name]:
        whole[name] = whole[name].to(torch.float8_e4m3fn)
        whole[f"{name}_weight_scale"] = torch.tensor([0.5, 2.0, 0.25]) if "down" in name else torch.tensor(0.5)
        whole[f"{name}_input_scale"] = torch.tensor(1.0)
        want[name] = (whole[name].float() * whole[f"{name}_weight_scale"].reshape(-1, 1, 1)).bfloat16()
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    streamconv.convert(source, tmp_path / "plain", HuggingFace(), resources=CPU)
    found = load_file(tmp_path / "plain/model.safetensors")
    assert not [name for name in found if name.endswith("_scale")]
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    del whole["model.layers.0.mlp.experts.down_proj_weight_scale"]
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.down_proj .*no scales"):
        streamconv.plan(source, HuggingFace())


def test_parts_verify_and_diff(tmp_path: Path) -> None:
    source = quantized(tmp_path, "gpt_oss", "fp8_dynamic", None)
    streamconv.convert(source, tmp_path / "out", HuggingFace(), resources=CPU)
    streamconv.convert(source, tmp_path / "parts", HuggingFace(), resources=Resources(device="cpu", workers=1, parts=3))
    for name in ("model.safetensors", "config.json", "streamconv.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    assert streamconv.verify(tmp_path / "out", source, resources=CPU).problems == []
    told = streamconv.diff(tmp_path / "model", tmp_path / "out")
    assert all(tensor.state in ("exact", "differs") and tensor.relative < 0.05 for tensor in told.tensors)
    streamconv.convert(source, HuggingFace().to(tmp_path / "a"), HuggingFace(quant="int8_dynamic").to(tmp_path / "b"), resources=CPU)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "gemma4_text"])
def test_transformers_misses_nothing(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160}
    more: dict[str, dict[str, Any]] = {
        "gpt_oss": {"num_local_experts": E}, "llama4_text": {"num_local_experts": E, "interleave_moe_layer_step": 1},
        "gemma4_text": {"num_experts": E, "moe_intermediate_size": INNER, "top_k_experts": 1, "enable_moe_block": True,
                        "global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    }  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, hidden_size=HIDDEN, intermediate_size=INNER, **sizes, **more[kind], **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    streamconv.convert(tmp_path / "model", tmp_path / "w", HuggingFace(quant="fp8_dynamic"), resources=CPU)
    streamconv.convert(tmp_path / "w", tmp_path / "out", HuggingFace(), resources=CPU)
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    shapes = [{name: tensor.shape for name, tensor in load_file(tmp_path / at / "model.safetensors").items()} for at in ("model", "out")]
    assert shapes[0] == shapes[1]
