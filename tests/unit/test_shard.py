"""Source files: exact reads, and a file that changes is an error and never a crash."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import posix
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from streamconv.checkpoint.shard import Shard
from streamconv.cli.main import main
from streamconv.errors import CheckpointError, SourceChangedError
from tests import tiny

DATA = bytes(i * 7 % 251 for i in range(100_000))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.safetensors").write_bytes(DATA)
    return tmp_path / "a.safetensors"


def test_opens_lazily(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "missing.safetensors")
    shard.close()
    with pytest.raises(CheckpointError, match=r"missing file .*missing\.safetensors"):
        _ = shard.size


def test_window_is_exact_and_read_only(path: Path) -> None:
    with Shard(path) as shard:
        for begin, end in [(0, 8), (4095, 4097), (5, 5), (0, len(DATA))]:
            with shard.window(begin, end) as window:
                assert window == DATA[begin:end]
                assert window.readonly and window.contiguous
        assert shard.size == len(DATA)


def test_read_into(path: Path) -> None:
    with Shard(path) as shard:
        buffer = bytearray(1000)
        shard.read_into(500, memoryview(buffer)[10:110])
        assert buffer[10:110] == DATA[500:600] and not any(buffer[:10]) and not any(buffer[110:])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(0, 9), st.integers(0, 5000), st.integers(0, 600), st.integers(0, 20))
def test_rows(
    tmp_path_factory: pytest.TempPathFactory, offset: int, row_bytes: int, gap: int, rows: int, spread: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.bin"
    stride, step = row_bytes + gap, row_bytes + spread
    needed = offset + max(0, rows - 1) * stride + row_bytes
    path.write_bytes((DATA * (needed // len(DATA) + 1))[:needed])  # nothing after the last row
    file = path.read_bytes()
    buffer = bytearray(b"\xee" * (rows * step + row_bytes))
    expected = bytearray(buffer)
    for row in range(rows):
        expected[row * step : row * step + row_bytes] = file[offset + row * stride : offset + row * stride + row_bytes]
    with Shard(path) as shard:
        shard.read_rows_into(offset, stride, row_bytes, rows, memoryview(buffer), step)
    assert buffer == expected


def test_rows_must_fit(path: Path) -> None:
    with Shard(path) as shard:
        for stride, step, size in [(3, 4, 99), (4, 3, 99), (4, 8, 11)]:
            with pytest.raises(ValueError, match="do not fit"):
                shard.read_rows_into(0, stride, 4, 2, bytearray(size), step)


def test_reading_past_the_end(path: Path) -> None:
    with Shard(path) as shard:
        for read in (
            lambda: shard.read_into(len(DATA) - 3, bytearray(4)),
            lambda: shard.read_rows_into(len(DATA) - 30, 4, 4, 8, bytearray(99), 8),
            lambda: shard.window(len(DATA), len(DATA) + 1).__enter__(),
        ):
            with pytest.raises(SourceChangedError, match=r"a\.safetensors ends at byte 100000"):
                read()


def test_truncated_while_windowed(path: Path) -> None:
    with Shard(path) as shard:
        with shard.window(50_000, 60_000) as window:
            os.truncate(path, 10)
            assert window == DATA[50_000:60_000]  # a memory map would end the process here
        with pytest.raises(SourceChangedError), shard.window(50_000, 60_000):
            pass
        with pytest.raises(SourceChangedError, match="10 bytes"):
            shard.check_unchanged()


def test_notices_changes(path: Path, tmp_path: Path) -> None:
    with Shard(path) as shard:
        shard.check_unchanged()
        shard.check_unchanged()
        os.utime(path, ns=(1, 1))
        with pytest.raises(SourceChangedError, match="changed"):
            shard.check_unchanged()
    with Shard(path) as shard:
        shard.check_unchanged()
        (tmp_path / "b").write_bytes(DATA)
        os.utime(tmp_path / "b", ns=(1, 1))
        os.replace(tmp_path / "b", path)
        with pytest.raises(SourceChangedError, match="replaced"):
            shard.check_unchanged()
        shard.close()
        with pytest.raises(SourceChangedError, match="replaced"):
            shard.read_into(0, bytearray(4))
    with Shard(path) as shard:
        shard.check_unchanged()
        path.unlink()
        with pytest.raises(SourceChangedError, match="is gone"):
            shard.check_unchanged()
        shard.read_into(0, bytearray(4))  # the descriptor still holds it


def test_reopens_after_close(path: Path) -> None:
    shard = Shard(path)
    shard.read_into(0, bytearray(4))
    shard.close()
    shard.close()
    shard.check_unchanged()
    shard.close()


def test_not_a_regular_file(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    try:
        os.chdir(tmp_path)  # the name of a socket may have at most 108 bytes
        listener.bind("socket")
    finally:
        os.chdir(here)
        listener.close()
    for name, what in [
        ("pipe", "a FIFO"),
        ("socket", "a socket"),
        (".", "a directory"),
        ("/dev/zero", "a device"),
        ("loop", "cannot open"),
        ("a.safetensors/x", "cannot open"),
        ("x\0y", "cannot open"),
        ("n" * 300, "cannot open"),
    ]:
        with pytest.raises(CheckpointError, match=what):
            Shard(tmp_path / name).fileno()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(path: Path) -> None:
    path.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Shard(path).fileno()


def _cached(path: Path) -> float:
    """The share in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        flags = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        asked = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), flags)
        del first
    assert asked == 0
    return sum(flag & 1 for flag in flags) / len(flags)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """4 MiB, on the disk and out of the page cache."""
    path = tmp_path / "large"
    path.write_bytes(bytes(4 << 20))
    fd = os.open(path, os.O_RDWR)
    for _ in range(20):  # a busy disk may still hold some of the pages
        posix.fsync(fd)  # os.fsync does nothing in tests
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if _cached(path):
        pytest.skip("this file system keeps its pages")
    return path


