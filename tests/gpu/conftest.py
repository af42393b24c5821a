"""Everything here needs a CUDA device, and says so when there is none; the fused kernels also run in Triton's interpreter
(TRITON_INTERPRET=1, where triton is installed). `make test-gpu` runs it."""

from __future__ import annotations

import importlib.util
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    here = torch.cuda.is_available()
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not here and not (INTERPRETED and item.path.stem == "test_fused"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
