"""numpy and torch, loaded when something of them is first used, so that a command that needs neither starts at once; names of arrays."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Array", "Bytes", "np", "torch"]

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]
    Bytes = np.ndarray[Any, np.dtype[np.uint8]]
else:

    class _Lazy:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> object:
            value = self.__dict__[attribute] = getattr(importlib.import_module(self._name), attribute)
            return value

    np, torch = _Lazy("numpy"), _Lazy("torch")
    Array = Bytes = Any
