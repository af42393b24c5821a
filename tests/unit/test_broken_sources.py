"""Quantized sources that state what nothing here applies, or hold numbers that are no scales: refused, never decoded to other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv import api, plan
from streamconv.errors import CheckpointError, RefusedError, StreamconvError
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny

HADAMARD = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_output"}]}}}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Quantized models, each made once."""
    folder = tmp_path_factory.mktemp("sources")

    def of(quant: str) -> Path:
        if not (folder / quant).exists():
            source = tiny.write(folder / "model", settings=tiny.config(torch_dtype="bfloat16"))
            api.convert(source, folder / quant, HuggingFace(quant=quant))
            (folder / quant / "streamconv.json").unlink()
        return folder / quant

    return of


def restated(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with another quantization_config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: c.update(transform_config=HADAMARD), "transform_config"),
        (lambda c: c["config_groups"]["group_0"].update(format="marlin-24"), "format is marlin-24"),
        (lambda c: c.update(quant_method="quark"), "quark"),
    ],
)
def test_a_statement_that_is_not_known_is_refused_or_kept(
    sources: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], key: str
) -> None:
    source = restated(sources("w4a16"), tmp_path / "source", change)
    assert any(key in line and "not known here" in line for line in verify(source).warnings)
    for target in (HuggingFace(), HuggingFace(quant="fp8_dynamic"), TensorRTLLM()):
        with pytest.raises(RefusedError, match=key) as caught:
            plan(source, target)
        assert caught.value.hint
    assert any(key in line and "kept" in line for line in api.convert(source, tmp_path / "out", HuggingFace(quant="keep")).warnings)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_transforms_of_floats_count_too(tmp_path: Path) -> None:
    """A model that was rotated and not quantized is no left-over statement."""
    stated = {"quant_method": "compressed-tensors", "transform_config": HADAMARD}
    source = tiny.write(tmp_path / "source", settings=tiny.config(quantization_config=stated))
    for target in (HuggingFace(), TensorRTLLM()):
        with pytest.raises(RefusedError, match="transform_config"):
            plan(source, target)


GATE = "model.layers.0.mlp.gate_proj"
SCALES = {"fp8_dynamic": "weight_scale", "fp8_block": "weight_scale_inv", "w4a16": "weight_scale", "nvfp4a16": "weight_global_scale",
          "mxfp4": "weight_scale"}  # fmt: skip


def changed(source: Path, folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> Path:
    """A copy with another tensor."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("quant", SCALES)
def test_scales_that_are_none(sources: Callable[[str], Path], tmp_path: Path, quant: str) -> None:
    """The last scale is NaN: refused by name wherever it is read; zero is refused where it would be kept."""
    name = f"{GATE}.{SCALES[quant]}"
    byte = {torch.float8_e4m3fn: 0x7F, torch.uint8: 255}

    def nan(tensor: torch.Tensor) -> None:
        code = byte.get(tensor.dtype)
        tensor.view(torch.uint8 if code else tensor.dtype).view(-1)[-1] = code or float("nan")

    source = changed(sources(quant), tmp_path / "nan", name, nan)
    assert any(name in line for line in verify(source).problems)
    for target in (HuggingFace(), HuggingFace(quant="keep"), HuggingFace(quant="fp8_block")):
        with pytest.raises(CheckpointError, match=name) as caught:
            api.convert(source, tmp_path / "out", target)
        assert not (tmp_path / "out").exists() and (quant == "nvfp4a16" or "model.safetensors" in str(caught.value))
    if quant == "fp8_dynamic":
        negative = changed(sources(quant), tmp_path / "negative", name, lambda t: t.neg_())
        with pytest.raises(CheckpointError, match=f"{name} holds a negative number"):
            api.convert(negative, tmp_path / "out", HuggingFace())
        api.convert(source, tmp_path / "forced", HuggingFace(quant="int8_dynamic", allow_nonfinite=True))
    zero = changed(sources(quant), tmp_path / "zero", name, lambda t: t.view(torch.uint8).zero_())
    if verify(zero).problems:
        with pytest.raises(CheckpointError, match=f"{name} holds 0"):
            api.convert(zero, tmp_path / "out", HuggingFace(quant="keep"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_group_scales_that_are_none(tmp_path: Path, value: float) -> None:
    """GPTQ's, for both targets."""
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "checkpoint_format": "gptq_v2"}
    weights: dict[str, torch.Tensor] = {}
    for name, array in tiny.tensors().items():
        held, module = torch.from_numpy(array), name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            weights[name] = held
            continue
        n, k = held.shape
        weights[f"{module}.qweight"] = torch.full((k // 8, n), 0x39393939, dtype=torch.int32)
        weights[f"{module}.qzeros"] = torch.full((k // 64, n // 8), -0x77777778, dtype=torch.int32)
        weights[f"{module}.scales"] = torch.full((k // 64, n), 0.01, dtype=torch.float16)
    folder = tiny.write(tmp_path / "source", settings=tiny.config(quantization_config=stated))
    save_file(weights, folder / "model.safetensors")
    targets = HuggingFace(), HuggingFace(quant="keep"), HuggingFace(quant="keep", format="compressed-tensors"), TensorRTLLM(target_sm=80)
    for number, target in enumerate(targets):
        api.convert(folder, tmp_path / f"out{number}", target)
        assert not verify(tmp_path / f"out{number}").problems
    weights[f"{GATE}.scales"][1, 5] = -0.01  # as AutoRound writes them
    save_file(weights, folder / "model.safetensors")
    assert not verify(folder).problems
    api.convert(folder, tmp_path / "negative", HuggingFace(quant="keep"))
    weights[f"{GATE}.scales"][1, 5] = value
    save_file(weights, folder / "model.safetensors")
    for target in targets:
        with pytest.raises(StreamconvError, match=rf"{GATE}.*scale"):
            api.convert(folder, tmp_path / "out", target)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["ignore"].append(GATE), f"{GATE} is quantized, and the config's ignore list covers it"),
        (lambda c: c["ignore"].clear(), "does not name lm_head"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8, "type": "float"}), "has no k_scale"),
    ],
)
def test_what_verify_refuses_is_not_kept(
    sources: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    """From headers alone; decoding does not need the list."""
    source = restated(sources("w4a16"), tmp_path / "source", change)
    assert any(says in line for line in verify(source).problems)
    with pytest.raises(CheckpointError, match=says):
        plan(source, HuggingFace(quant="keep"))
    plan(source, HuggingFace())
