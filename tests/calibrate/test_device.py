"""Calibration on a GPU, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from streamconv.calibration.run import calibrate, torch_device  # noqa: E402
from streamconv.errors import UsageError  # noqa: E402
from tests.calibrate.test_streamed import model, text, whole  # noqa: E402

__all__ = ["model", "text"]

pytestmark = pytest.mark.filterwarnings("ignore")


def compare(model: Path, text: Path, out: Path, device: str) -> dict[str, Any]:
    """Ranges measured on a device must be those of hooks on the whole model there, bit for bit; gives what calibrate told."""
    told = calibrate(model, out, str(text), max_length=16, device=device)
    got, want = load_file(out), whole(model, text, torch.float16, told["device"])
    assert set(want) == {key for key in got if not key.endswith(".w")}
    for key, values in want.items():
        assert torch.equal(values.cpu(), got[key]), key
    return told


def test_auto_is_the_cpu_where_there_is_no_gpu(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compare(model, text, tmp_path / "r.safetensors", "auto")["device"] == "cpu"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda", "this machine has no CUDA devices"),
        ("cuda:1", "this machine has no CUDA devices"),
        ("cuda:0,cuda:1", "is not auto, cpu, cuda or cuda:N"),
        ("tpu", "is not auto, cpu, cuda or cuda:N"),
    ],
)
def test_no_such_device(monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=says):
        torch_device(name)


@pytest.mark.parametrize(("name", "means"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_names(monkeypatch: pytest.MonkeyPatch, name: str, means: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device(name) == means
