"""What the config says of modules that stay floats: by every name that readers have for them; tables and layers that are no nn.Linear."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import streamconv
from streamconv import api
from streamconv.errors import RefusedError
from streamconv.targets.hf.ignored import ignored
from streamconv.targets.hf.target import HuggingFace
from tests import tiny

FP8 = HuggingFace(quant="fp8_dynamic")
Tensors = dict[str, np.ndarray[Any, Any]]


def converted(tmp_path: Path, more: Tensors, target: HuggingFace = FP8, **config: Any) -> dict[str, Any]:
    """Config of the output of a tiny model with more tensors."""
    (tmp_path / "in").mkdir()
    save_file({**tiny.tensors(), **more}, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in/config.json").write_text(json.dumps(tiny.config(**config)))
    api.convert(tmp_path / "in", tmp_path / "out", target)
    assert not streamconv.verify(tmp_path / "out", tmp_path / "in").problems
    found: dict[str, Any] = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(
    ("stored", "known_as"),
    [
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("language_model.model.layers.3.mlp.gate", "model.language_model.layers.3.mlp.gate"),
    ],
)
def test_names_that_readers_have(stored: str, known_as: str) -> None:
    quantized = ["language_model.model.layers.3.mlp.up_proj", "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"]
    listed = ignored([stored], quantized, "compressed-tensors")
    for name in (stored, known_as, "lm_head"):
        assert any(re.match(one[3:], name) if one.startswith("re:") else one == name for one in listed), (name, listed)
    for name in quantized:
        assert not any(re.match(one[3:], name) if one.startswith("re:") else one == name for one in listed)


@pytest.mark.parametrize(("quant", "form"), [("fp8_dynamic", None), ("fp8_block", "hf"), ("nvfp4a16", "modelopt"), ("w4a16", "awq")])
def test_a_vision_tower_in_every_container(tmp_path: Path, quant: str, form: Any) -> None:
    tower = {"visual.blocks.0.attn.qkv.weight": tiny.tensors()["model.layers.0.self_attn.q_proj.weight"]}
    stated = converted(tmp_path, tower, HuggingFace(quant=quant, format=form, group_size=32))
    listed = next(stated[key] for key in ("ignore", "modules_to_not_convert") if key in stated)
    assert "visual.blocks.0.attn.qkv" in listed and len([name for name in listed if "visual" in name]) > 1


def test_a_part_that_is_quantized_by_request_has_no_pattern(tmp_path: Path) -> None:
    one = tiny.tensors()["model.layers.0.self_attn.q_proj.weight"]
    tower = {"visual.blocks.0.attn.qkv.weight": one, "visual.blocks.1.attn.qkv.weight": one}
    stated = converted(tmp_path, tower, HuggingFace(quant="fp8_dynamic", only=("re:model.layers.*_proj", "visual.blocks.0.*")))
    assert [name for name in stated["ignore"] if "visual" in name] == ["visual.blocks.1.attn.qkv"]


@pytest.mark.parametrize("name", ["shared", "transformer.w"])
def test_a_table_by_any_name(tmp_path: Path, name: str) -> None:
    stated = converted(tmp_path, {f"{name}.weight": tiny.tensors()["model.embed_tokens.weight"] + 1})
    assert name in stated["ignore"]


@pytest.mark.parametrize(
    ("bias", "head"), [("cls.predictions.bias", "cls.predictions.decoder"), ("vocab_projector.bias", "vocab_projector")]
)
def test_a_tied_head_by_any_name(tmp_path: Path, bias: str, head: str) -> None:
    stated = converted(tmp_path, {bias: np.zeros(tiny.config()["vocab_size"], np.float16)})
    assert head in stated["ignore"]


def test_layers_that_stand_the_other_way(tmp_path: Path) -> None:
    size = tiny.config()["hidden_size"]
    conv = {"h.0.attn.c_attn.weight": np.ones((size, 3 * size), np.float16), "h.0.attn.c_attn.bias": np.ones(3 * size, np.float16)}
    with pytest.raises(RefusedError, match=r"h\.0\.attn\.c_attn: its weight stands as \[in, out\]"):
        converted(tmp_path, conv)
    assert api.convert(tmp_path / "in", tmp_path / "copy", HuggingFace()).bytes_written
