"""The fused kernels of the formats that reduce first (SmoothQuant, FP8 per tensor) give the bytes of the torch definitions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import BF16, F16, F32, DType
from streamconv.kernels import root_code
from streamconv.quants.base import EncodeStats, Reduction
from streamconv.quants.fp8_tensor import Fp8Tensor, WeightMaximum
from streamconv.quants.smoothing import (
    Bound,
    InputChannelAmax,
    Smoother,
    bound_to,
    inverse,
    largest_smoothed,
    one_scale,
    power,
    smoothed,
    weight_scale,
)
from streamconv.quants.smoothquant import SmoothNorm, SmoothValue, SmoothWeight
from tests.unit.test_kernels import FLOATS, PAIRS, any_bits, check, from_bits, kind, weights

Array = np.ndarray[Any, Any]
INF, NAN = float("inf"), float("nan")


class Known:
    """Reductions that are complete."""

    def __init__(self, **values: Array) -> None:
        self.values = values

    def get(self, key: str) -> Array:
        return self.values[key]


@pytest.fixture(scope="module", params=[False, True], ids=["0.16", "1.x"])
def smoother(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Smoother:
    folder = tmp_path_factory.mktemp("ranges")
    save_file({"m.x": np.linspace(0, 9, 129, dtype=np.float32)}, folder / "ranges.safetensors")
    return Smoother(("a", "b"), "weights", Ranges(folder / "ranges.safetensors"), "m", 0.5, request.param)


def columns(cols: int, seed: int = 0) -> Array:
    """Smoothers of many sizes, the least one and powers of two (products that are ties) among them."""
    made = np.exp2(np.random.default_rng(seed).uniform(-12, 8, cols))
    made[::7], made[3::11] = 1e-5, 0.5
    return made


VARIANTS = [
    pytest.param({"largest": largest, "divide": divide, "single": single}, outputs, id=f"{name}-{'token' if outputs is None else 'tensor'}")
    for name, largest, divide, single in (
        ("channel", False, False, True),
        ("channel-qkv", False, True, False),
        ("tensor", True, False, True),
        ("tensor-qkv", True, False, False),
        ("tensor-gqa", True, True, False),
    )
    for outputs in (None, 23.7)
]


def encoding(
    smoother: Smoother, block: torch.Tensor, model: DType, variant: dict[str, bool], outputs: float | None, seed: int = 0
) -> SmoothWeight:
    s = columns(block.shape[1], seed)
    top = float(smoothed(block, s).abs().max()) if variant["largest"] else None
    largest = (("w", "a"),) if variant["largest"] else ()
    bound = Bound(s, 0.37, top)
    return SmoothWeight(smoother, model, outputs, largest, variant["divide"], variant["single"], bound=bound)


@pytest.mark.parametrize(("source", "model"), PAIRS, ids=str)
@pytest.mark.parametrize(("variant", "outputs"), VARIANTS)
def test_smooth_weight(smoother: Smoother, variant: dict[str, bool], outputs: float | None, source: DType, model: DType) -> None:
    block = weights(32, 131, source)  # zero rows, ties, subnormals and the largest values are among them
    check(encoding(smoother, block, model, variant, outputs), block, source)
    usual = (torch.randn(24, 257, generator=torch.Generator().manual_seed(1)) * 0.05).to(kind(source))
    check(encoding(smoother, usual, model, variant, outputs, 3), usual, source, start=5, stride=300)
    every = any_bits(16, 65, source, 7)
    check(encoding(smoother, every, model, variant, outputs), every, source)
    one = usual[:1, :1].contiguous()
    check(encoding(smoother, one, model, variant, outputs), one, source)


@pytest.mark.parametrize("variant", [v.values[0] for v in VARIANTS[::2]], ids=[str(v.id) for v in VARIANTS[::2]])
def test_smooth_weight_keeps_columns_and_counts_whole_rows(smoother: Smoother, variant: dict[str, bool]) -> None:
    block = (torch.randn(9, 97, generator=torch.Generator().manual_seed(2)) * 0.05).bfloat16()
    block[:, 90] = 3  # decides the scale and is not stored
    block[2, 1], block[4, 95] = INF, -INF
    whole = encoding(smoother, block, BF16, variant, 2.0)
    for keep in ((0, 97), (13, 64), (96, 97)):
        kept = SmoothWeight(**{**whole.__dict__, "keep": keep})
        assert check(kept, block, BF16) == EncodeStats(nonfinite=2)


@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_smooth_weight_of_nan(smoother: Smoother, source: DType) -> None:
    """By one scale: a NaN is 0. A row's own scale becomes NaN; no smoother is found for such a column, so no run stores it."""
    block = weights(20, 64, source)
    block[16, 3], block[17, 9], block[18, 30], block[19] = NAN, INF, -INF, NAN
    variant = {"largest": False, "divide": False, "single": True}
    for outputs in (None, 3.0):
        made = encoding(smoother, block, F16, variant, outputs)
        one = SmoothWeight(**{**made.__dict__, "largest": (("w", "a"),), "bound": Bound(columns(64), 0.37, 2.5)})
        assert check(one, block, source) == EncodeStats(nonfinite=3 + 64)
        check(made, block[:16], source)


