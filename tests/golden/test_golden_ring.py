"""Golden cases through the ring of a device, with threads in its place: what a GPU would compute, in the order it would."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv import device, memory
from streamconv.device import choice
from tests.golden import cases
from tests.golden.test_golden import VARIED, check_output, convert
from tests.stand_in import StandIn

BY_NAME = cases.load()
COPIES = {"mha_tp2_pp2", "gqa_tp4_kvdup", "meta_gqa_tp4_kvdup", "mha_tp2_fp8kv"}
"""Nothing to encode: bytes that are only moved never go to a device."""

WORKERS = {"mha_sq_tensor_tp2": (1, 3, 8), "gqa_sq_tensor_tp2": (1, 3, 8)}
"""More workers than lanes: whoever waits for a reduction must not keep a lane from those it waits for."""


@pytest.mark.parametrize(("name", "workers"), [(name, workers) for name in VARIED for workers in WORKERS.get(name, (3,))])
def test_case(name: str, workers: int, golden_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden_inputs)
    monkeypatch.setenv("STREAMCONV_TILE_ROWS", "64")
    monkeypatch.setattr(choice, "visible", lambda: 1)
    made: list[StandIn] = []

    def opened(name: str) -> StandIn:
        made.append(StandIn(delay=lambda n: 0.001 * (n % 3), name=name))
        return made[-1]

    monkeypatch.setattr(device, "Cuda", opened)
    budget = str(memory.resident() + memory.GIB)  # this process has run other tests
    convert(BY_NAME[name], tmp_path / "out", "--device", "cuda", "--memory_budget", budget, "--workers", str(workers))
    check_output(BY_NAME[name], tmp_path / "out")
    assert len(made) == 1 and (made[0].copies > 0) == (name not in COPIES)
