"""`streamconv.open`: every slice against the stock readers, and what is read and copied for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import streamconv
from streamconv.checkpoint.shard import Shard
from tests import tiny
from tests.unit import test_meta as meta

SHAPES = {"matrix": (7, 5), "cube": (3, 4, 6), "row": (9,), "scalar": (), "none": (0, 4), "one": (1, 1)}
TYPES = ("bfloat16", "float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2")


def weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    made = {}
    for kind in TYPES:
        for name, shape in SHAPES.items():
            values = torch.randint(0, 2 if kind == "bool" else 100, shape, generator=random)
            made[f"{kind}.{name}"] = values.to(getattr(torch, kind))
    return made


WEIGHTS = weights()
NAMES = sorted(WEIGHTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save_torch(WEIGHTS, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(tiny.config()))
    return made


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pickled")
    torch.save(WEIGHTS, made / "pytorch_model.bin")
    (made / "config.json").write_text(json.dumps(tiny.config()))
    return made


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[streamconv.Checkpoint]:
    with streamconv.open(folder) as checkpoint:
        yield checkpoint


@pytest.fixture(params=["folder", "file", "bin"])
def checkpoint(request: pytest.FixtureRequest, folder: Path, pickled: Path) -> Iterator[streamconv.Checkpoint]:
    place = {"folder": folder, "file": folder / "model.safetensors", "bin": pickled}[request.param]
    with streamconv.open(place) as opened:
        yield opened


def bits(tensor: torch.Tensor) -> Any:
    """Values that compare: NaN as well, and types that torch cannot compare."""
    unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tuple(tensor.shape), tensor.dtype, tensor.contiguous().view(unsigned).tolist()


def indices(shape: tuple[int, ...], negative_steps: bool = True) -> st.SearchStrategy[Any]:
    """Keys as people write them: ints, slices of any sign, an Ellipsis, fewer keys than dimensions."""
    steps = st.integers(-4, 4) if negative_steps else st.integers(1, 4)
    bounds = st.none() | st.integers(-12, 12)
    part = st.builds(slice, bounds, bounds, st.none() | steps.filter(bool))
    each = [part | st.integers(-size, size - 1) if size else part for size in shape]

    @st.composite
    def keys(draw: st.DrawFn) -> Any:
        count = draw(st.integers(0, len(shape)))
        at = draw(st.integers(0, count))
        dots = draw(st.booleans())
        chosen: list[Any] = [draw(one) for one in (each[:at] + each[len(shape) - count + at :] if dots else each[:count])]
        if dots:
            chosen.insert(at, ...)
        return chosen[0] if len(chosen) == 1 and draw(st.booleans()) else tuple(chosen)

    return keys()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_slices_are_those_of_numpy(opened: streamconv.Checkpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in NAMES if not name.startswith(("bfloat", "float8"))]))
    whole, lazy = WEIGHTS[name].numpy(), opened[name]
    for _ in range(data.draw(st.integers(1, 3))):  # slices of slices
        key = data.draw(indices(whole.shape))
        whole, lazy = np.asarray(whole[key]), lazy[key]
    found = lazy.numpy()
    assert lazy.shape == whole.shape and lazy.nbytes == whole.nbytes
    assert found.shape == whole.shape and found.dtype == whole.dtype and np.array_equal(found, whole)
    assert bits(lazy.torch()) == bits(torch.from_numpy(whole.copy()))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_slices_are_those_of_the_stock_reader(folder: Path, opened: streamconv.Checkpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in NAMES if WEIGHTS[name].dim()]))
    key = data.draw(indices(tuple(WEIGHTS[name].shape), negative_steps=False).filter(lambda key: key != ()))
    with safe_open(folder / "model.safetensors", "pt") as stock:
        try:
            wanted = stock.get_slice(name)[key]
        except Exception:  # its slices have no steps, and no Ellipsis in the middle
            wanted = stock.get_tensor(name)[key]
        assert bits(opened[name][key].torch()) == bits(wanted)


def test_every_tensor(checkpoint: streamconv.Checkpoint) -> None:
    assert set(checkpoint) == set(WEIGHTS) and len(checkpoint) == len(WEIGHTS)
    for name, wanted in WEIGHTS.items():
        lazy = checkpoint[name]
        assert lazy.shape == tuple(wanted.shape) and lazy.nbytes == wanted.nbytes
        assert bits(lazy.torch()) == bits(wanted)
        raw = lazy.numpy(raw=True)
        assert raw.dtype.kind == "u" and raw.tobytes() == wanted.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert checkpoint["bfloat16.cube"].dtype == "BF16" and checkpoint["float8_e4m3fn.cube"].dtype == "F8_E4M3"
    assert repr(checkpoint["bfloat16.cube"][1:, ::-2]) == "LazyTensor('bfloat16.cube', BF16, [2, 2, 6])"


def test_slices_of_a_pickle(pickled: Path) -> None:
    loaded = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    with streamconv.open(pickled) as opened:

        @given(st.data())
        @settings(max_examples=150, deadline=None)
        def compare(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(NAMES))
            key = data.draw(indices(tuple(WEIGHTS[name].shape), negative_steps=False))
            assert bits(opened[name][key].torch()) == bits(loaded[name][key])

        compare()


@pytest.fixture(scope="module", params=[(1, 0), (2, 0), (4, 0), (2, 1)])
def meta_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return meta.write(tmp_path_factory.mktemp("meta") / "model", *request.param)


def test_slices_of_a_meta_checkpoint(meta_folder: Path) -> None:
    """The files' tensors put together, rows or columns."""
    whole = meta.weights()
    with streamconv.open(meta_folder) as opened:

        @given(st.data())
        @settings(max_examples=100, deadline=None)
        def compare(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(sorted(whole)))
            key = data.draw(indices(tuple(whole[name].shape)))
            wanted = torch.from_numpy(np.array(whole[name].view(torch.int16).numpy()[key])).view(torch.bfloat16)
            assert bits(opened[name][key].torch()) == bits(wanted)

        compare()


