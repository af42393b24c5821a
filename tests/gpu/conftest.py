"""Everything here needs a CUDA device, and says so when there is none. `make test-gpu` runs it."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    here = torch.cuda.is_available()
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not here:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
