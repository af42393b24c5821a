"""ModelOpt's calibrated exports: every tensor but the inputs' scales, which follow from the ranges given and not from the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden_hf import cases
from tests.golden_hf.cases import Case
from tests.golden_hf.conftest import Models, convert

CALIBRATED = [
    ("mo_llama_gqa_fp8cal", "llama_gqa", "fp8_static", 448, "76d3e38e23ffa190"),
    ("mo_llama_gqa_nvfp4cal", "llama_gqa", "nvfp4", 2688, "ab58687911be3e27"),
    ("mo_mixtral_nvfp4cal", "mixtral", "nvfp4", 2688, "4a6a28ef079e66fc"),
]
"""Case, model, quantization, what the largest input is divided by, digest of the tool's tensors."""


@pytest.mark.parametrize(("name", "model", "quant", "divisor", "digest"), CALIBRATED)
def test_calibrated(name: str, model: str, quant: str, divisor: int, digest: str, models: Models, tmp_path: Path) -> None:
    ranges = tmp_path / "ranges.safetensors"
    case = Case(name, model, ("--quant", quant, "--format", "modelopt", "--activation-ranges", str(ranges)), None, {})
    source = models.source(case)
    before, _ = cases.read_all(source)
    save_file({f"{n.removesuffix('.weight')}.x": np.full(s[1], 3, np.float32) for n, (_, s, _) in before.items() if len(s) == 2}, ranges)
    convert(case, source, tmp_path / "out")
    tensors, _ = cases.read_all(tmp_path / "out")
    inputs = {n: tensors.pop(n) for n in list(tensors) if n.endswith("input_scale")}
    assert inputs and all(told == ("F32", [], (np.float32(3) / np.float32(divisor)).tobytes()) for told in inputs.values())
    listed = {n: [dtype, shape, hashlib.sha256(data).hexdigest()] for n, (dtype, shape, data) in tensors.items()}
    assert hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16] == digest
