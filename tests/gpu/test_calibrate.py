"""Ranges measured on a device are those of the CPU within the rounding of float16 matrix products."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from streamconv.cli.main import main
from tests.calibrate.test_streamed import model, text  # noqa: F401  (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_ranges(model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    for device in ("cpu", "cuda:0"):
        out = tmp_path / f"{device[:4]}.safetensors"
        assert main(["calibrate", str(model), "-o", str(out), "--text", str(text), "--device", device, "--quiet"]) == 0
    on_cpu, on_gpu = load_file(tmp_path / "cpu.safetensors"), load_file(tmp_path / "cuda.safetensors")
    assert on_cpu.keys() == on_gpu.keys()
    for name, right in on_cpu.items():
        if name.endswith(".w"):  # nothing is summed for these
            assert on_gpu[name].equal(right), name
        else:
            assert (on_gpu[name] - right).abs().max() <= 0.01 * right.abs().max() + 1e-3, name
