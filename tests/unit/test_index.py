"""Opening a source: which files count, and every way in which they can contradict each other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from streamconv.checkpoint import index as index_module
from streamconv.checkpoint import weight_files
from streamconv.checkpoint.index import nearest, open_index
from streamconv.checkpoint.weight_files import read_weight_map
from streamconv.errors import CheckpointError, HeaderError, TensorError


def _save(path: Path, *names: str) -> None:
    save_file({name: np.arange(6, dtype=np.float16).reshape(2, 3) for name in names}, path)


def _map(folder: Path, **files: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    _save(folder / "m-1.safetensors", "a", "b")
    _save(folder / "m-2.safetensors", "c")
    _map(folder, a="m-1.safetensors", b="m-1.safetensors", c="m-2.safetensors")
    return folder


def test_sharded(model: Path) -> None:
    with open_index(model) as index:
        assert index.config == {"model_type": "llama"} and index.root == model
        assert [shard.path.name for shard in index.shards] == ["m-1.safetensors", "m-2.safetensors"]
        assert list(index.tensors) == ["a", "b", "c"]
        record = index.tensors["b"]
        assert (record.dtype.name, record.shape, record.shard, record.nbytes) == ("F16", (2, 3), 0, 12)
        with index.shards[0].window(record.begin, record.begin + record.nbytes) as window:
            assert bytes(window) == np.arange(6, dtype=np.float16).tobytes()


def test_without_index_file(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    _save(model / "consolidated.safetensors", "a")
    _save(model / "consolidated-1.safetensors", "a")
    _save(model / ".hidden.safetensors", "a")
    with open_index(str(model)) as index:
        assert list(index.tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["consolidated.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_only_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    _save(tmp_path / name, "a")
    for path in (tmp_path, tmp_path / name):
        with open_index(path) as index:
            assert [shard.path.name for shard in index.shards] == [name]
            assert index.root == path


def test_tensor_in_two_files(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    _save(model / "m-3.safetensors", "b")
    with pytest.raises(TensorError, match=r"tensor b is in two files, m-1\.safetensors and m-3\.safetensors"):
        open_index(model)


MAPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "in another shard": ({"b": "m-2.safetensors"}, TensorError, "tensor b is in m-1.safetensors, but .* m-2"),
    "shard missing": ({"c": "m-9.safetensors"}, CheckpointError, r"missing file m-9\.safetensors"),
    "not a string": ({"c": 1}, CheckpointError, "must map"),
    "absolute": ({"c": "/etc/x.safetensors"}, CheckpointError, "plain file name"),
    "parent": ({"c": "../m-2.safetensors"}, CheckpointError, "plain file name"),
    "only dots": ({"c": ".."}, CheckpointError, "plain file name"),
    "empty": ({"c": ""}, CheckpointError, "plain file name"),
    "folder": ({"c": "sub/m-2.safetensors"}, CheckpointError, "plain file name"),
    "backslash": ({"c": "..\\m-2.safetensors"}, CheckpointError, "plain file name"),
    "drive": ({"c": "C:m-2.safetensors"}, CheckpointError, "plain file name"),
    "NUL": ({"c": "m-2\0.safetensors"}, CheckpointError, "plain file name"),
    "newline": ({"c": "m-2\n.safetensors"}, CheckpointError, "plain file name"),
    "surrogate": ({"c": "\ud800.safetensors"}, CheckpointError, "file"),
    "long": ({"c": "m" * 300 + ".safetensors"}, CheckpointError, "plain file name"),
    "other kind": ({"c": "config.json"}, CheckpointError, "not a .safetensors file"),
}


@pytest.mark.parametrize("case", MAPS)
def test_bad_index_file(model: Path, case: str) -> None:
    change, kind, message = MAPS[case]
    files: dict[str, Any] = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"} | change
    _map(model, **files)
    with pytest.raises(kind, match=message) as caught:
        open_index(model)
    assert "\n" not in str(caught.value)


def test_the_files_count_and_not_the_index_file(model: Path) -> None:
    _map(model, a="m-1.safetensors", c="m-2.safetensors", d="m-2.safetensors")
    with open_index(model) as index:
        assert list(index.tensors) == ["a", "b", "c"]
        assert index.unlisted == {"b"} and index.absent == ("d",)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff", "[" * 100_000]
)
def test_index_file_is_no_map(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_index(model)


@pytest.mark.parametrize("text", ["", "[]", "{", "1" * 5000, "\xff", "[" * 100_000, '{"a":' * 100_000])
def test_bad_config(model: Path, text: str) -> None:
    (model / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_index(model)


def test_config_too_large_or_no_file(model: Path) -> None:
    config = model / "config.json"
    os.truncate(config, 1 << 40)
    with pytest.raises(CheckpointError, match="at most"):
        open_index(model)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(CheckpointError, match="a FIFO"):
        open_index(model)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"missing config\.json"):
        open_index(model)


def test_links(model: Path, tmp_path: Path) -> None:
    (model / "m-2.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "m-2.safetensors").symlink_to("../elsewhere.safetensors")
    with open_index(model) as index:
        assert index.notes == (f"m-2.safetensors is a link to {tmp_path / 'elsewhere.safetensors'}",)
    (model / "m-2.safetensors").unlink()
    (model / "m-2.safetensors").symlink_to("real")
    with pytest.raises(CheckpointError, match="broken link"):
        open_index(model)
    (tmp_path / "elsewhere.safetensors").rename(model / "real")
    with open_index(model) as index:
        assert index.notes == ()
    (tmp_path / "alias").symlink_to(model)
    open_index(tmp_path / "alias").close()


def test_hub_cache(model: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--x--y"
    revision = hub / "snapshots" / "0123"
    revision.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(hub / "blobs" / f"hash{number}")
        (revision / file.name).symlink_to(f"../../blobs/hash{number}")
    with open_index(revision) as index:
        assert len(index.tensors) == 3 and index.shards[1].path.name == "m-2.safetensors"


def test_nothing_to_read(tmp_path: Path) -> None:
    for path, message in [(tmp_path / "no", "no such"), (tmp_path, "missing config.json")]:
        with pytest.raises(CheckpointError, match=message):
            open_index(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        open_index(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder"):
        open_index(tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        open_index(tmp_path)
    (tmp_path / "alone").mkdir()
    _save(tmp_path / "alone" / "m.safetensors", "a")
    with pytest.raises(CheckpointError, match=r"missing config\.json beside"):
        open_index(tmp_path / "alone" / "m.safetensors")


def test_bad_shards_leave_nothing_open(model: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (model / "m-2.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(HeaderError, match=r"m-2\.safetensors"):
        open_index(model)
    (model / "m-2.safetensors").unlink()
    os.mkfifo(model / "m-2.safetensors")
    with pytest.raises(CheckpointError, match="a FIFO"):
        open_index(model)
    assert len(os.listdir("/proc/self/fd")) == before


def test_weights_are_not_read(tmp_path: Path) -> None:
    from streamconv.checkpoint.dtypes import F16
    from tests.headers import build_header

    header, places = build_header([("a", F16, (1 << 20, 1 << 18))])
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.safetensors").write_bytes(header)
    os.truncate(tmp_path / "m.safetensors", places["a"][1])  # half a terabyte, no block of it on the disk
    before = _read_by_this_process()
    open_index(tmp_path).close()
    assert _read_by_this_process() - before < 1 << 20


def _read_by_this_process() -> int:
    """Bytes, of files and of anything else."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_nearest() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(200) for j in range(1000)]
    assert nearest("model.layers.7.mlp.experts.33.up_projj.weight", names) == names[7033]
    assert nearest("model.norm.weight", ["model.normm.weight", "x"]) == "model.normm.weight"
    assert nearest("q", ["something.else"]) is None and nearest("q", []) is None


@pytest.mark.parametrize("other", ["model-1.safetensors", "model-2.safetensors"])
def test_a_tensor_listed_twice_in_the_index_file_is_refused_by_name(tmp_path: Path, other: str) -> None:
    (tmp_path / "model-1.safetensors").touch()
    (tmp_path / "model-2.safetensors").touch()
    listed = tmp_path / "model.safetensors.index.json"
    text = '{"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"%s}}'
    listed.write_text(text % "")
    assert list(read_weight_map(listed)) == ["a.weight", "b.weight"]
    listed.write_text(text % f', "a.weight": "{other}"')
    with pytest.raises(TensorError, match=r"index\.json lists '?a\.weight'? twice"):
        read_weight_map(listed)


def test_limits_of_the_whole_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_TENSORS", 2)
    with pytest.raises(CheckpointError, match="over 2 tensors, which is streamconv's own limit"):
        open_index(model)
    for module in (index_module, weight_files):
        monkeypatch.setattr(module, "MAX_FILES", 1)
    with pytest.raises(CheckpointError, match="names 2 files, above streamconv's own limit of 1"):
        open_index(model)
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="has 2 weight files, above streamconv's own limit of 1"):
        open_index(model)
    monkeypatch.undo()
    open_index(model).close()
