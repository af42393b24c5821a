"""numpy and torch, loaded when something of them is first used: a command that needs neither starts at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = ["np", "torch"]

if TYPE_CHECKING:
    import numpy as np
    import torch
else:

    class _Lazy:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> object:
            return getattr(importlib.import_module(self._name), attribute)

    np, torch = _Lazy("numpy"), _Lazy("torch")
