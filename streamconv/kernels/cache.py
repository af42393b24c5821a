"""Compiled kernels on the disk. What is damaged, foreign, or does not fit is compiled anew; a disk that is full keeps nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from streamconv.cache_folder import is_own

_dumps: Any = dumps
_rebuild: Any = CompileResult._rebuild
_VERSIONS = (sys.version, numba.__version__, llvmlite.__version__)


class KernelCache(_Cache):
    """The compiled versions of one function, a file each: SHA-256 of the rest, then a pickle of numba's.

    Numba's own cache believes its files: a flipped bit is a traceback, or another kernel.

    Args:
        folder: a `cache_folder`.
        function: what is compiled.
    """

    def __init__(self, folder: Path, function: Callable[..., Any]) -> None:
        self._folder, self._name = folder, f"{function.__module__}.{function.__qualname__}"

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled version for argument types, None if there is none that can be used."""
        target_context.refresh()
        path = self._path(sig, target_context.codegen())
        try:
            content = _read(path)
            return _rebuild(target_context, *pickle.loads(content)) if content is not None else None
        except Exception:  # the pickle of another world
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled version, if there is room."""
        if data.library.has_dynamic_globals or any(not lifted.can_cache for lifted in data.lifted):
            return
        content = _dumps(data._reduce())
        path = self._path(sig, data.codegen)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            try:
                with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                    file.write(hashlib.sha256(content).digest() + content)
                os.replace(new, path)
            except BaseException:
                new.unlink(missing_ok=True)
                raise

    def enable(self) -> None:
        """Always."""

    def disable(self) -> None:
        """Never."""

    def flush(self) -> None:
        """Nothing waits."""

    def _path(self, sig: Any, codegen: Any) -> Path:
        key = repr((_VERSIONS, self._name, sig, codegen.magic_tuple()))
        return self._folder / f"{self._name.rpartition('.')[2]}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _read(path: Path) -> bytes | None:
    """What was kept, None if it is not there or is not what was written."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not is_own(os.fstat(file.fileno())):
                return None
            data = file.read()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None
