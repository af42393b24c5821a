"""Compiled kernels on the disk. What is damaged, foreign, or does not fit is compiled anew; a disk that is full keeps nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from llvmlite import __version__, binding

from streamconv.cache_folder import cache_folder, is_own
from streamconv.digest import sha256


class Code(NamedTuple):
    """A compiled function.

    Attributes:
        symbol: its name in `machine`, an object file.
        returns: types of what it gives, as numba names them; a string for one that is not a tuple, None for nothing.
        alone: needs nothing of the process that compiled it.
    """

    symbol: str
    returns: list[str] | str | None
    machine: bytes
    alone: bool = True


def kept(name: str, types: str, compile_it: Callable[[], Code]) -> Code:
    """The compiled function for these types of arguments, from the disk if it is there."""
    folder = kernel_folder()
    if folder is None:
        return compile_it()
    path = folder / f"{name}-{sha256(f'{name} {types} {_circumstances()}'.encode()).hexdigest()[:24]}"
    code = _read(path)
    if code is None:
        code = compile_it()
        if code.alone:
            _write(path, code)
    return code


@cache
def kernel_folder() -> Path | None:
    """A folder of its own for every state of the kernels: a function is compiled together with those that it calls."""
    digest = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return cache_folder(os.path.join("numba", digest.hexdigest()[:16]), os.environ.get("NUMBA_CACHE_DIR"))


@cache
def _circumstances() -> str:
    """What else decides the code: interpreter, compiler and its settings, processor."""
    spec = importlib.util.find_spec("numba")
    numba = os.stat(spec.origin).st_mtime_ns if spec and spec.origin else 0  # to ask for its version would load it
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_") and item[0] != "NUMBA_CACHE_DIR")
    return repr((sys.version, __version__, numba, settings, binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()))


def _read(path: Path) -> Code | None:
    """What was kept, None if it is not there or is not what was written: SHA-256 of the rest, a line of JSON, the object file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not is_own(os.fstat(file.fileno())):
                return None
            data = file.read()
    except OSError:
        return None
    if sha256(data[32:]).digest() != data[:32]:
        return None
    head, _, machine = data[32:].partition(b"\n")
    symbol, returns = json.loads(head)
    return Code(symbol, returns, machine)


def _write(path: Path, code: Code) -> None:
    content = json.dumps([code.symbol, code.returns]).encode() + b"\n" + code.machine
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(sha256(content).digest() + content)
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
