"""On a real device: every golden case, and every torch definition on awkward values, byte for byte as on the CPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from streamconv.checkpoint.dtypes import BF16, F16, F32
from streamconv.quants.base import Codec, EncodeStats
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.layout import FAMILIES
from streamconv.quants.plain import Plain
from streamconv.quants.weight_only import WeightOnly
from tests.golden import cases
from tests.golden.cases import Case
from tests.golden.test_golden import check_output, convert
from tests.unit.test_kernels import any_bits, weights

FLOATS = (BF16, F16, F32)
ENCODINGS: list[Codec] = [WeightOnly(bits, family, model) for bits, family, model in itertools.product((8, 4), FAMILIES, FLOATS)]
ENCODINGS += [Plain(model) for model in FLOATS] + [Plain(F16, add_one=True), Plain(BF16, via_half=True)]
ENCODINGS += [Fp8Rowwise(), Fp8Rowwise(-0.1, 0.07), Fp8Rowwise(model=BF16), Fp8Rowwise(model=F16)]


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("case", [case for case in cases.every() if case.model], ids=str)
def test_golden(case: Case, rows: int | None, golden_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden_inputs)
    if rows is not None:
        monkeypatch.setenv("STREAMCONV_TILE_ROWS", str(rows))
    convert(case, tmp_path / "out", "--device", "cuda", "--memory_budget", "2GiB")
    check_output(case, tmp_path / "out")


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_definitions(encoding: Codec, source: Any) -> None:
    infinite = weights(64, 128, source)
    infinite[3, 5], infinite[7, 9], infinite[9, 64] = float("nan"), float("inf"), float("-inf")
    blocks = [weights(64, 192, source), any_bits(64, 64, source, 1)]
    if not isinstance(encoding, Plain):  # the payload of a NaN is nobody's promise
        blocks.append(infinite)
    for block in blocks:
        on_cpu, on_gpu = EncodeStats(), EncodeStats()
        right = encoding.encode(block, on_cpu)
        found = encoding.encode(block.cuda(), on_gpu)
        assert [part.device.type for part in found] == ["cuda"] * len(right)
        assert all(torch.equal(part.cpu(), wanted) for part, wanted in zip(found, right, strict=True))
        assert on_cpu == on_gpu
