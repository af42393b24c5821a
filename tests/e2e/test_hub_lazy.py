"""`streamconv.open` of a Hub model: headers and the bytes of what is used, by range requests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.e2e.hub_run import cached, hub, python, run, weights
from tests.e2e.hub_server import REPO, Hub

__all__ = ["hub"]  # the fixture

NAME = "model.layers.1.mlp.gate_proj.weight"  # float16, [256, 128]
READ = f"""
import sys, numpy, streamconv
lazy = streamconv.open({REPO!r})[{NAME!r}]
part = eval("lazy[" + sys.argv[1] + "]")
numpy.save("part.npy", part.numpy())
"""
WITH_TORCH = READ + "assert part.torch().tolist() == part.numpy().tolist()\n"


def ranges(hub: Hub) -> list[tuple[int, int]]:
    """What was asked of the file that holds the tensor, after its header."""
    index = json.loads((hub.folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"][NAME]
    asked = [told.removeprefix("bytes=").split("-") for name, told in hub.ranges if name.endswith(file)]
    return [(int(begin), int(end) + 1) for begin, end in asked if int(begin)]


SLICES = [("200:100:-7, 3:5", 99), ("5, 7", 0), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("10:20", 10), ("-1", 1)))]


@pytest.mark.parametrize(("key", "rows"), SLICES)
def test_a_slice_asks_for_its_rows(hub: Hub, tmp_path: Path, key: str, rows: int) -> None:
    done = python(hub, tmp_path, "-c", WITH_TORCH if rows else READ, key)
    assert done.returncode == 0, done.stderr
    wanted = eval(f"tiny.tensors()[{NAME!r}][{key}]")
    assert np.array_equal(np.load(tmp_path / "part.npy"), wanted)
    sizes = {end - begin for begin, end in ranges(hub)}
    assert len(sizes) == 1 and sizes.pop() <= max(rows * 256, 2)
    assert not weights(hub.whole) and not cached(tmp_path)


def test_what_is_in_the_cache_is_mapped(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "convert", REPO, "out", "--quiet").returncode == 0
    asked = len(hub.ranges)
    code = READ + f"assert numpy.shares_memory(lazy.numpy(), streamconv.open({REPO!r})[{NAME!r}].numpy()) is False\n"
    code += "assert numpy.shares_memory(lazy.numpy(), lazy[3:].numpy())\n"
    done = python(hub, tmp_path, "-c", code, "::2", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "part.npy"), tiny.tensors()[NAME][::2]) and len(hub.ranges) == asked


def test_large_requests_are_cut(hub: Hub, tmp_path: Path) -> None:
    code = "import streamconv.hub.shard as shard; shard._REQUEST = 10_000\n" + READ
    done = python(hub, tmp_path, "-c", code, ":")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "part.npy"), tiny.tensors()[NAME])
    assert max(end - begin for begin, end in ranges(hub)) == 10_000


def test_pickles_by_ranges(hub: Hub, tmp_path: Path) -> None:
    for path in (*hub.folder.glob("*.safetensors"), hub.folder / "model.safetensors.index.json"):
        path.unlink()
    torch.save({name: torch.from_numpy(value) for name, value in tiny.tensors().items()}, hub.folder / "pytorch_model.bin")
    done = python(hub, tmp_path, "-c", READ, "3:5")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "part.npy"), tiny.tensors()[NAME][3:5]) and not weights(hub.whole)


def test_no_such_model(hub: Hub, tmp_path: Path) -> None:
    code = "import streamconv\ntry:\n    streamconv.open('no/model')\nexcept streamconv.HubError as error:\n    print(error)"
    done = python(hub, tmp_path, "-c", code)
    assert done.returncode == 0 and "no/model" in done.stdout, done.stderr
