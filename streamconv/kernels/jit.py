"""Numba, set up so that kernels release the interpreter lock, are cached, and never fail for want of a cache folder."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamconv.cache_folder import cache_folder

_CONFIG = ".numba_config.yaml"


def _import_numba() -> None:
    """Numba takes settings from the current folder, at its import and later, and that may be a downloaded model."""
    here = os.open(os.curdir, os.O_RDONLY | os.O_DIRECTORY) if os.path.lexists(_CONFIG) else None
    try:
        if here is not None:
            os.chdir(os.sep)
        importlib.import_module("numba.core.config").__dict__["_config_fname"] = os.devnull
    finally:
        if here is not None:
            os.fchdir(here)
            os.close(here)


_import_numba()

import numba  # noqa: E402
from numba.extending import intrinsic  # noqa: E402


def _kernel_folder() -> Path | None:
    """A folder of its own for every state of the kernels: a function is compiled together with those that it calls."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return cache_folder(os.path.join("numba", digest.hexdigest()[:16]), os.environ.get("NUMBA_CACHE_DIR"))


_FOLDER = _kernel_folder()


def jit(function: Callable[..., Any]) -> Any:
    """Compile on first use, once per argument types; cached on disk where that is possible."""
    return _cached(numba.njit(nogil=True, error_model="numpy")(function), function)


def callback(signature: Any, function: Callable[..., Any]) -> int:
    """Address of a C function that never enters the interpreter; compiled here and now, and cached like a kernel."""
    from numba.core.ccallback import CFunc

    made: Any = _cached(CFunc(function, (signature.args, signature.return_type), {}, {"error_model": "numpy"}), function)
    made.compile()
    return int(made.address)


def _cached(compiled: Any, function: Callable[..., Any]) -> Any:
    if _FOLDER is not None:
        try:
            from streamconv.kernels.cache import KernelCache
        except ImportError:  # a numba that is made otherwise inside
            return compiled
        compiled._cache = KernelCache(_FOLDER, function)
    return compiled


def _reinterpret(source: Any, target: Any) -> Any:
    """A function for kernels that takes a scalar's bits for another type."""

    def made(context: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), code

    return intrinsic(made)


float_of = _reinterpret(numba.types.uint32, numba.types.float32)
bits_of = _reinterpret(numba.types.float32, numba.types.uint32)
