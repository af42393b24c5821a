"""Kernels of the Hugging Face formats against their torch definitions, bit for bit; decoding within the stated bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from streamconv.checkpoint.dtypes import BF16, F16, F32, DType
from streamconv.quants.awq_words import LEAST, AwqWords
from streamconv.quants.base import Codec, EncodeStats
from streamconv.quants.fp8_block import Fp8Block
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.int_group import IntGroup
from streamconv.quants.mx import Mx
from streamconv.quants.nvfp4 import NvFp4, shared_scale
from streamconv.quants.packing import Packing
from streamconv.quants.weight_only import WeightOnly
from tests.unit.test_kernels import any_bits, check, weights

EPS = {F32: 2.0**-23, F16: 2.0**-10, BF16: 2.0**-7}
INF = float("inf")


def codecs(kind: DType) -> list[Codec]:
    """Every codec in its three arithmetics: float32, scales in `kind`, quotients in `kind` too; and in ModelOpt's."""
    made: list[Codec] = []
    for scale, quotient in ((F32, F32), (kind, F32), (kind, kind)):
        zero = EPS[scale]
        made += [Fp8Rowwise(-INF, INF, None, 0.0, zero, scale, quotient), Fp8Block(128, zero, 0.0, scale, quotient)]
        made += [IntGroup(8, 0, 127.5, zero, scale, quotient, "bytes"), IntGroup(8, 32, 127.5, zero, scale, quotient, "words")]
        made += [IntGroup(4, 32, 7.5, zero, scale, quotient, "words"), IntGroup(4, 64, 8.0, zero, scale, quotient, "words")]
    made += [Fp8Block(multiply=True), IntGroup(4, 64, 7.0, 1.0, F32, F32, "pairs"), Mx("fp8", "ceiling")]
    made += [Mx(element, "rounded", read) for element in ("fp4", "fp8") for read in (F32, kind)]
    return made


def shared(block: torch.Tensor, kind: DType) -> list[Codec]:
    top = float(torch.nan_to_num(block.float(), 0.0, 0.0, 0.0).abs().max())
    rules = (("divisor", F32), ("divisor", kind), ("multiplier", F32))
    return [NvFp4("key", rule, rounding, number=shared_scale(top, rule, rounding)) for rule, rounding in rules]  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [F32, F16, BF16], ids=str)
def test_kernels_give_the_bytes_of_the_definitions(source: DType) -> None:
    for block in (weights(130, 192, source), any_bits(34, 64, source, 4)):
        for codec in codecs(source) + shared(block, source):
            check(codec, block, source)
    block = weights(66, 64, source)
    for codec in codecs(source) + shared(block, source):
        check(codec, block, source, start=7, stride=100)


@pytest.mark.parametrize("source", [F32, F16, BF16], ids=str)
def test_what_is_decoded_lies_within_the_bound(source: DType) -> None:
    block = weights(130, 192, source)
    block = torch.where(block.float().abs() > 1e30, 0.0, block)  # the bounds are those of rows that overflow nothing
    for codec in codecs(source) + shared(block, source):
        parts = [part.clone() for part in codec.encode(block, EncodeStats())]
        gap = (codec.decode(parts, *block.shape) - codec.values(block)).abs()
        over = gap - codec.error(block)
        assert bool((over <= 0).all()), f"{codec}: {float(over.max())} in row {int(over.amax(1).argmax())}"


@pytest.mark.parametrize("packing, bits", [("words", 4), ("words", 8), ("bytes", 8), ("pairs", 4)])
def test_groups_that_split_a_pair_of_columns(packing: Packing, bits: int) -> None:
    for cols, groups in ((45, (0, 1, 3, 15)), (36, (0, 2, 3, 6, 12))):
        for group, quotient in itertools.product(groups, (F32, BF16)):
            check(IntGroup(bits, group, 7.5, EPS[F32], F32, quotient, packing), weights(30, cols, BF16), BF16)


@pytest.mark.parametrize("source", [F32, F16, BF16], ids=str)
def test_groups_of_input_channels(source: DType) -> None:
    spoilt = weights(64, 72, source, 5)
    spoilt[3, ::7], spoilt[40, 5], spoilt[41, 6], spoilt[:, 9] = INF, -INF, float("nan"), -0.0
    kind = F16 if source == F32 else source
    for symmetric in (None, IntGroup(4, 32, 8.0, 1.0, kind, F32, "words", LEAST)):
        for block in (weights(64, 72, source), any_bits(64, 72, source, 4), spoilt):
            check(AwqWords(32, kind, symmetric), block, source, start=7, stride=101)


