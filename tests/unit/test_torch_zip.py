"""PyTorch zip checkpoints: the same tensors as torch.load finds, and nothing executed whatever the file says."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from streamconv.checkpoint.dtypes import DTYPES
from streamconv.checkpoint.pickle_records import read_pickle
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.torch_zip import read_torch
from streamconv.errors import CheckpointError, TensorError
from streamconv.memory import peak_resident

PROTOCOLS = [2, 3, 4, 5]


def check_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor's bytes, as found through the records, are torch's."""
    with Shard(path) as shard:
        tensors = read_torch(shard).tensors
        assert list(tensors) == list(expected)
        for name, record in tensors.items():
            value = expected[name]
            assert getattr(torch, record.dtype.torch) == value.dtype
            assert record.shape == tuple(value.shape)
            with shard.window(record.begin, record.begin + record.nbytes) as window:
                wanted = value.detach().contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0)
                assert bytes(window) == bytes(wanted.to(torch.uint8).tolist()), name


def save(path: Path, value: Any, **more: Any) -> Path:
    torch.save(value, str(path), **more)
    return path


def loaded(path: Path) -> Any:
    return torch.load(str(path), weights_only=True)


def random_of(dtype: torch.dtype) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    top = 2 if dtype == torch.bool else 256
    return torch.randint(0, top, (3, 4 * size), dtype=torch.uint8).view(dtype).reshape(3, -1)


# ---- what torch writes


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_dtype(tmp_path: Path, protocol: int) -> None:
    state = {name: random_of(getattr(torch, dtype.torch)) for name, dtype in DTYPES.items()}
    state |= {"scalar": torch.tensor(7.5), "empty": torch.zeros(0, 5), "vector": torch.arange(9)}
    path = save(tmp_path / "m.bin", state, pickle_protocol=protocol)
    check_same(path, loaded(path) if protocol < 4 else state)  # torch's own safe reader stops at protocol 3


def test_shared_storages_and_views(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    module = torch.nn.Linear(10, 3, dtype=torch.bfloat16)
    state = collections.OrderedDict(module.state_dict())  # has _metadata in its own pickle
    state["all"], state["rows"], state["again"] = base, base[2:4], base
    state["parameter"] = torch.nn.Parameter(base.half(), requires_grad=False)
    state["thin"] = base[:1, 3:7]  # stride 10, but of one row only
    state["one"] = torch.randn(5, 1).T
    path = save(tmp_path / "m.bin", state)
    check_same(path, loaded(path))
    check_same(save(tmp_path / "module.bin", module.state_dict()), module.state_dict())


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_wrapped(tmp_path: Path, key: str) -> None:
    state = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    path = save(tmp_path / "m.pth", {"epoch": 3, "lr": [0.5, None], key: state, "optimizer": {"exp": torch.ones(2)}})
    check_same(path, state)


def test_numbers_beside_tensors_are_left(tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", {"a": torch.ones(2), "step": 12345678901234567890, "note": "x", "ids": [1, 2]})
    check_same(path, {"a": torch.ones(2)})


def test_many_tensors(tmp_path: Path) -> None:
    state = {f"model.layers.{i}.weight": torch.full((4, 4), float(i)) for i in range(3000)}
    path = save(tmp_path / "m.bin", state)
    with Shard(path) as shard:
        assert len(read_torch(shard).tensors) == 3000


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.ones(3, 4).T}, r"w: shape \[4, 3\] with strides \[1, 4\] is not contiguous"),
        ({"w": torch.ones(3).expand(2, 3)}, "not contiguous"),
        ({"w": torch.ones(3), "more": {"x": torch.ones(1)}}, "more holds more tensors, nested"),
        ({"w": torch.ones(3), "more": [(torch.ones(1),)]}, "more holds more tensors, nested"),
        ({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, "both model and state_dict"),
        ({3: torch.ones(3)}, "3 is not a tensor name"),
        ({"a": 1}, "no tensors under names"),
        (torch.ones(3), "no dict of tensors"),
        ([torch.ones(3)], "no dict of tensors"),
        ({"w": torch.ones(3, dtype=torch.complex64)}, r"torch\.ComplexFloatStorage"),
        ({"w": torch.ones(3).to_sparse()}, r"_rebuild_sparse_tensor"),
        ({"w": torch.ones(3), ("a", 1): 2}, "a tuple as a key"),
    ],
)
def test_states_that_are_refused(tmp_path: Path, state: Any, message: str) -> None:
    path = save(tmp_path / "m.bin", state)
    with Shard(path) as shard, pytest.raises(CheckpointError, match=message):
        read_torch(shard)


