"""What `convert` ends with 0, `verify` accepts; the known cases by name, and random ones (more: tests/fuzz/accepted.py)."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors.torch import save_file

from streamconv import api
from streamconv.errors import RefusedError
from streamconv.families import all_families
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests.conformance.recipes import RECIPES, config, names, values, write
from tests.fuzz import accepted, models

FAMILIES = {family.name: family for family in all_families()}


def _model(folder: Path, name: str, **changes: Any) -> Path:
    """A tiny model whose config.json says something else; None leaves a key out."""
    recipe = next(recipe for recipe in RECIPES if recipe.family == name)
    family = FAMILIES[name]
    held = values(recipe, family)
    write(recipe, family, folder, {path: held[key] for key, path in names(recipe, family).items()})
    told = {key: value for key, value in (config(recipe, family) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_random_models(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # conftest's small process: here the real one is held to its budgets
    seen, wrong = accepted.run(count, 14)
    assert not wrong, wrong[0]
    assert seen["converted"] >= count // 2


@pytest.mark.parametrize("model_type", [None, "llama", "anything"])
def test_mixtral_by_its_class_alone(tmp_path: Path, model_type: str | None) -> None:
    """model_type says nothing that the class does not: the output is the same."""
    usual, other = _model(tmp_path / "usual", "mixtral"), _model(tmp_path / "other", "mixtral", model_type=model_type)
    for source, out in ((usual, "a"), (other, "b")):
        api.convert(source, tmp_path / out, TensorRTLLM(tp_size=2))
        assert verify(tmp_path / out, source).problems == []
    for file in ("config.json", "rank1.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_mixtral_has_one_width(tmp_path: Path) -> None:
    """moe_intermediate_size is no key of it: intermediate_size is the width of its experts."""
    source = _model(tmp_path / "in", "mixtral", moe_intermediate_size=64)
    api.convert(source, tmp_path / "out", TensorRTLLM())
    assert verify(tmp_path / "out").problems == []


@pytest.mark.parametrize("name", ["exaone", "internlm2", "qwen3", "phi3", "gemma"])
@pytest.mark.parametrize("key", ["bias", "attention_bias"])
def test_biases_that_no_tensor_has(tmp_path: Path, name: str, key: str) -> None:
    absent = {} if key == "bias" else {"bias": None}  # it would win
    source = _model(tmp_path / "in", name, **{key: True}, **absent)
    with pytest.raises(RefusedError, match=f"{key} is true, but {name} models"):
        api.open_and_plan(source, TensorRTLLM())


def test_tables_follow_the_longer_context(tmp_path: Path) -> None:
    source = _model(tmp_path / "in", "llama")
    api.convert(source, tmp_path / "out", TensorRTLLM(rope_tables=True, max_position_embeddings=96))
    assert verify(tmp_path / "out", source).problems == []


_NOT_LOADED = r"would not load it: rank0\.safetensors: transformer\.layers\.0\.attention\.qkv"
_TOLD_BEFORE = "head_dim 16 is not hidden_size / num_attention_heads 32, which TensorRT-LLM 0.16 takes for qwen2"


@pytest.mark.parametrize(("name", "version", "says"), [("internlm2", "1.2", _NOT_LOADED), ("qwen2", "0.16", _TOLD_BEFORE)])
def test_head_sizes_that_config_json_cannot_say(tmp_path: Path, name: str, version: Any, says: str) -> None:
    """The loader takes hidden_size / num_attention_heads there; nothing that it would not load is written."""
    sizes = models.Sizes(heads=4, kv=2, size=16, hidden=128, width=128, expert_width=0, vocab=37, layers=1, experts=0)
    told = config(next(recipe for recipe in RECIPES if recipe.family == name), FAMILIES[name])
    told |= {"head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 1, "torch_dtype": "float16"}
    made, _ = models.tensors_of(Random(5), FAMILIES[name], sizes, told)
    (tmp_path / "config.json").write_text(json.dumps(told))
    save_file(made, tmp_path / "model.safetensors")
    with pytest.raises(RefusedError, match=says):
        api.open_and_plan(tmp_path, TensorRTLLM(target_version=version))
