"""Numba, set up so that kernels release the interpreter lock, are cached, and never fail for want of a cache folder."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _cache_home() -> Path:
    """A folder of its own for every state of the kernels: numba looks only at the file of the function it compiled, and
    would go on running old copies of the functions that it calls."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR")
    if not base:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        base = os.path.join(home, "streamconv", "numba")
    name = digest.hexdigest()[:16]
    return Path(base) if Path(base).name == name else Path(base) / name  # a child process inherits the finished name


def _prepare() -> bool:
    """Choose the cache folder before numba is imported; False if there is none to write to."""
    folder = _cache_home()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # numba keeps pickles there: nobody else may write them, whatever the umask
        status = folder.lstat()
        private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        usable = private and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if usable:
        os.environ["NUMBA_CACHE_DIR"] = str(folder)
    return usable


_CACHED = _prepare()

import numba  # noqa: E402
from numba.extending import intrinsic  # noqa: E402


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, once per argument types; cached on disk where that is possible."""
    if _CACHED:
        try:
            return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
        except RuntimeError:
            pass  # the cache folder went away, or is not usable after all
    return numba.njit(nogil=True, error_model="numpy")(function)


def _reinterpret(source: Any, target: Any) -> Any:
    """A function for kernels that takes a scalar's bits for another type."""

    def made(context: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), code

    return intrinsic(made)


float_of = _reinterpret(numba.types.uint32, numba.types.float32)
bits_of = _reinterpret(numba.types.float32, numba.types.uint32)