def test_what_was_read_is_given_back(large: Path) -> None:
    with Shard(large) as shard:
        shard.read_into(0, bytearray(4 << 20))
        assert _cached(large) == 1
        shard.drop_page_cache(0, 4 << 20)
        assert _cached(large) < 0.5


def test_what_was_there_before_stays(large: Path) -> None:
    large.read_bytes()
    with Shard(large) as shard:
        shard.read_into(0, bytearray(4 << 20))
        shard.drop_page_cache(0, 4 << 20)
    assert _cached(large) > 0.5


def test_many_threads_open_once(path: Path) -> None:
    shard = Shard(path)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(shard.fileno())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1
    shard.close()


@pytest.mark.parametrize("hard", [20_000, 48])
def test_more_shards_than_the_limit_of_open_files(hard: int, tmp_path: Path) -> None:
    """The soft limit is raised; where the hard one is too low, idle shards are closed and open again."""
    model, files = tmp_path / "model", {}
    model.mkdir()
    weights = tiny.tensors()
    first = [name for name in weights if name.startswith("model.layers.0.")]
    weights |= {name.replace(".0.", f".{layer}."): weights[name] for layer in range(8) for name in first}
    for number, (name, value) in enumerate(weights.items()):
        files[name] = f"model-{number:05d}-of-{len(weights):05d}.safetensors"
        save_file({name: value}, model / files[name])
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (model / "config.json").write_text(json.dumps(tiny.config(num_hidden_layers=8)))
    code = (
        "import resource, sys; hard = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))\n"
        "from streamconv import api; from streamconv.targets.trtllm.options import TensorRTLLM\n"
        "api.convert(sys.argv[1], sys.argv[2], TensorRTLLM())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(hard), str(model), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain = tiny.write(tmp_path / "plain", weights, tiny.config(num_hidden_layers=8))
    assert main(["convert", str(plain), str(tmp_path / "right"), "--quiet"]) == 0
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() == (tmp_path / "right" / "rank0.safetensors").read_bytes()