def test_old_formats(tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with Shard(path) as shard, pytest.raises(CheckpointError, match=r"before 1\.6"):
        read_torch(shard)


# ---- zips that torch did not write


def rewritten(source: Path, target: Path, **changes: bytes | None) -> Path:
    """The zip with some entries (by last component) replaced, or left out (None); stored."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            last = info.filename.rsplit("/", 1)[1].replace(".pkl", "")
            data = changes[last] if last in changes else old.read(info)
            if data is not None:
                new.writestr(info.filename, data)
    return target


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save(tmp_path / "good.bin", {"w": torch.arange(12.0).reshape(3, 4)})


def refused(path: Path) -> str:
    with Shard(path) as shard, pytest.raises(CheckpointError) as error:
        read_torch(shard)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rewritten_by_another_program(good: Path, tmp_path: Path) -> None:
    check_same(rewritten(good, tmp_path / "same.bin"), {"w": torch.arange(12.0).reshape(3, 4)})


def test_byteorder(good: Path, tmp_path: Path) -> None:
    assert "byteorder big" in refused(rewritten(good, tmp_path / "m.bin", byteorder=b"big"))


@pytest.mark.parametrize("data", [b"", bytes(47), bytes(49), bytes(96)])
def test_storage_sizes_that_lie(good: Path, tmp_path: Path, data: bytes) -> None:
    path = rewritten(good, tmp_path / "m.bin", **{"0": data})
    with Shard(path) as shard, pytest.raises(TensorError, match=r"w: data\.pkl says 48 bytes"):
        read_torch(shard)


def test_entries_missing(good: Path, tmp_path: Path) -> None:
    assert "names the storage 0" in refused(rewritten(good, tmp_path / "a.bin", **{"0": None}))
    assert "without a data.pkl" in refused(rewritten(good, tmp_path / "b.bin", data=None))


def test_compressed(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert "compressed" in refused(path)


def patched(good: Path, path: Path, mark: bytes, entry: str, offset: int, value: bytes) -> Path:
    """Bytes at an offset from the header (directory or local, by its mark) of one entry replaced."""
    content = bytearray(good.read_bytes())
    named = 46 if mark == b"PK\x01\x02" else 30
    at = -1
    while True:
        at = content.index(mark, at + 1)
        length = struct.unpack_from("<H", content, at + named - (18 if named == 46 else 4))[0]
        if content[at + named : at + named + length].endswith(entry.encode()):
            break
    content[at + offset : at + offset + len(value)] = value
    path.write_bytes(content)
    return path


DIRECTORY, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


@pytest.mark.parametrize(
    ("mark", "offset", "value", "message"),
    [
        (DIRECTORY, 8, b"\x01\x00", "encrypted"),
        (DIRECTORY, 10, b"\x08\x00", "compressed"),
        (DIRECTORY, 20, struct.pack("<I", 40), "compressed"),
        (DIRECTORY, 20, struct.pack("<II", 1 << 30, 1 << 30), "does not lie where"),
        (DIRECTORY, 20, struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF), "not a whole zip"),
        (DIRECTORY, 42, struct.pack("<I", 0), "has another name"),
        (DIRECTORY, 42, struct.pack("<I", 1), "does not lie where"),
        (DIRECTORY, 42, struct.pack("<I", 0xFFFFFFF0), "not a whole zip"),
        (LOCAL, 8, b"\x08\x00", "does not lie where"),
        (LOCAL, 28, b"\xff\xff", "does not lie where"),
    ],
)
def test_headers_that_lie(
    good: Path, tmp_path: Path, mark: bytes, offset: int, value: bytes, message: str
) -> None:
    assert message in refused(patched(good, tmp_path / "m.bin", mark, "data/0", offset, value))


def test_an_entry_twice(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(good.read_bytes())
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(file.namelist()[0], b"x")
    assert "twice" in refused(path)


def test_truncated_anywhere(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    path = tmp_path / "m.bin"
    for size in [*range(0, 100), *range(100, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:size])
        refused(path)


def test_a_flipped_byte_is_an_error_or_no_matter(good: Path, tmp_path: Path) -> None:
    """Whatever byte is broken: a typed error, or a tensor of 48 bytes that lie in the file."""
    content = good.read_bytes()
    path = tmp_path / "m.bin"
    for at in range(0, len(content)):
        broken = bytearray(content)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        with Shard(path) as shard:
            try:
                found = read_torch(shard).tensors
            except CheckpointError:
                continue
            assert all(t.begin >= 0 and t.begin + t.nbytes <= len(content) for t in found.values())


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"x" * 1000, b"version https://git-lfs.github.com/spec/v1"])
def test_no_zip_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    refused(path)


def test_zip64(good: Path, tmp_path: Path) -> None:
    """The directory's sizes and offsets in 64 bits, as a file of more than 4 GB has them."""
    content = good.read_bytes()
    with zipfile.ZipFile(good) as file:
        infos = file.infolist()
    begin = content.index(DIRECTORY)
    directory = b""
    for info in infos:
        name = info.filename.encode()
        ones, extra = 0xFFFFFFFF, struct.pack("<HHQQQ", 1, 24, info.file_size, info.file_size, info.header_offset)
        fields = (DIRECTORY, 45, 45, 0, 0, 0, 0, info.CRC, ones, ones, len(name), len(extra), 0, 0, 0, 0, ones)
        directory += struct.pack("<4s6H3I5H2I", *fields) + name + extra
    end = begin + len(directory)
    tail = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, len(infos), len(infos), len(directory), begin)
    tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    tail += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "m.bin"
    path.write_bytes(content[:begin] + directory + tail)
    check_same(path, loaded(path))
    path.write_bytes(content[:begin] + directory[:-1] + b"\xff" + tail)
    refused(path)


