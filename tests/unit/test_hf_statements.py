"""Where config.json says how weights are quantized: for the whole model, for the language model inside it, or under an older key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv import api
from streamconv.targets.hf.target import HuggingFace
from streamconv.verification.check import verify
from tests import tiny
from tests.unit.test_hf_decode import integer_weight, source

Config = dict[str, Any]
OUTER = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float16"}


def inside(config: Config, stated: Any) -> Config:
    return OUTER | {"text_config": config | {"quantization_config": stated}}


def older_inside(config: Config, stated: Any) -> Config:
    return OUTER | {"text_config": config | {"compression_config": stated}}


def older(config: Config, stated: Any) -> Config:
    return config | {"compression_config": stated}


def both(config: Config, stated: Any) -> Config:
    return OUTER | {"text_config": config | {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config": stated}


def read(folder: Path) -> Config:
    made: Config = json.loads((folder / "config.json").read_text())
    return made


def without(config: Config) -> Config:
    """The config with no statement at all."""
    found = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return found | ({"text_config": without(found["text_config"])} if "text_config" in found else {})


@pytest.mark.parametrize("place", [inside, older_inside, older, both])
@pytest.mark.parametrize(("quant", "container"), [("fp8_block", "hf"), ("w4a16", "compressed-tensors"), ("nvfp4a16", "modelopt")])
def test_no_statement_outlives_its_codes(quant: str, container: Any, place: Callable[[Config, Any], Config], tmp_path: Path) -> None:
    model, coded = tiny.write(tmp_path / "model"), tmp_path / "coded"
    api.convert(model, coded, HuggingFace(quant=quant, format=container))
    (coded / "streamconv.json").unlink()
    api.convert(coded, tmp_path / "plain", HuggingFace())
    config = place(tiny.config(), read(coded)["quantization_config"])
    (coded / "config.json").write_text(json.dumps(config))
    for name, options in (("none", HuggingFace()), ("fp8", HuggingFace(quant="fp8_dynamic")), ("keep", HuggingFace(quant="keep"))):
        out = tmp_path / name
        api.convert(coded, out, options)
        assert verify(out, coded).problems == []
        made = read(out)
        if name == "keep":
            assert made == config
            continue
        stated = made.pop("quantization_config", None)
        assert made == without(config)
        assert stated is None if name == "none" else stated["format"] == "float-quantized"
    assert (tmp_path / "none/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


@pytest.mark.parametrize("place", [inside, older])
@pytest.mark.parametrize("options", [HuggingFace(), HuggingFace(quant="keep", format="compressed-tensors")])
def test_what_is_stated_there_counts(options: HuggingFace, place: Callable[[Config, Any], Config], tmp_path: Path) -> None:
    """Zero points of gptq_v2 are one more than those of gptq, and only the statement tells."""
    made, _ = integer_weight(64, 128, 32, "gptq", v2=True)
    at = "model.layers.0.mlp.down_proj"
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}
    folder = source(tmp_path / "source", stated, {f"{at}.{leaf}": tensor for leaf, tensor in made.items()})
    api.convert(folder, tmp_path / "top", options)
    config = read(folder)
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(place(config, stated)))
    api.convert(folder, tmp_path / "there", options)
    assert (tmp_path / "top/model.safetensors").read_bytes() == (tmp_path / "there/model.safetensors").read_bytes()


def test_a_null_that_nobody_reads_stays(tmp_path: Path) -> None:
    config = inside(tiny.config(), None) | {"compression_config": None}
    api.convert(tiny.write(tmp_path / "model", settings=config), tmp_path / "out", HuggingFace(quant="fp8_dynamic"))
    made = read(tmp_path / "out")
    made.pop("quantization_config")
    assert made == config


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_dtype_of_null_is_none(key: str, tmp_path: Path) -> None:
    config = {name: value for name, value in tiny.config().items() if name != "torch_dtype"} | {key: None}
    api.convert(tiny.write(tmp_path / "model", settings=config), tmp_path / "out", HuggingFace(dtype="float32"))
    assert read(tmp_path / "out") == config | {key: "float32"}


def test_an_unquantized_model_with_a_statement_inside(tmp_path: Path) -> None:
    """The dtypes say that nothing is quantized: it is told, and the output says nothing else."""
    folder = tiny.write(tmp_path / "model", settings=inside(tiny.config(), {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    plan = streamconv.plan(folder, HuggingFace())
    assert any("no tensor is quantized" in line for line in plan.warnings)
    api.convert(folder, tmp_path / "out", HuggingFace())
    assert read(tmp_path / "out") == without(read(folder))
    assert verify(tmp_path / "out", folder).problems == []
