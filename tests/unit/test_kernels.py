"""The fused kernels give the bytes of the torch definitions, bit for bit, and both keep the bounds of their formats."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamconv.checkpoint.dtypes import BF16, F16, F32, DType
from streamconv.quants.base import Codec, EncodeStats
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.layout import FAMILIES
from streamconv.quants.plain import Plain
from streamconv.quants.weight_only import WeightOnly

FLOATS = (BF16, F16, F32)
PAIRS = list(itertools.product(FLOATS, FLOATS))
GUARD = 0xA5
"""Bytes around every output must keep this value."""


def kind(dtype: DType) -> torch.dtype:
    made: torch.dtype = getattr(torch, dtype.torch)
    return made


def from_bits(bits: np.ndarray[Any, Any], dtype: DType) -> torch.Tensor:
    signed = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(bits.astype(dtype.storage).view(signed).copy()).view(kind(dtype))


def any_bits(rows: int, cols: int, dtype: DType, seed: int = 0) -> torch.Tensor:
    """Finite values of every exponent, subnormals and both zeros among them."""
    high = 1 << (8 * dtype.itemsize)
    bits = np.random.RandomState(seed).randint(0, high, (rows, cols), np.uint64)
    block = from_bits(bits.reshape(-1), dtype).reshape(rows, cols)
    return torch.where(torch.isfinite(block), block, torch.zeros((), dtype=block.dtype))


def weights(rows: int, cols: int, dtype: DType, seed: int = 0) -> torch.Tensor:
    """Rows like those of a model, then one of each kind that goes wrong easily; `rows` is cut from the whole."""
    made = torch.Generator().manual_seed(seed)
    at = torch.arange(cols, dtype=torch.float32)
    limits, tiny = torch.finfo(kind(dtype)), torch.finfo(torch.float32).smallest_normal
    quirks = [
        torch.zeros(cols),
        torch.full((cols,), -0.0),
        (at % 257 - 128) / 1024,  # every quotient an integer or a tie
        ((at % 33) - 16) / 32 * 0.5,
        torch.full((cols,), limits.max),
        torch.where(at % 2 == 0, limits.max, limits.min),
        torch.full((cols,), -0.75),  # only negative: -2^(b-1) is reached
        torch.where(at == cols - 1, 3.0, 0.0),  # the last one decides the scale
        torch.where(at == 0, -3.0, 1e-6),
        limits.smallest_normal * (at % 7 - 3) / 4,
        torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)) * (at % 255 - 127) / 256,
        tiny * (at - cols / 2) / cols,  # subnormal in float32, and so is the scale
        2.0**-24 * (at % 5 - 2),  # subnormal in float16
        2.0**-25 * (at % 5 - 2),  # ties at float16's smallest
        0.5 * torch.randn(cols, generator=made) * 2.0**-20,
    ]
    block = torch.cat([torch.stack(quirks), torch.randn(max(1, rows - len(quirks)), cols, generator=made) * 0.05])
    return block[:rows].clamp(limits.min, limits.max).to(kind(dtype))


def fused(encoding: Codec, block: torch.Tensor, source: DType, start: int = 0, stride: int = 0) -> tuple[list[bytes], EncodeStats]:
    """Run the kernel on `block`, set `start` elements into an array whose rows are `stride` long."""
    kernel = encoding.kernel(source)
    assert kernel is not None
    rows, cols = block.shape
    stride = stride or cols
    flat = np.full(start + rows * stride, 0x7F7F, source.storage)
    data = block.contiguous().reshape(-1).view(torch.uint8).numpy().view(source.storage).reshape(rows, cols)
    for r in range(rows):
        flat[start + r * stride : start + r * stride + cols] = data[r]
    sizes = [part.nbytes(rows) for part in encoding.parts(rows, cols)]
    spaces = [np.full(64 + size + 64, GUARD, np.uint8) for size in sizes]
    outs = [space[64 : 64 + size] for space, size in zip(spaces, sizes, strict=True)]
    stats = kernel(flat, start, stride, rows, cols, outs)
    for space, size in zip(spaces, sizes, strict=True):
        assert (space[:64] == GUARD).all() and (space[64 + size :] == GUARD).all(), "wrote outside its output"
    return [out.tobytes() for out in outs], stats


def defined(encoding: Codec, block: torch.Tensor) -> tuple[list[bytes], EncodeStats]:
    stats = EncodeStats()
    return [part.numpy().tobytes() for part in encoding.encode(block, stats)], stats


def check(encoding: Codec, block: torch.Tensor, source: DType, **place: int) -> EncodeStats:
    got, found = fused(encoding, block, source, **place)
    want, wanted = defined(encoding, block)
    for part, left, right in zip(encoding.parts(*block.shape), got, want, strict=True):
        if left != right:
            wrong = np.flatnonzero(np.frombuffer(left, np.uint8) != np.frombuffer(right, np.uint8))
            raise AssertionError(f"{part.role}: {wrong.size} of {len(left)} bytes differ, rows {set(wrong // part.record_bytes)}")
    assert found == wanted
    return found


KINDS = [pytest.param(bits, family, id=f"int{bits}{family}") for bits, family in itertools.product((8, 4), FAMILIES)]


@pytest.mark.parametrize(("source", "model"), PAIRS, ids=str)
@pytest.mark.parametrize(("bits", "family"), KINDS)
def test_weight_only(bits: int, family: str, source: DType, model: DType) -> None:
    encoding = WeightOnly(bits, family, model)
    check(encoding, weights(32, 192, source), source)
    check(encoding, any_bits(16, 64, source), source)


@pytest.mark.parametrize(("bits", "family"), KINDS)
def test_weight_only_in_columns_of_a_wider_block_and_odd_sizes(bits: int, family: str) -> None:
    encoding = WeightOnly(bits, family, BF16)
    step = encoding.row_align
    for rows, cols, start, stride in ((step, 64, 7, 200), (step * 5, 320, 64, 448), (step * 3, 64, 0, 64)):
        check(encoding, weights(60, cols, BF16)[-rows:], BF16, start=start, stride=stride)
    if family in ("sm70", "sm90-0.16"):  # one channel to a record: K need not fill a tile
        check(encoding, weights(19, 40, F32), F32)
    if family == "sm90":
        check(encoding, weights(19, 96, F32), F32)


@pytest.mark.parametrize(("bits", "family"), KINDS)
def test_weight_only_of_values_that_should_have_stopped_the_run(bits: int, family: str) -> None:
    inf, nan = float("inf"), float("nan")
    for source, model in ((BF16, BF16), (F32, F16), (F16, F32), (BF16, F16)):
        block = weights(24, 64, source)
        block[16:20, 3], block[17:21, 9], block[18:22, 30] = nan, inf, -inf
        block[22], block[23] = nan, inf
        encoding = WeightOnly(bits, family, model)
        found = check(encoding, block, source)
        assert found.nonfinite - found.overflow == 4 + 4 + 4 + 64 + 64
        parts = encoding.encode(block, EncodeStats())
        assert torch.isfinite(encoding.decode(parts, 24, 64)[16:]).all()


def test_a_finite_value_lost_in_the_cast_is_counted_as_both() -> None:
    block = torch.full((2, 64), 0.25)
    block[0, 5], block[0, 6], block[1, 7] = 65519.0, 65520.0, -1e30
    assert check(WeightOnly(8, "sm80", F16), block, F32) == EncodeStats(nonfinite=2, overflow=2)
    assert check(Plain(F16), block, F32) == EncodeStats(nonfinite=0, overflow=2)


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize(("bits", "family"), KINDS)
def test_tiles_make_the_whole(bits: int, family: str, source: DType) -> None:
    encoding = WeightOnly(bits, family, F16)
    block = weights(24, 128, source)
    whole, found = fused(encoding, block, source)
    step = encoding.row_align
    tiles = [fused(encoding, block[at : at + step], source) for at in range(0, 24, step)]
    assert [b"".join(tile[0][part] for tile in tiles) for part in range(2)] == whole
    total = EncodeStats()
    for tile in tiles:
        total.add(tile[1])
    assert total == found


@pytest.mark.parametrize(("bits", "family"), KINDS)
@pytest.mark.parametrize("model", FLOATS, ids=str)
def test_weight_only_comes_back_within_half_a_step(bits: int, family: str, model: DType) -> None:
    block = torch.randn(32, 128, generator=torch.Generator().manual_seed(3)).to(kind(model))
    encoding, half = WeightOnly(bits, family, model), 1 << (bits - 1)
    back = encoding.decode(encoding.encode(block, EncodeStats()), 32, 128)
    step = block.float().abs().amax(1, keepdim=True) / half
    clipped = block.float() > step * (half - 0.5)  # the top of the range lost its code: up to a whole step
    assert ((back - block.float()).abs() <= torch.where(clipped, step, step / 2) * 1.0001).all()


def test_weight_only_rounds_half_away_from_zero_right_at_the_half() -> None:
    """The scale is 1: quotients around every half, and the floats next to it, where a sum in float32 is easily rounded up."""
    halves = torch.arange(-128, 127) + 0.5
    sides = [halves]
    for towards in (-1e9, 1e9):
        for _ in range(3):
            sides.append(torch.nextafter(sides[-1] if _ else halves, torch.tensor(towards)))
    row = torch.cat([*sides, torch.tensor([-128.0]), torch.zeros(6)])
    check(WeightOnly(8, "sm80", F32), torch.stack([row, -row]), F32)
    for made in (row, -row):
        step = float(made.abs().max()) / 128
        codes = WeightOnly(8, "sm90-0.16", F32).encode(made[None], EncodeStats())[0].view(torch.int8)
        exact = made.double() / step
        wanted = (exact.abs() + 0.5).floor() * exact.sign()
        assert torch.equal(codes.double(), wanted.clamp(-128, 127))


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_cast(source: DType, target: DType) -> None:
    check(Plain(target), weights(40, 37, source), source)
    check(Plain(target), any_bits(64, 257, source, 1), source)
    check(Plain(target), any_bits(5, 1, source, 2), source, start=3, stride=9)
    infinite = weights(18, 33, source)
    infinite[4, 0], infinite[16, 32] = float("inf"), float("-inf")
    check(Plain(target), infinite, source)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_cast_by_way_of_float16(source: DType, target: DType) -> None:
    encoding = Plain(target, via_half=True)
    check(encoding, weights(40, 37, source), source)
    check(encoding, any_bits(64, 257, source, 1), source, start=3, stride=300)
    if source != F16:
        every = from_bits(np.arange(1 << 16), BF16).to(kind(source))
        check(encoding, every[torch.isfinite(every)].reshape(2, -1), source)


@pytest.mark.parametrize("source", [BF16, F16], ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_cast_of_every_finite_pattern(source: DType, target: DType) -> None:
    every = from_bits(np.arange(1 << 16), source)
    check(Plain(target), every[torch.isfinite(every)].reshape(2, -1), source)


@pytest.mark.parametrize("target", [BF16, F16], ids=str)
def test_cast_of_float32_around_every_halfway_point(target: DType) -> None:
    every = from_bits(np.arange(1 << 15), target).float()
    every = every[torch.isfinite(every)]
    middle = ((every[:-1].double() + every[1:].double()) / 2).float()
    around = torch.stack([middle, torch.nextafter(middle, every[1:]), torch.nextafter(middle, every[:-1])])
    check(Plain(target), torch.cat([around, -around]), F32)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_nan_stays_nan(source: DType, target: DType) -> None:
    block = weights(4, 33, source)
    block[1, 5], block[3, 32] = float("nan"), -float("nan")
    got, found = fused(Plain(target), block, source)
    back = torch.frombuffer(bytearray(got[0]), dtype=kind(target)).reshape(4, 33)
    assert torch.equal(torch.isnan(back), torch.isnan(block)) and found == EncodeStats()


def test_add_one_widens_bfloat16_and_stays_with_the_definition() -> None:
    for source in FLOATS:
        assert Plain(F16, add_one=True, vector=True).kernel(source) is None
    # 1 + 2^-9 needs a tenth bit of mantissa: lost if the sum were made in bfloat16
    made = Plain(F16, add_one=True, vector=True).encode(torch.tensor([[2.0**-9]]).bfloat16(), EncodeStats())[0]
    assert made.view(torch.float16).item() == 1 + 2.0**-9
    assert Plain(F16, add_one=True).encode(torch.tensor([[2.0**-12]]).half(), EncodeStats())[0].view(torch.float16).item() == 1.0


def test_plain_shapes() -> None:
    assert Plain(BF16).parts(6, 4)[0].shape == (6, 4)
    assert Plain(BF16).parts(6, 4, experts=2)[0].shape == (2, 6, 4)
    part = Plain(F32, vector=True, suffix="bias").parts(6, 1)[0]
    assert (part.role, part.shape, part.record_bytes) == ("bias", (6,), 4)


@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_fp8_rowwise(source: DType) -> None:
    check(Fp8Rowwise(), weights(48, 129, source), source)
    check(Fp8Rowwise(), any_bits(64, 64, source, 4), source, start=5, stride=70)
    check(Fp8Rowwise(-0.1, 0.07), weights(48, 64, source), source)
    for model in FLOATS:  # rounded to the model dtype first
        check(Fp8Rowwise(model=model), weights(48, 129, source), source)
        check(Fp8Rowwise(model=model), any_bits(64, 64, source, 4), source)
    # one quotient for each binade of e4m3 and far below its subnormals
    ramp = torch.logspace(-30, 0, 4096, base=2.0).reshape(16, 256) * torch.tensor([1.0, -1.0]).repeat(128)
    ramp[:, 0] = 1.75
    check(Fp8Rowwise(), ramp.to(kind(source)), source)


def test_fp8_rowwise_around_every_halfway_point() -> None:
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (every[:-1] + every[1:]) / 2
    row = torch.cat([every, middle, torch.nextafter(middle, every[1:]), torch.nextafter(middle, every[:-1])])
    check(Fp8Rowwise(), torch.stack([row, -row]), F32)  # its largest is 448: the scale is 1
    made, scale = Fp8Rowwise().encode(row[None], EncodeStats())
    assert scale.view(torch.float32).item() == 1.0 and torch.equal(made[: every.numel()], torch.arange(0x7F, dtype=torch.uint8))


@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_fp8_rowwise_of_values_that_should_have_stopped_the_run(source: DType) -> None:
    block = weights(20, 64, source)
    block[16, 3], block[17, 9], block[18, 30], block[19] = float("nan"), float("inf"), float("-inf"), float("nan")
    assert check(Fp8Rowwise(), block, source) == EncodeStats(nonfinite=3 + 64)


def test_fp8_rowwise_comes_back_within_its_rounding() -> None:
    encoding, block = Fp8Rowwise(), torch.randn(32, 128, generator=torch.Generator().manual_seed(5))
    back = encoding.decode(encoding.encode(block, EncodeStats()), 32, 128)
    scale = block.abs().amax(1, keepdim=True) / 448
    # three bits of mantissa, and below 2^-6 a unit of 2^-9
    assert ((back - block).abs() <= torch.maximum(block.abs() * 2.0**-4, scale * 2.0**-10) * 1.0001).all()
    block[0, 0] = 5000.0
    assert encoding.values(block)[0, 0] == 1200.0
    assert encoding.decode(encoding.encode(block, EncodeStats()), 32, 128)[0, 0] == 1200.0


@pytest.mark.parametrize("missing", [False, True])
def test_kernels_work_without_a_folder_to_cache_in(missing: bool, tmp_path: Path) -> None:
    """A file where the cache folder should be: nobody, root included, can write below it."""
    (tmp_path / "file").write_text("")
    env = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    if missing:
        env["XDG_CACHE_HOME"] = str(tmp_path / "file")
    else:
        env["NUMBA_CACHE_DIR"] = str(tmp_path / "file" / "cache")
    code = (
        "import numpy as np; from streamconv.kernels.rows import to_bf16\n"  # what is small compiles soon
        "assert to_bf16(np.uint32(0x3F800000)) == 0x3F80"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
