"""Half a model is none: what --to hf refuses for any architecture; and side files that are none of the model's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import streamconv
from streamconv import api
from streamconv.errors import CheckpointError, UsageError
from streamconv.targets.hf.target import HuggingFace
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


def test_a_source_says_nothing_of_a_directory_without_manifest(tmp_path: Path) -> None:
    source = written(tmp_path / "in")
    api.convert(source, tmp_path / "out", FP8)
    (tmp_path / "out/streamconv.json").unlink()
    with pytest.raises(UsageError, match=r"streamconv\.json"):
        streamconv.verify(tmp_path / "out", source)
    assert not streamconv.verify(tmp_path / "out").problems
