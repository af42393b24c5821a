"""The fused device kernels give the bytes and the stats of the torch definitions on the CPU, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from streamconv.calibration import gptq
from streamconv.checkpoint.dtypes import BF16, F16, F32, DType
from streamconv.device.triton_launch import has_kernel, kernel_of, works
from streamconv.quants.base import Codec, EncodeStats
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.fp8_tensor import Fp8Tensor
from streamconv.quants.layout import FAMILIES
from streamconv.quants.plain import Plain
from streamconv.quants.smoothing import Bound
from streamconv.quants.smoothquant import SmoothWeight
from streamconv.quants.weight_only import WeightOnly
from tests.unit.test_kernels import any_bits, kind, weights

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, inside the interpreter
FLOATS = (BF16, F16, F32)
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
PLAIN: list[Codec] = [Plain(model, add_one=one, via_half=half) for model, one, half in itertools.product(FLOATS, *[(False, True)] * 2)]
INTEGERS = [WeightOnly(bits, family, model) for bits, family, model in itertools.product((8, 4), FAMILIES, FLOATS)]
FP8 = [Fp8Rowwise(), Fp8Rowwise(-0.1, 0.07), Fp8Rowwise(model=BF16), Fp8Rowwise(model=F16)]


def smooth(**how: Any) -> SmoothWeight:
    return SmoothWeight(None, how.pop("dtype", F16), how.pop("outputs", None), **how)  # type: ignore[arg-type]


ONE = (("w", "k"),)
SMOOTH = [
    smooth(), smooth(outputs=3.7), smooth(keep=(65, 190)), smooth(dtype=BF16), smooth(dtype=F32, outputs=0.3),
    smooth(largest=ONE), smooth(largest=ONE, dtype=BF16), smooth(largest=ONE, single=False), smooth(largest=ONE, keep=(1, 64)),
    smooth(largest=ONE, single=False, divide=True), smooth(largest=ONE, single=False, divide=True, outputs=2.5),
]  # fmt: skip


def both(encoding: Codec, block: torch.Tensor, source: DType, columns: slice = slice(None)) -> None:
    launch = kernel_of(encoding, source)
    assert launch is not None
    on_cpu = EncodeStats()
    right = encoding.encode(block[:, columns], on_cpu)
    there = block.to(DEVICE)[:, columns]
    outs = [torch.full((part.numel() + 64,), 0xA5, dtype=torch.uint8, device=DEVICE) for part in right]
    counts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    launch(there, [out[: part.numel()] for out, part in zip(outs, right, strict=True)], counts)
    for number, (out, wanted) in enumerate(zip(outs, right, strict=True)):
        assert bool((out[wanted.numel() :] == 0xA5).all())
        found = out[: wanted.numel()].cpu()
        if number and isinstance(encoding, SmoothWeight):  # the scale of a row with NaN is NaN; which one is nobody's promise
            found, wanted = (_one_nan(scales.view(torch.float32)).view(torch.uint8) for scales in (found, wanted))
        wrong = (found != wanted).nonzero().reshape(-1)
        assert not wrong.numel(), f"{wrong.numel()} of {wanted.numel()} bytes, first {wrong[:5].tolist()}"
    assert EncodeStats(*counts.tolist()) == on_cpu


def _one_nan(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values.isnan(), float("nan"), values)


def awkward(block: torch.Tensor) -> torch.Tensor:
    block = block.clone()
    block[3, 5], block[7, 9], block[9, 64], block[11] = float("nan"), float("inf"), float("-inf"), float("nan")
    block[12, 0], block[12, 1] = float("inf"), float("nan")
    return block


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("encoding", PLAIN + INTEGERS + FP8, ids=repr)
def test_same_bytes(encoding: Codec, source: DType) -> None:
    values = weights(64, 192, source)
    both(encoding, values, source)
    both(encoding, any_bits(64, 64, source, 1), source)
    both(encoding, weights(20, 1152, source, 3), source, slice(64, 1152))
    both(encoding, weights(16, 1280, source, 4), source, slice(128, 192))
    if not isinstance(encoding, Plain):  # the payload of a NaN is nobody's promise
        both(encoding, awkward(values), source)
    else:
        both(encoding, torch.where(awkward(values).isnan(), 1.0, awkward(values)), source)
        both(encoding, any_bits(7, 33, source, 2), source, slice(3, 32))


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("encoding", SMOOTH, ids=repr)
def test_smoothed(encoding: SmoothWeight, source: DType) -> None:
    for cols, seed in ((192, 0), (1216, 1)):
        random = torch.Generator().manual_seed(seed)
        factors = torch.exp2(torch.rand(cols, generator=random, dtype=torch.float64) * 8 - 4)
        factors[:64] = torch.exp2((torch.arange(64) % 5).double()) * (1 + 2.0**-11 + 2.0**-25)  # near ties in float16
        half = torch.tensor(1.37, dtype=torch.float16)
        bound = Bound(factors, 31.7, half if encoding.largest else None)  # what reductions give, ndarray or tensor, is torch-readable
        bound = _as_stored(bound)
        ready = SmoothWeight(**{name: getattr(encoding, name) for name in encoding.__dataclass_fields__} | {"bound": bound})
        for block in (weights(40, cols, source, seed), any_bits(16, cols, source, seed)):
            both(ready, block, source)
            both(ready, awkward(block), source)
        both(ready, weights(40, cols + 64, source, 5), source, slice(32, cols + 32))


def _as_stored(bound: Bound) -> Bound:
    """With the array type that the module's own functions take."""
    try:
        SmoothWeight(None, F16, None, bound=bound).encode(torch.ones(1, len(bound.smoother)).half(), EncodeStats())  # type: ignore[arg-type]
        return bound
    except (TypeError, AttributeError):
        return Bound(bound.smoother.numpy(), bound.activation, None if bound.largest is None else float(bound.largest))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="every value of a type: long without a device")
