"""Hidden states that stay on the device: the same ranges, saved only when that is due, and resumed from what was saved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from streamconv.calibration import states  # noqa: E402
from streamconv.calibration.layers import _runs  # noqa: E402
from streamconv.calibration.run import calibrate  # noqa: E402
from streamconv.calibration.scratch import Scratch  # noqa: E402
from streamconv.errors import OutputError, SourceChangedError  # noqa: E402
from tests.calibrate.test_streamed import model, text  # noqa: E402

__all__ = ["model", "text"]

pytestmark = pytest.mark.filterwarnings("ignore")


class Stopped(Exception):
    pass


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The CPU as the device that has room."""
    monkeypatch.setattr(states, "fit_on_device", lambda device, size: True)
    yield monkeypatch


def stop(layer: int, layers: int, left: float) -> None:
    raise Stopped


def scratch_of(out: Path) -> Path:
    return next(path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}"))


@pytest.mark.parametrize("often", [True, False])
def test_the_same_ranges(model: Path, text: Path, tmp_path: Path, on_device: pytest.MonkeyPatch, often: bool) -> None:
    if often:
        on_device.setattr(states, "_OVERHEAD", 0)
    kept, filed = tmp_path / "kept.safetensors", tmp_path / "filed.safetensors"
    calibrate(model, kept, str(text), max_length=16, batch_size=2, device="cpu")
    on_device.setattr(states, "fit_on_device", lambda device, size: False)
    calibrate(model, filed, str(text), max_length=16, batch_size=2, device="cpu")
    assert kept.read_bytes() == filed.read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("resumed_on_device", [True, False])
def test_resumes_where_they_were_saved(
    model: Path, text: Path, tmp_path: Path, on_device: pytest.MonkeyPatch, resumed_on_device: bool
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    calibrate(model, whole, str(text), max_length=16, device="cpu")
    on_device.setattr(states, "_OVERHEAD", 0)
    with pytest.raises(Stopped):
        calibrate(model, out, str(text), max_length=16, device="cpu", progress=stop)
    assert sorted(path.name for path in scratch_of(out).iterdir()) == ["ranges-1.safetensors", "state.json", "states-1"]
    on_device.setattr(states, "fit_on_device", lambda device, size: resumed_on_device)
    seen: list[int] = []
    calibrate(model, out, str(text), max_length=16, device="cpu", progress=lambda layer, layers, left: seen.append(layer))
    assert seen == [2]
    assert out.read_bytes() == whole.read_bytes()


def test_not_saved_before_it_is_due(model: Path, text: Path, tmp_path: Path, on_device: pytest.MonkeyPatch) -> None:
    on_device.setattr(states, "_GUESS", 1e-9)  # writing takes for ever
    out = tmp_path / "out.safetensors"
    with pytest.raises(Stopped):
        calibrate(model, out, str(text), max_length=16, device="cpu", progress=stop)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(f".{out.name}")]
    seen: list[int] = []
    calibrate(model, out, str(text), max_length=16, device="cpu", progress=lambda layer, layers, left: seen.append(layer))
    assert seen == [1, 2]


def test_a_full_device_is_explained(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamconv.calibration.layers import OneLayer
    from streamconv.errors import BudgetError

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(OneLayer, "load", full)
    with pytest.raises(BudgetError, match=r"the device ran out of memory in the calibration: .*2\.00 GiB\.") as raised:
        calibrate(model, tmp_path / "out.safetensors", str(text), max_length=16, device="cpu")
    assert "--device cpu" in (raised.value.hint or "")


def test_states_that_end_early(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "out", "mark", 64)
    files = states.Files(scratch, torch.float16, "cpu")
    with files.filling():
        files.put(torch.zeros(2, 4, dtype=torch.float16))
    with pytest.raises((SourceChangedError, OutputError), match="ends early"), files.layer(0):
        files.take((1, 3, 4))


@pytest.mark.parametrize("row_bytes", [64, 4096, 1 << 20, 8 << 20])
def test_rows_are_read_in_runs(row_bytes: int) -> None:
    rows = sorted(torch.randint(0, 3000, (700,)).unique().tolist())
    runs = list(_runs(rows, row_bytes))
    assert [place for begin, end in runs for place in range(begin, end)] == list(range(len(rows)))
    for begin, end in runs:
        assert (rows[end - 1] - rows[begin] + 1) * row_bytes <= max(4 << 20, row_bytes)
        assert all(b - a <= max(1, (64 << 10) // row_bytes) for a, b in zip(rows[begin : end - 1], rows[begin + 1 : end], strict=True))
    for (start, end), (begin, _) in itertools.pairwise(runs):  # no run ends without a reason
        far = rows[begin] - rows[end - 1] > max(1, (64 << 10) // row_bytes)
        assert far or (rows[begin] - rows[start] + 1) * row_bytes > (4 << 20)
