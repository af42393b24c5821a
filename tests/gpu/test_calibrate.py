"""Ranges measured on a device: those of hooks on the whole model there, bit for bit, from graphs too; those of the CPU within rounding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from streamconv.calibration import states  # noqa: E402
from streamconv.calibration.graphs import Graphs  # noqa: E402
from streamconv.calibration.maxima import Maxima  # noqa: E402
from streamconv.calibration.run import calibrate  # noqa: E402
from streamconv.cli.main import main  # noqa: E402
from streamconv.errors import BudgetError  # noqa: E402
from tests.calibrate.test_device import compare  # noqa: E402
from tests.calibrate.test_streamed import KINDS, become, model, text  # noqa: E402

__all__ = ["model", "text"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A place that keeps every graph that is made."""
    made: list[Any] = []
    capture = Graphs._capture

    def kept(self: Graphs, *arguments: Any) -> Any:
        made.append(capture(self, *arguments))
        return made[-1]

    monkeypatch.setattr(Graphs, "_capture", kept)
    return made


def test_ranges_near_those_of_the_cpu(model: Path, text: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("room", [True, False])
def test_equal_to_hooks_on_the_whole_model(
    model: Path, text: Path, tmp_path: Path, captured: list[Any], monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    text.write_text("\n\n".join([text.read_text()] * 3))  # shapes come often
    if not room:
        monkeypatch.setattr(states, "fit_on_device", lambda device, size: False)
    assert compare(model, text, tmp_path / "r.safetensors", "auto")["device"] == "cuda:0"
    assert len(captured) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_scale_their_embedding_or_mix_layers(
    model: Path, text: Path, tmp_path: Path, captured: list[Any], kind: str
) -> None:
    text.write_text("\n\n".join([text.read_text()] * 5))
    become(model, kind)
    compare(model, text, tmp_path / "r.safetensors", "cuda:0")
    assert len(captured) >= 2  # layer 0 has its own


def test_resumes(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stop(layer: int, layers: int, left: float) -> None:
        raise Stopped

    monkeypatch.setattr(states, "_OVERHEAD", 0)
    with pytest.raises(Stopped):
        calibrate(model, tmp_path / "r.safetensors", str(text), max_length=16, device="cuda:0", progress=stop)
    compare(model, text, tmp_path / "r.safetensors", "cuda:0")


def test_what_a_capture_forbids_runs_plainly(captured: list[Any]) -> None:
    # no random numbers on the device: a broken capture leaves its generator unusable, and no layer draws any
    values = torch.arange(-16.0, 16.0).reshape(1, 8, 4).to("cuda:0")
    graphs = Graphs("cuda:0", Counter({(1, 8): 100}))
    for add in (0, 1, 2, -3, -4):
        made = graphs.run(lambda x: x * 2 if x.sum().item() > 0 else x * 3, values + add, 0)
        assert torch.equal(made, (values + add) * (2 if add > 0 else 3)), add
    assert captured == []
    fresh = Graphs("cuda:0", Counter({(1, 8): 100}))
    for number in range(5):  # the device is well: another capture succeeds
        assert torch.equal(fresh.run(lambda x: x + 1, values * number, 0), values * number + 1)
    assert len(captured) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_maxima(dtype: str) -> None:
    """Against the definition of the official loop, with infinities, not-a-numbers and zeros of both signs."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).to("cuda:0", getattr(torch, dtype))
    maxima = Maxima(layer)
    inputs = [torch.randn(3, 17, 64).to("cuda:0", getattr(torch, dtype)) for _ in range(3)]
    inputs[1][0, 0, 5], inputs[2][1, 3, 6] = float("-inf"), float("nan")
    for values in inputs:
        values[..., 7] = -0.0
    with torch.no_grad():
        outputs = [layer(values) for values in inputs]
    for end, values in (("x", inputs), ("y", outputs)):
        want = torch.cat([v.reshape(-1, v.shape[-1]) for v in values]).abs().max(dim=0)[0].float().cpu()
        got = maxima.told(lambda name: f"m.{name}")[f"m.0.{end}"]
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(-1), want.nan_to_num(-1))
        assert not got.signbit().any()
    want = layer[0].weight.detach().abs().max(dim=1)[0].float().cpu()
    assert torch.equal(maxima.told(lambda name: f"m.{name}")["m.0.w"], want)
    maxima.clear()
    assert not maxima.told(lambda name: f"m.{name}")["m.0.x"].any()


def test_a_full_device(model: Path, text: Path, tmp_path: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(1e-6)
    torch.cuda.empty_cache()
    try:
        with pytest.raises(BudgetError, match="ran out of memory in the calibration"):
            calibrate(model, tmp_path / "r.safetensors", str(text), max_length=16, device="cuda:0")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    compare(model, text, tmp_path / "r.safetensors", "cuda:0")