def test_every_bfloat16_weight_beside_every_maximum() -> None:
    """Of one power of two, down to 2**-5; both signs."""
    tops = torch.arange(0x3F80, 0x4000, dtype=torch.int16)
    weights_of = [torch.arange(0x3D00, int(top) + 1, dtype=torch.int16) for top in tops]
    rows = [torch.nn.functional.pad(line, (0, -len(line) % 15)).reshape(-1, 15) for line in weights_of]
    block = torch.cat([torch.cat([top.expand(len(line), 1), line], 1) for top, line in zip(tops, rows, strict=True)]).view(torch.bfloat16)
    block = torch.cat([block, -block], 1)
    halves = [NvFp4("key", rule, BF16, number=shared_scale(1.99, rule, BF16)) for rule in ("divisor", "multiplier")]
    for codec in (*halves, Mx("fp4"), Mx("fp8"), *(IntGroup(4, 16, divisor, 1.0, F32, F32, "words") for divisor in (7.0, 7.5))):
        check(codec, block, BF16)
    check(AwqWords(32, BF16), block[: len(block) // 8 * 8].T.contiguous(), BF16)


def test_every_bfloat16_beside_maxima_at_the_ends_of_mxfp4() -> None:
    """Every value up to a maximum whose exponent byte is 0 to 4, usual, or so large that quotients vanish; -0 and groups of zeros."""
    powers = [2.0**-133, 2.0**-126, *(2.0**exponent for exponent in (-125, -124, -123, -122, -121, -9, 0, 15, 16, 17, 18, 19, 126, 127))]
    tops = torch.tensor(powers, dtype=torch.bfloat16)
    lines = []
    for top in (*tops, *(tops * 1.7421875), *(tops * 1.75)):
        every = torch.arange(int(top.view(torch.int16)) + 1, dtype=torch.int32).to(torch.int16)
        line = torch.nn.functional.pad(every, (0, -len(every) % 31)).reshape(-1, 31)
        lines.append(torch.cat([top.view(torch.int16).expand(len(line), 1), line], 1).view(torch.bfloat16))
    block = torch.cat(lines)
    for codec in (Mx("fp4"), Mx("fp4", "rounded", F16)):
        check(codec, torch.cat([block, -block, torch.zeros_like(block)], 1), BF16)


def test_edges_of_two_tiles_do_not_meet() -> None:
    block = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    codes, scales = Fp8Block().encode(block, EncodeStats())
    grid = scales.view(torch.float32).reshape(2, 3)
    for i in range(2):
        for j in range(3):
            tile = block[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert float(grid[i, j]) == float(np.float32(tile.abs().max().numpy()) / np.float32(448))
    assert codes.numel() == 200 * 300


def test_tiles_too_small_for_a_factor() -> None:
    """Where 448 / amax is infinite the scale is not 0, and the values come back."""
    codec = Fp8Block(multiply=True)
    for value in (1e-44, 1e-39, 1e-37, 1.2e-36):
        block = torch.full((130, 192), value)
        block[:, 1::2] = 0
        check(codec, block, F32)
        parts = codec.encode(block, EncodeStats())
        assert bool((parts[1].view(torch.float32) > 0).all())
        assert bool(((codec.decode(parts, 130, 192) - block).abs() <= value / 16 + 3e-42).all())  # half of the least code


def test_every_bfloat16_beside_chosen_maxima() -> None:
    """All finite values up to a row's maximum: where casting to float16 starts to matter, at its end, and for scales of any mantissa."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    tops = torch.tensor([2.0**-5, 2.0**-5 - 2.0**-13, 0.0400390625, 65280.0, 2.0**-118, 2.0**-119, 3.3e38], dtype=torch.bfloat16)
    block = torch.where(every.abs() <= tops[:, None], every, tops[:, None])
    for model in (F16, BF16):
        check(WeightOnly(8, "sm80", model), torch.cat([block, block[:7]]), BF16)
    for codec in (Fp8Rowwise(-INF, INF, None, 0.0, EPS[F32], F32, F32), Fp8Block(multiply=True), Mx("fp8", "rounded", F32)):
        check(codec, block, BF16)
