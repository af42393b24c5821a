"""Numba, set up so that kernels release the interpreter lock, are cached, and never fail for want of a cache folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _cache_home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "streamconv" / "numba"


def _prepare() -> bool:
    """Choose the cache folder before numba is imported; False if there is none to write to."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or _cache_home())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if usable:
        os.environ.setdefault("NUMBA_CACHE_DIR", str(folder))
    return usable


_CACHED = _prepare()

import numba  # noqa: E402


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, once per argument types; cached on disk where that is possible."""
    if _CACHED:
        try:
            return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
        except RuntimeError:
            pass  # the cache folder went away, or is not usable after all
    return numba.njit(nogil=True, error_model="numpy")(function)
