"""Compiled code on the disk: damaged, foreign or full, the kernels work; and nobody else can write there."""

from __future__ import annotations

import os
import pickle
import random
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streamconv.cache_folder import cache_folder
from streamconv.kernels.decode_code import decode_rows

CODE = """
import os, sys
os.umask(int(sys.argv[1], 8))
import numpy as np
from streamconv.checkpoint.dtypes import BF16, F32
from streamconv.kernels.launch import cast_kernel
out = np.zeros(4, np.uint8)
cast_kernel(BF16, F32)(np.array([0x3F80], 'u2'), 0, 1, 1, 1, [out])
assert out.view('f4')[0] == 1.0
print(int("numba" not in sys.modules))
from streamconv.kernels import compiler
assert not compiler.numba.config.DISABLE_JIT
"""


def _hits(base: Path, umask: str = "022", cwd: Path | None = None, **limits: int) -> int:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(base)}
    command = [sys.executable, "-W", "error", "-c", CODE, umask]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout)


def _files(base: Path) -> list[Path]:
    return sorted(path for path in base.rglob("*") if path.is_file())


@pytest.mark.slow
def test_every_damage_is_noticed_and_healed(tmp_path: Path) -> None:
    base = tmp_path / "cache"
    assert _hits(base) == 0 and _hits(base) == 1
    whole = {path: path.read_bytes() for path in _files(base)}
    assert whole
    evil = pickle.dumps(Evil(str(tmp_path / "ran")))
    dice = random.Random(1)

    def flipped(data: bytes) -> bytes:
        at = dice.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]

    damages = (lambda d: d[: len(d) // 2], lambda d: bytes(len(d)), flipped, lambda d: b"", lambda d: d[:32] + evil)
    for damage in damages:
        for path, data in whole.items():
            path.write_bytes(damage(data))
        assert _hits(base) == 0
        assert {path: path.read_bytes()[:32] for path in _files(base)}.keys() == whole.keys()
    assert _hits(base) == 1, "it was not written anew"
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


@pytest.mark.slow
def test_a_folder_in_a_files_place(tmp_path: Path) -> None:
    base = tmp_path / "cache"
    _hits(base)
    for path in _files(base):
        path.unlink()
        path.mkdir()
    assert _hits(base) == 0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_keeps_nothing_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "cache"
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    env = {**os.environ, "NUMBA_CACHE_DIR": str(base)}
    done = subprocess.run([sys.executable, "-c", code + CODE, "022"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert not _files(base)


@pytest.mark.parametrize("umask", [pytest.param("000", marks=pytest.mark.slow), "002", pytest.param("077", marks=pytest.mark.slow)])
def test_nobody_else_can_write_there(umask: str, tmp_path: Path) -> None:
    """And a file that others could write is not loaded; nor do settings of the current folder reach numba."""
    (tmp_path / ".numba_config.yaml").write_text("disable_jit: 1\n")
    base = tmp_path / "cache"
    assert _hits(base, umask, cwd=tmp_path) == 0
    for path in (base, *base.rglob("*")):
        assert not path.lstat().st_mode & 0o077, path
    assert _hits(base, umask) == 1
    for path in _files(base):
        path.chmod(0o666)
    assert _hits(base, umask) == 0 and _hits(base, umask) == 1


def test_what_others_could_write_is_not_believed(tmp_path: Path) -> None:
    folder = cache_folder("numba", str(tmp_path))
    assert folder is not None
    (folder / "planted").write_text("")
    folder.chmod(0o777)
    assert cache_folder("numba", str(tmp_path)) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and not list(folder.iterdir())
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert cache_folder("numba", str(tmp_path)) is None
    assert cache_folder("numba", "relative") is None


def test_no_room_for_a_row_is_an_error_and_no_crash() -> None:
    codes, scales, zeros, inputs = np.empty(0, np.uint8), np.ones((1, 1), np.float32), np.empty((0, 0), np.float32), np.empty(0, np.float32)
    with pytest.raises(MemoryError):
        decode_rows(codes, 0, scales, zeros, inputs, 0, 1, 1, 1, 1 << 50, 2, np.empty(0, np.uint16))
