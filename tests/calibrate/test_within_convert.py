"""`convert --text`: the ranges are measured on the way, kept beside the output, and not measured twice."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import psutil

from streamconv import verbs
from streamconv.calibration.child import calibrate_apart
from streamconv.calibration.run import calibrate
from streamconv.cli.main import main
from streamconv.progress import Progress
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.calibrate.test_streamed import model, text

__all__ = ["model", "text"]

pytestmark = pytest.mark.filterwarnings("ignore")
FILES = ("config.json", "rank0.safetensors")
SIZES = ["--samples", "4", "--max-length", "16"]


def test_the_bytes_are_those_of_two_steps(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, ranges = tmp_path / "one", tmp_path / "two", tmp_path / "r.safetensors"
    assert main(["convert", str(model), str(one), "--quant", "smoothquant", "--text", str(text), *SIZES]) == 0
    err = capsys.readouterr().err
    assert "layer 2 of 2" in err and "activation ranges from 4 samples, measured in" in err
    assert main(["calibrate", str(model), "-o", str(ranges), "--text", str(text), *SIZES]) == 0
    assert main(["convert", str(model), str(two), "--quant", "smoothquant", "--activation-ranges", str(ranges)]) == 0
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.slow
def test_nothing_is_measured_twice(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(model), str(tmp_path / "out"), "--kv-cache", "int8", "--force", "--text", str(text), *SIZES]
    assert main(command) == 0
    kept = tmp_path / "out.ranges.safetensors"
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert "measured before" in capsys.readouterr().err and kept.stat().st_mtime_ns == before
    text.write_text(text.read_text() + " w5")  # the last sample is not among the first four
    assert main(command) == 0 and kept.stat().st_mtime_ns == before
    text.write_text("w7 w8 " + text.read_text())
    assert main(command) == 0 and kept.stat().st_mtime_ns > before


def test_goes_on_after_the_layer_it_was_stopped_in(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(model), str(tmp_path / "out"), "--kv-cache", "int8", "--text", str(text), *SIZES]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    asked = {"samples": 4, "max_length": 16, "dtype": "auto"}
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path / "out.ranges.safetensors", str(text), progress=stop, **asked)
    assert (tmp_path / ".out.ranges.safetensors.streamconv-calibrate" / "states-1").exists()
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "layer 1 of 2" not in err and "layer 2 of 2" in err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_an_interrupt_ends_the_child(model: Path, text: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())  # a warm interpreter of other tests
    with pytest.raises(KeyboardInterrupt):
        calibrate_apart({"model": str(model), "out": str(tmp_path / "r.safetensors"), "text": str(text)}, stop)
    assert not set(psutil.Process().children()) - before


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--quant", "smoothquant"], 2, "--text FILE measures them now; or run `streamconv calibrate"),
        (["--text", "TEXT"], 2, "--text is for"),
        (["--quant", "smoothquant", "--text", "TEXT", "--activation-ranges", "x"], 2, "exclude each other"),
        (["--quant", "smoothquant", "--text", "TEXT", "--tp-size", "4"], 4, "more than num_key_value_heads 2"),
        (["--quant", "smoothquant", "--text", "TEXT", "--memory-budget", "100MiB"], 5, "calibration takes about"),
        (["--quant", "smoothquant", "--text", "TEXT", "--device", "cuda:99"], 2, "--device cuda:99: this machine has"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, says: str
) -> None:
    flags = [str(text) if flag == "TEXT" else flag for flag in flags]
    assert main(["convert", str(model), str(tmp_path / "out"), *flags]) == status
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_the_function_measures_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    report = verbs.calibrate(model, one, text, samples=4, max_length=16, watch=seen.append)
    calibrate(model, two, str(text), samples=4, max_length=16)
    assert one.read_bytes() == two.read_bytes()
    assert (report.out, report.samples, report.layers, report.device) == (str(one), 4, 2, "cpu") and report.tensors > 0
    assert [(now.phase, now.done, now.total, now.unit) for now in seen] == [
        ("calibrating", 1, 2, "layers"),
        ("calibrating", 2, 2, "layers"),
        ("done", 2, 2, "layers"),
    ]
    target = TensorRTLLM(quant="smoothquant", activation_ranges=report.out)
    assert verbs.convert(model, tmp_path / "out", target).files == 1