# ---- hostile pickles


class Runs:
    """Its pickle calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def with_pickle(good: Path, path: Path, data: bytes) -> Path:
    return rewritten(good, path, data=data)


@pytest.mark.parametrize("protocol", [0, 1, *PROTOCOLS])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.system, "touch {mark}"), "system"),
        ((eval, "open('{mark}', 'w')"), "eval"),
        ((exec, "open('{mark}', 'w')"), "exec"),
        ((open, "{mark}", "w"), "open"),
        ((getattr, Runs(__import__, "os"), "system"), "(getattr|__import__)"),
        ((torch.load, "{mark}"), r"torch.*load"),
        ((torch.zeros, 3), "(torch|getattr)"),
        ((torch.Tensor,), "torch"),
    ],
)
def test_nothing_is_executed(
    good: Path, tmp_path: Path, protocol: int, call: tuple[Any, ...], name: str
) -> None:
    mark = tmp_path / "mark"
    call = tuple(part.format(mark=mark) if isinstance(part, str) else part for part in call)
    data = pickle.dumps({"w": [Runs(*call)]}, protocol)
    message = refused(with_pickle(good, tmp_path / "m.bin", data))
    assert not mark.exists()
    if protocol >= 2:
        with Shard(tmp_path / "m.bin") as shard, pytest.raises(CheckpointError, match=f"uses [a-z_.]*{name}"):
            read_torch(shard)
    assert "data.pkl" in message


def test_everything_else_that_calls_or_loads() -> None:
    for data in (
        b"\x80\x02(cos\nsystem\nS'x'\no.",
        b"\x80\x02(S'x'\nios\nsystem\n.",
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n__builtins__\n.",
        b"\x80\x02ctorch\nhub.load\n.",
        b"\x80\x02}}b0}ccollections\nOrderedDict\n}b.",
        b"\x80\x02Pstorage\n.",
    ):
        with pytest.raises(CheckpointError):
            read_pickle(data, "m.bin", 1000)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # the C unpickler takes 16 GB for this memo
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        b"\x80\x04\x8e\xff\xff\xff\xff\x7f\x00\x00\x00x.",
        b"\x80\x04\x8d\xff\xff\xff\xff\x7f\x00\x00\x00x.",
        b"\x80\x02\x8b\xff\xff\xff\x7fx.",
        b"\x80\x02" + b"(" * 1_000_000 + b".",
        b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",  # a key whose hash overflows the stack
        b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 100 + b"Ns.",  # a key whose hash takes 2^100 steps
        b"\x80\x02}X\x01\x00\x00\x00w)q\x00" + b"h\x00\x86q\x00" * 100 + b"s.",  # a value that a walk would take as long for
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}" + b"N0" * 3_000_000 + b".",
    ],
    ids=range(12),
)
def test_hostile_sizes_take_no_memory(good: Path, tmp_path: Path, data: bytes) -> None:
    before = peak_resident()
    refused(with_pickle(good, tmp_path / "m.bin", data))
    assert peak_resident() - before < 300 << 20


def test_a_huge_pickle_is_not_read(good: Path, tmp_path: Path) -> None:
    path = with_pickle(good, tmp_path / "m.bin", bytes(65 << 20))
    assert "at most" in refused(path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((3, 4), (4, 1), 1),
        ((4, 4), (4, 1), 0),
        ((3, 4), (1, 3), 0),
        ((3, 4), (0, 0), 0),
        ((12,), (1,), 1 << 62),
        ((1 << 62, 1 << 62), (1 << 62, 1), 0),
        ((-3, -4), (-4, 1), 0),
        ((3, 4), (4,), 0),
        ((3, 4), (4, 1), -1),
        ((1,) * 65, (1,) * 65, 0),
    ],
)
def test_views_outside_of_the_storage(
    good: Path, tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    with zipfile.ZipFile(good) as file:
        data = file.read("good/data.pkl")
    old = b"K\x00K\x03K\x04\x86q\x08K\x04K\x01\x86"
    assert data.count(old) == 1
    new = b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, shape, strides))
    refused(with_pickle(good, tmp_path / "m.bin", data.replace(old, new)))
