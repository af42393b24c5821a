"""The official command measures the ranges it needs, as NVIDIA's script does."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from streamconv.calibration.run import calibrate
from streamconv.cli.convert_checkpoint import main
from tests.calibrate.test_streamed import model, text

__all__ = ["model", "text"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["--smoothquant", "0.5", "--per_channel"], "float16"),
        pytest.param(["--int8_kv_cache", "--dtype", "bfloat16"], "auto", marks=pytest.mark.slow),
    ],
)
def test_it_calibrates_by_itself(model: Path, text: Path, tmp_path: Path, flags: list[str], dtype: str) -> None:
    calibration = ["--calib_dataset", str(text), "--calib_size", "4", "--calib_max_seq_length", "16"]
    command = ["--model_dir", str(model), *flags]
    assert main([*command, *calibration, "--output_dir", str(tmp_path / "one")]) == 0
    kept, ours = tmp_path / "one.ranges.safetensors", tmp_path / "ours.safetensors"
    calibrate(model, ours, str(text), samples=4, max_length=16, dtype=dtype)
    assert kept.read_bytes() == ours.read_bytes()
    assert main([*command, "--activation_ranges", str(ours), "--output_dir", str(tmp_path / "two")]) == 0
    for name in ("config.json", "rank0.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_nothing_is_measured_for_an_output_that_exists(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    command = ["--model_dir", str(model), "--smoothquant", "0.5", "--calib_dataset", str(text)]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 6
    assert "exists and is not empty" in capsys.readouterr().err and not (tmp_path / "out.ranges.safetensors").exists()