@pytest.mark.parametrize("top", [0.0, 2.0**-24, 1e-3, 65504.0, INF])
def test_smooth_weight_by_scales_at_the_limits(smoother: Smoother, top: float) -> None:
    block = weights(20, 64, BF16)
    for variant in (v.values[0] for v in VARIANTS[4::2]):
        made = encoding(smoother, block, BF16, variant, 3.0)
        check(SmoothWeight(**{**made.__dict__, "bound": Bound(columns(64), 0.37, top)}), block, BF16)


@pytest.mark.parametrize("model", FLOATS, ids=str)
def test_every_float16_value_is_smoothed_and_rounded_alike(smoother: Smoother, model: DType) -> None:
    every = from_bits(np.arange(1 << 16), F16)
    every = every[torch.isfinite(every)]
    for factor in (1.0, 0.5, 1 / 3, 1.0000001, 2.0**-9, 7.7):
        bound = Bound(np.full(62, factor), 0.37, 200.0)
        for divide, single in ((False, True), (True, False)):
            made = SmoothWeight(smoother, model, None, (("w", "a"),), divide, single, bound=bound)
            check(made, every.reshape(-1, 62), F16)


@pytest.mark.parametrize(("source", "model"), PAIRS, ids=str)
def test_smooth_norm(smoother: Smoother, source: DType, model: DType) -> None:
    block = weights(32, 129, source)
    for row in block:
        check(SmoothNorm(smoother, model, Bound(columns(129), 1.0)), row[None], source)
    infinite = torch.tensor([[1.0, INF, -INF, 3.0]]).to(kind(source))
    check(SmoothNorm(smoother, model, Bound(np.array([1e-5, 1.0, 2.0, 1e-5]), 1.0)), infinite, source)


def test_smooth_values(smoother: Smoother) -> None:
    bound = Bound(columns(129), 0.37123456789, float(np.float16(1.3)))
    for what, outputs, keep in itertools.product(("smoother", "activation", "scale"), (None, 23.7), ((0, 1), (7, 100))):
        width = keep[1] - keep[0] if what == "smoother" else 1
        value = SmoothValue(smoother, what, "x", (width,), outputs, "a", (0, width) if what != "smoother" else keep, 129, bound)
        check(value, torch.zeros(1, 1), F32)


def reduced(reduction: Reduction, block: torch.Tensor, source: DType) -> tuple[Array, Array]:
    """What the kernel and the definition give."""
    kernel = reduction.kernel(source)
    assert kernel is not None
    flat = block.contiguous().reshape(-1).view(torch.uint8).numpy().view(source.storage)
    return kernel(flat, *block.shape), reduction.tile(block, Known()).numpy()


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", [InputChannelAmax("k"), WeightMaximum("k")], ids=lambda r: type(r).__name__)
def test_reductions(reduction: Reduction, source: DType) -> None:
    bad = weights(20, 33, source)
    bad[16, 3], bad[17, 9], bad[18, 30], bad[3, 31] = NAN, INF, -INF, NAN
    for block in (weights(32, 131, source), any_bits(40, 65, source), weights(20, 1, source)[:1], weights(3, 7, source), bad):
        got, want = reduced(reduction, block, source)
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)


def test_column_maxima_of_float32_around_every_halfway_point() -> None:
    every = from_bits(np.arange(0x7C01), F16).double()
    middle = ((every[:-1] + every[1:].clamp(max=65536.0)) / 2).float()
    block = torch.stack([middle, torch.nextafter(middle, torch.tensor(INF)), -torch.nextafter(middle, torch.tensor(0.0))])
    for row in block:
        np.testing.assert_array_equal(*reduced(InputChannelAmax("k"), row[None], F32))


def test_the_largest_smoothed_weight_from_column_maxima() -> None:
    for seed, source in itertools.product(range(3), FLOATS):
        block, s = any_bits(40, 65, source, seed), columns(65, seed)
        block = torch.where(torch.isfinite(block.half()), block, torch.zeros((), dtype=block.dtype))
        for rows in (block, weights(14, 65, source)[2:4], block.clamp(-1, 1)):
            maxima = InputChannelAmax("k").tile(rows, Known()).numpy()
            assert largest_smoothed(maxima, s) == float(smoothed(rows, s).abs().max())


