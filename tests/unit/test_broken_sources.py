"""Quantized sources that state what nothing here applies, or hold numbers that are no scales: refused, never decoded to other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamconv import api, plan
from streamconv.errors import RefusedError
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
