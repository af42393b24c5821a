"""The quick look of `--verify inline`: the sums of the definition, and no broken byte that the definition finds passes it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamconv import api
from streamconv.checkpoint.dtypes import BF16, DTYPES, F16, F32
from streamconv.errors import VerifyError
from streamconv.options import Resources
from streamconv.quants.base import Codec, EncodeStats, Errors
from streamconv.quants.fp8_block import Fp8Block
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.fp8_tensor import Fp8Tensor
from streamconv.quants.int_group import IntGroup, PairedRtn, round_to_nearest
from streamconv.quants.mx import Mx
from streamconv.quants.nvfp4 import NvFp4, SharedScale, shared_scale
from streamconv.run import inline_check
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

ROWS, COLS, TOP = 130, 128, 0.125
CODECS: dict[str, Codec] = {
    "fp8 rows": Fp8Rowwise(),
    "fp8 rows bf16": Fp8Rowwise(-math.inf, math.inf, None, 0.0, 1.0, BF16, BF16),
    "fp8 tiles": Fp8Block(),
    "fp8 tiles f16": Fp8Block(scale=F16, quotient=F16),
    "fp8 tiles, multiplied": Fp8Block(multiply=True),
    "fp8 tensor": Fp8Tensor("", number=TOP / 448),
    "nvfp4": NvFp4("", "divisor", BF16, number=shared_scale(TOP, "divisor", BF16)),
    "nvfp4 modelopt": NvFp4("", "multiplier", F32, number=shared_scale(TOP, "multiplier", F32)),
    "mxfp4": Mx("fp4", "rounded", BF16),
    "mxfp8": Mx("fp8", "rounded", F32),
    "mxfp8 modelopt": Mx("fp8", "ceiling"),
    "int4 words": IntGroup(4, 32, 7.5, 1.0, BF16, BF16, "words"),
    "int8 words": IntGroup(8, 0, 127.5, 1.0, F16, F16, "words"),
    "int8 bytes": IntGroup(8, 0, 127.5, 1.0, F32, F32, "bytes"),
    "int4 pairs": IntGroup(4, 64, 8.0, 1.0, BF16, BF16, "pairs"),
    "W4A16_AWQ": round_to_nearest(64, F16),
}


def weights(source: str) -> torch.Tensor:
    made = (torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(3)) * 0.02).clamp(-TOP, TOP)
    made[3] = 0
    return made.to(getattr(torch, DTYPES[source].torch))


def defined(codec: Codec, block: torch.Tensor, parts: Any) -> Errors:
    """By `decode` and `error`, in float64."""
    want = codec.values(block).double()
    gap = codec.decode(parts, ROWS, COLS).double() - want
    wrong = int((~(gap.abs() <= codec.error(block).double() * 1.001)).sum())
    gap = gap.nan_to_num()
    return Errors(float((gap**2).sum()), float((want**2).sum()), float(gap.abs().max()), float(want.abs().max()), wrong)


def looked(codec: Codec, block: torch.Tensor, parts: Any) -> Errors | None:
    """By the kernel."""
    source = next(kind for kind in DTYPES.values() if getattr(torch, kind.torch, None) == block.dtype)
    screen, flat = codec.screen(source), block.reshape(-1).view(torch.uint8).numpy().view(source.storage)
    assert screen is not None
    return screen.errors(source, flat, 0, COLS, ROWS, COLS, [part.numpy() for part in parts])


@pytest.mark.parametrize(
    ("name", "source"), [*((name, "BF16") for name in CODECS), ("fp8 rows", "F16"), ("int4 words", "F32"), ("nvfp4", "F16")]
)
def test_sums_and_broken_bytes(name: str, source: str) -> None:
    codec, block = CODECS[name], weights(source)
    parts = codec.encode(block, EncodeStats())
    found, told = looked(codec, block, parts), defined(codec, block, parts)
    assert found is not None and found.wrong == told.wrong == 0
    assert dataclasses.astuple(found)[:4] == pytest.approx(dataclasses.astuple(told)[:4], rel=1e-6)
    flagged = 0
    for number, part in enumerate(parts):
        for at in range(0, part.numel(), part.numel() // 3 + 1):
            for bit in (1, 3, 6):
                broken = [each.clone() for each in parts]
                broken[number][at] ^= 1 << bit
                if defined(codec, block, broken).wrong:
                    flagged += 1
                    assert looked(codec, block, broken) is None, (number, at, bit)
    assert flagged > 3


@pytest.mark.parametrize("name", ["int4 words", "int8 bytes"])
def test_a_scale_that_is_too_coarse_is_seen(name: str) -> None:
    """Each code is the nearest one then."""
    codec: Any = CODECS[name]
    parts = dataclasses.replace(codec, divisor=codec.divisor / 4).encode(weights("BF16"), EncodeStats())
    assert round_to_nearest(64, F16).screen(F32) is None  # its weights are cast first
    assert defined(codec, weights("BF16"), parts).wrong and looked(codec, weights("BF16"), parts) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_left_to_the_definition(value: float) -> None:
    block = weights("BF16")
    block[7, 9] = value
    for codec in (CODECS["fp8 rows bf16"], CODECS["mxfp8"]):
        assert looked(codec, block, codec.encode(block, EncodeStats())) is None


@pytest.mark.parametrize(
    "target",
    [
        *(HuggingFace(quant=quant) for quant in ("fp8_dynamic", "nvfp4a16", "mxfp8")),
        HuggingFace(quant="w4a16", group_size=32),
        TensorRTLLM(quant="int4_awq", group_size=64),
    ],
    ids=lambda target: f"{target.key} {target.quant}",
)
def test_a_run_is_looked_at_quickly_and_a_broken_kernel_is_found(target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sound one nothing is decoded."""
    model, inline = tiny.write(tmp_path / "model"), Resources(verify_inline=True, tile_rows=256)

    def decoded(*of: Any) -> Errors:
        raise AssertionError("decoded")

    with monkeypatch.context() as quick:
        quick.setattr(inline_check, "_decoded", decoded)
        api.convert(model, tmp_path / "sound", target, inline)
    for kind in {type(codec) for codec in CODECS.values()} - {PairedRtn}:  # whose kernel is IntGroup's
        monkeypatch.setattr(kind, "kernel", broken(kind.kernel))
    with pytest.raises(VerifyError, match="decoded values are up to"):
        api.convert(model, tmp_path / "out", target, inline)


def test_a_shared_scale_is_compared() -> None:
    scale = SharedScale("", "divisor", BF16, number=0.5)
    look = scale.error_kernel(F32)
    assert look is not None
    none = np.empty(0, np.float32)
    found = [look(none, 0, 1, 1, 1, [np.array([value], np.float32).view(np.uint8)]) for value in (0.5, 0.25, math.nan)]
    assert [each.wrong for each in found] == [0, 1, 1] and (found[0].noise, found[1].noise, found[1].peak) == (0, 0.0625, 0.5)


def broken(real: Any) -> Any:
    """A kernel that gets one code wrong, by much."""

    def kernel(self: Codec, source: Any) -> Any:
        made = real(self, source)

        def run(*arguments: Any) -> EncodeStats:
            found = made(*arguments)
            codes: np.ndarray[Any, Any] = arguments[-1][0]
            codes[5] ^= 0x44
            return found

        return run

    return kernel