def test_scales_of_every_float16_value() -> None:
    every = from_bits(np.arange(0x7C01), F16)
    scale = weight_scale(every)
    pairs = np.array([one_scale(float(value)) for value in every[::7]])
    np.testing.assert_array_equal(pairs[:, 0], scale[::7].double().numpy())
    np.testing.assert_array_equal(pairs[:, 1], inverse(scale)[::7].double().numpy())


def test_the_smoother_is_found_once_and_again_for_other_maxima(smoother: Smoother, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[int]()
    find = Smoother.find
    monkeypatch.setattr(Smoother, "find", lambda self, known, exact=False: (found.append(1), find(self, known, exact))[1])
    ones, twos = np.ones(129, np.float16), np.full(129, 2, np.float16)
    first = Known(a=ones, b=ones)
    assert bound_to(smoother, first, "a") is bound_to(smoother, first, "a") and len(found) == 1
    assert bound_to(smoother, first, "b").largest == bound_to(smoother, first, "a").largest
    other = bound_to(smoother, Known(a=ones.copy(), b=twos), "a")  # another run
    assert not np.array_equal(other.smoother, bound_to(smoother, first, "a").smoother)
    root = 2**0.5 if smoother.wide else float(np.float16(2**0.5))
    expected = np.maximum(np.sqrt(np.linspace(0, 9, 129, dtype=np.float32).astype(float)) / root, 1e-5)
    np.testing.assert_allclose(other.smoother, expected, rtol=1e-15)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_powers_are_those_of_torch(exponent: float) -> None:
    halves = from_bits(np.arange(0x7C00), F16)
    np.testing.assert_array_equal(power(halves.numpy(), exponent), halves.pow(exponent).numpy())
    random = np.random.default_rng(0)
    numbers = np.concatenate([[0.0], random.uniform(0, 9, 4099), np.exp2(random.uniform(-30, 20, 4099))]).astype(np.float32)
    wide = torch.from_numpy(numbers).double()
    np.testing.assert_array_equal(power(wide.numpy(), exponent), wide.pow(exponent).numpy())


def test_the_root_of_torch_is_the_rounded_one_or_its_neighbour_that_is_named() -> None:
    random = np.random.default_rng(0)
    numbers = np.concatenate([[0.0, 2.0**-149], random.uniform(0, 64, 200_000), np.exp2(random.uniform(-149, 127, 200_000))])
    values = numbers.astype(np.float32).astype(np.float64)
    near = np.sqrt(values)
    other = np.array([root_code.other_root(value, root) for value, root in zip(values, near, strict=True)])
    torchs = torch.from_numpy(values).pow(0.5).numpy()
    assert ((torchs == near) | (torchs == other)).all()
    assert (np.abs(near.view(np.int64) - other.view(np.int64)) <= 1).all()


def exactly(found: Smoother, known: Known) -> tuple[Array, float]:
    """The definition, all of it by torch."""
    x = torch.from_numpy(found.ranges.vector("m.x")).double()
    m = torch.from_numpy(np.maximum(known.get("a"), known.get("b")))
    m = m.double().clamp(min=1e-5) if found.wide else m
    s = (x.pow(found.alpha) / m.pow(1 - found.alpha)).clamp(min=1e-5)
    return s.numpy(), 127.0 / float((x / s).max())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_smoothers_give_the_bytes_of_torch(smoother: Smoother, alpha: float) -> None:
    random = np.random.default_rng(1)
    known = Known(a=random.uniform(1e-4, 2, 129).astype(np.float16), b=random.uniform(1e-4, 2, 129).astype(np.float16))
    found = Smoother(smoother.keys, smoother.weights, smoother.ranges, "m", alpha, smoother.wide)
    s, sx = exactly(found, known)
    bound, strict = found.find(known), found.find(known, exact=True)
    assert strict.smoother.tobytes() == s.tobytes() and strict.activation == sx
    assert bound.doubt[0] <= sx <= bound.doubt[1] and np.float32(bound.activation) == np.float32(sx)
    every = from_bits(np.arange(0x7C00), F16).reshape(-1, 1).expand(-1, 129)
    assert torch.equal(smoothed(every, bound.smoother), smoothed(every, s))
    norms = (SmoothNorm(found, BF16, b).encode(every, EncodeStats())[0] for b in (bound, Bound(s, sx)))
    assert torch.equal(*norms)
    np.testing.assert_array_equal(bound.smoother.astype(np.float32), s.astype(np.float32))


def test_a_root_that_decides_a_byte_is_asked_of_torch(smoother: Smoother, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known(a=np.full(129, 0.37, np.float16), b=np.full(129, 0.1, np.float16))
    s, sx = exactly(smoother, known)
    monkeypatch.setattr(root_code, "alike", lambda made, other: False)
    found = smoother.find(known)
    assert found.smoother.tobytes() == s.tobytes() and (found.activation, found.doubt) == (sx, (sx, sx))


def test_close_calls_are_seen() -> None:
    far = np.nextafter(1.0, 2.0)
    assert root_code.alike(np.array([0.3, 1.0]), np.array([0.3, 1.0]))
    assert root_code.alike(np.array([1.5]), np.array([1.5 * far]))
    # as float32: the middle between two of them
    middle = 1 + 2.0**-24
    assert not root_code.alike(np.array([middle]), np.array([np.nextafter(middle, 2)]))
    # 1025 * s is the edge between the float32 that is a tie of float16 and the next one
    edge = (1024.5 + 2.0**-14) / 1025
    pair = np.array([np.nextafter(edge, 0)]), np.array([np.nextafter(edge, 2)])
    assert np.float32(pair[0][0]) == np.float32(pair[1][0])
    halves = [np.float16(np.float32(1025 * side[0])) for side in pair]
    assert halves[0] != halves[1] and not root_code.alike(*pair)
    # a float32 that differs and rounds to the same float16 is no close call
    edge = (1030.25 + 2.0**-14) / 1025
    pair = np.array([np.nextafter(edge, 0)]), np.array([np.nextafter(edge, 2)])
    assert np.float32(1025 * pair[0][0]) != np.float32(1025 * pair[1][0]) and root_code.alike(*pair)


def test_a_scale_that_depends_on_the_root_is_asked_of_torch(smoother: Smoother, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[bool]()
    find = Smoother.find

    def doubtful(self: Smoother, known: Known, exact: bool = False) -> Bound:
        asked.append(exact)
        bound = find(self, known, exact)
        return bound if exact else replace(bound, doubt=(bound.activation, bound.activation * 1.001))

    monkeypatch.setattr(Smoother, "find", doubtful)
    known = Known(a=np.full(129, 0.71, np.float16), b=np.full(129, 0.1, np.float16))
    value = SmoothValue(smoother, "scale", "x", (1,), 23.7, "a", inputs=129)
    assert value.bind(known, "").bound == bound_to(smoother, known, "a", exact=True) and asked == [False, True]


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.003, 2.0**-140, 5.0])
def test_fp8_tensor(source: DType, scale: float) -> None:
    made = Fp8Tensor("k", number=float(np.float32(scale)))
    check(made, weights(48, 129, source), source)
    check(made, any_bits(64, 64, source, 4), source, start=5, stride=70)
    bad = weights(20, 64, source)
    bad[16, 3], bad[17, 9], bad[18, 30], bad[19] = NAN, INF, -INF, NAN
    assert check(made, bad, source) == EncodeStats(nonfinite=3 + 64)


def test_fp8_tensor_around_every_halfway_point() -> None:
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (every[:-1] + every[1:]) / 2
    row = torch.cat([every, middle, torch.nextafter(middle, every[1:]), torch.nextafter(middle, every[:-1])])
    check(Fp8Tensor("k", number=1.0), torch.stack([row, -row]), F32)


def test_nothing_is_encoded_before_its_reductions(smoother: Smoother) -> None:
    outs = [np.zeros(64, np.uint8)] * 2
    for made in (SmoothWeight(smoother, F16, None), SmoothNorm(smoother, F16), Fp8Tensor("k")):
        kernel = made.kernel(BF16)
        assert kernel is not None
        with pytest.raises(AssertionError, match="before its reduction"):
            kernel(np.zeros(4, "u2"), 0, 4, 1, 4, outs)


def test_preparing_loads_what_a_run_needs(smoother: Smoother, tmp_path: Path) -> None:
    for source in FLOATS:
        for made in (SmoothWeight(smoother, BF16, 1.0), SmoothNorm(smoother, BF16), Fp8Tensor("k")):
            made.prepare(source)
    from streamconv.kernels import fp8_code, smooth_code

    for function in (smooth_code.smooth_rows, fp8_code.fp8_tensor_rows):
        before = len(function.calls)
        block = weights(16, 64, BF16)
        variant = {"largest": True, "divide": False, "single": True}
        check(encoding(smoother, block, BF16, variant, 1.0), block, BF16)
        check(Fp8Tensor("k", number=1.0), block, BF16)
        assert len(function.calls) == before