def test_views_copy_nothing(checkpoint: streamconv.Checkpoint) -> None:
    lazy = checkpoint["float32.cube"]
    one, two = lazy.numpy(), lazy[1:].numpy()
    assert np.shares_memory(one, two) and np.shares_memory(one, lazy[:, ::-1, 3].numpy())
    aligned = one.flags.aligned
    assert not aligned or lazy.torch().data_ptr() == one.__array_interface__["data"][0]
    assert not one.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 0


def test_a_slice_reads_its_rows_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    view = Shard.view

    def seen(shard: Shard, begin: int, end: int) -> memoryview:
        asked.append(end - begin)
        return view(shard, begin, end)

    monkeypatch.setattr(Shard, "view", seen)
    with streamconv.open(folder) as opened:
        lazy = opened["float32.cube"]  # [3, 4, 6]
        for key, elements in [(1, 24), (slice(0, 2), 48), ((1, 2), 6), ((1, slice(1, 3)), 12), ((2, 1, 4), 1), ((slice(1), slice(2)), 12)]:
            part = lazy[key]
            assert not asked
            part.numpy()
            assert asked == [4 * elements], key
            asked.clear()


def test_columns_of_a_meta_checkpoint_come_from_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = meta.write(tmp_path / "model", 4), set[str]()
    view = Shard.view

    def seen(shard: Shard, begin: int, end: int) -> memoryview:
        read.add(shard.path.name)
        return view(shard, begin, end)

    monkeypatch.setattr(Shard, "view", seen)
    with streamconv.open(folder) as opened:
        wo = opened["layers.0.attention.wo.weight"]  # cut into 4 times 16 columns
        wo[:, 17:30].numpy(raw=True)
        assert read == {"consolidated.01.pth"}
        read.clear()
        wo[:, 63:10:-20].torch()
        assert read == {"consolidated.01.pth", "consolidated.02.pth", "consolidated.03.pth"}


