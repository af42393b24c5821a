"""A search for INT4 codes on a GPU, against one on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from streamconv.calibration import gptq  # noqa: E402
from streamconv.calibration.run import find_codes  # noqa: E402
from streamconv.calibration.tiers import gram_bytes  # noqa: E402
from tests.calibrate.test_int4_codes import SIZES, text  # noqa: E402
from tests.calibrate.test_int4_search import agree, normal  # noqa: E402
from tests.calibrate.test_streamed import model  # noqa: E402

__all__ = ["model", "text"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("method", ["clip", "awq", "gptq"])
def test_a_search_agrees_with_the_cpu(method: str) -> None:
    agree(method, "cuda:0")


@pytest.mark.parametrize("method", ["clip", "awq", "gptq"])
def test_codes_of_a_model_are_near_those_of_the_cpu_and_the_same_twice(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = SIZES | {"dtype": "float32", "method": method}
    for name, device in (("cpu", "cpu"), ("one", "cuda:0"), ("two", "cuda:0")):
        find_codes(model, tmp_path / name, str(text), **sizes | {"device": device})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    here, there = load_file(tmp_path / "cpu"), load_file(tmp_path / "one")
    for name, losses in here.items():
        if name.endswith(".losses"):
            assert torch.allclose(there[name], losses, rtol=0.02), name


def test_a_factor_takes_what_the_plan_says() -> None:
    size = 8192
    inputs = normal(64, size).cuda()
    moments = inputs.T @ inputs / 64 + torch.eye(size, device="cuda")
    del inputs
    torch.cuda.reset_peak_memory_stats()
    assert gptq.factor(moments) is not None
    assert torch.cuda.max_memory_allocated() < 3.2 * gram_bytes("full", size, 64)