@pytest.mark.parametrize("source", (BF16, F16), ids=str)
def test_every_value(source: DType) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(kind(source))
    block = torch.where(torch.isfinite(bits), bits, 0.0).reshape(1024, 64)
    for encoding in PLAIN + INTEGERS + FP8:
        both(encoding, block, source)
        both(encoding, block.t().contiguous().reshape(64, 1024), source)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="large")
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_many_random_quotients(source: DType) -> None:
    block = (torch.randn(2048, 4096, generator=torch.Generator().manual_seed(8)) / 32).to(kind(source))
    for encoding in (WeightOnly(8, "sm80", F16), WeightOnly(4, "sm90", BF16), *FP8, Plain(F16), Plain(BF16)):
        both(encoding, block, source)
    factors = torch.exp2(torch.rand(4096, dtype=torch.float64) * 4 - 2)
    both(smooth(bound=_as_stored(Bound(factors, 31.7))), block, source)
    both(smooth(outputs=7.7, dtype=BF16, bound=_as_stored(Bound(factors, 31.7))), block, source)


def test_who_has_a_kernel() -> None:
    assert works(DEVICE) is None
    assert has_kernel(Plain(F16), BF16) and not has_kernel(Fp8Tensor("k"), BF16)


@pytest.mark.parametrize(("size", "rows"), [(128, 70), (48, 33), (1, 1)])
def test_columns_of_gptq(size: int, rows: int) -> None:
    """Here sums may be fused otherwise: codes but for ties, and what a tie leads to."""
    kernel = pytest.importorskip("streamconv.calibration.gptq_kernel")
    known = torch.Generator().manual_seed(size)
    block, steps = torch.randn(size, rows, generator=known), torch.rand(size, rows, generator=known) / 5 + 0.05
    whole = torch.randn(300, 300, generator=known).triu() / 5
    whole.diagonal().copy_(torch.rand(300, generator=known) + 0.5)
    made = []
    for columns in (gptq._columns, kernel.columns):
        codes, errors = (torch.full((size + 2, rows), 99.0, device=DEVICE) for _ in range(2))
        columns(block.clone().to(DEVICE), steps.to(DEVICE), whole.to(DEVICE)[50 : 50 + size, 50 : 50 + size], codes[:size], errors[:size])
        assert bool((codes[size:] == 99).all()) and bool((errors[size:] == 99).all())
        made.append((codes[:size].cpu(), errors[:size].cpu()))
    (codes, errors), (found, left) = made
    assert float((codes == found).float().mean()) > 0.99
    assert float((errors - left)[codes == found].abs().median()) < 1e-5