def test_writing_to_a_torch_view_changes_no_file(folder: Path) -> None:
    """In a process of its own: a write to a read-only mapping would end it."""
    before = (folder / "model.safetensors").read_bytes()
    code = (
        "import streamconv, sys; tensor = streamconv.open(sys.argv[1])['bfloat16.cube'].torch(); before = tensor.clone();"
        "tensor.add_(1); assert not tensor.equal(before)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    """No memory is set aside for a mapping: a sparse file of 8 TiB, of which one row is read."""
    rows, cols = 1 << 27, 1 << 15
    header = json.dumps({"huge": {"dtype": "F16", "shape": [rows, cols], "data_offsets": [0, rows * cols * 2]}}).encode()
    with open(tmp_path / "huge.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + rows * cols * 2)
        except OSError:
            pytest.skip("this file system holds no file of that size")
    lazy = streamconv.open(tmp_path / "huge.safetensors")["huge"]
    assert lazy.nbytes == 1 << 43 and not lazy[-1].numpy().any()


def test_tensors_outlive_the_checkpoint(folder: Path) -> None:
    with streamconv.open(folder) as opened:
        lazy = opened["int32.matrix"]
        view = lazy.numpy()
    assert np.array_equal(view, WEIGHTS["int32.matrix"].numpy()) and np.array_equal(lazy.numpy(), view)


def test_a_file_that_shrank_is_an_error_and_no_crash(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model")
    opened = streamconv.open(model)
    (first, *_, last) = opened
    opened[first].numpy()
    with open(model / "model.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(streamconv.SourceChangedError, match=r"model\.safetensors"):
        opened[last].numpy()


def test_numpy_has_no_bfloat16(folder: Path) -> None:
    with streamconv.open(folder) as opened:
        for name in ("bfloat16.row", "float8_e4m3fn.row", "float8_e5m2.row"):
            with pytest.raises(streamconv.UsageError, match=r"numpy does not have .*torch\(\).*raw=True"):
                opened[name].numpy()
        with pytest.raises(streamconv.UsageError, match=r"torch\(\)"):
            np.asarray(opened["bfloat16.row"])
        assert np.array_equal(np.asarray(opened["int64.row"]), WEIGHTS["int64.row"].numpy())


NO_INDEX = [7, -8, (0, 5), (0, 0, 0), [0, 1], None, True, 1.0, "a", (..., ...), slice(None, None, 0), slice("a", None)]


@pytest.mark.parametrize("key", NO_INDEX)
def test_what_is_no_index_is_a_typed_error(folder: Path, key: Any) -> None:
    with streamconv.open(folder) as opened:
        with pytest.raises(streamconv.UsageError, match=r"float16\.matrix") as raised:
            opened["float16.matrix"][key]
        assert isinstance(raised.value, IndexError)


def test_python_loops_end(folder: Path) -> None:
    with streamconv.open(folder) as opened:
        lazy = opened["int64.matrix"]
        assert [part.shape for part in lazy] == [(5,)] * 7 and len(lazy) == 7
        assert lazy[np.int64(2), np.int32(1)].numpy() == WEIGHTS["int64.matrix"][2, 1].item()
        with pytest.raises(TypeError):
            len(opened["int64.scalar"])


def test_a_name_that_is_not_there(folder: Path) -> None:
    with streamconv.open(folder) as opened:
        with pytest.raises(streamconv.TensorError, match=r"no tensor int64\.matrxi.*did you mean int64\.matrix") as raised:
            opened["int64.matrxi"]
        assert isinstance(raised.value, KeyError)
        assert opened.get("nothing") is None and "nothing" not in opened and "int64" not in opened
        with pytest.raises(streamconv.TensorError):
            opened[3]  # type: ignore[index]


def test_a_file_alone_needs_no_config(tmp_path: Path) -> None:
    arrays = {"a.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for name in ("adapter_model.safetensors", "x.ranges.safetensors", "rank0.safetensors"):
        save_file(arrays, tmp_path / name)
        with streamconv.open(tmp_path / name) as opened:
            assert opened.config == {} and np.array_equal(opened["a.lora_A"].numpy(), arrays["a.lora_A"])
    with streamconv.open(str(tmp_path)) as opened:  # a folder without config.json
        assert list(opened) == ["a.lora_A"]


def test_names_are_those_of_the_files(tmp_path: Path) -> None:
    """A conversion takes wrappers off; a reader shows what is there."""
    model = tiny.write(tmp_path / "model", {f"_orig_mod.{name}": value for name, value in tiny.tensors().items()})
    with streamconv.open(model) as opened:
        assert all(name.startswith("_orig_mod.") for name in opened) and opened.config["hidden_size"] == tiny.HIDDEN


@pytest.mark.parametrize("model", ["nowhere", "no/such/folder", "."])
def test_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(streamconv.CheckpointError):
        streamconv.open(model)


@pytest.mark.parametrize("model", [None, 3, b"bytes", ["a"]])
def test_no_path(model: Any) -> None:
    with pytest.raises(streamconv.UsageError, match="model is"):
        streamconv.open(model)
