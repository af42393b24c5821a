"""GB/s of source that the fused CPU kernels make on one core, beside their torch definitions on one thread; "its errors": the
kernel of `--verify inline`, which decodes and compares.

    python -m benchmarks.kernels [--rows 512] [--cols 4096] [--only PART OF A NAME] [--out benchmarks/results/kernels.json]

Best of several tries, processor time, a tile that stays in the cache: the ceiling, not a conversion.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamconv.checkpoint.dtypes import BF16, F16, F32, DType
from streamconv.checkpoint.stored_codes import NIBBLES
from streamconv.kernels import decode_code
from streamconv.quants.base import Codec, EncodeStats
from streamconv.quants.fp8_rowwise import Fp8Rowwise
from streamconv.quants.fp8_tensor import Fp8Tensor
from streamconv.quants.plain import Plain
from streamconv.quants.smoothing import Bound, InputChannelAmax
from streamconv.quants.smoothquant import SmoothWeight
from streamconv.quants.weight_only import WeightOnly
from streamconv.targets.hf.recipes import RECIPES, CodecOptions

ROOT = Path(__file__).parent.parent


def best(work: Callable[[], object], tries: int) -> float:
    """Seconds of the quickest of `tries`, after one that is not counted."""
    work()
    seconds = []
    for _ in range(tries):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def encodings(cols: int) -> list[tuple[str, Codec, DType]]:
    """Name, encoding and source dtype of everything that is timed."""
    smoother = np.exp2(np.random.default_rng(0).uniform(-3, 3, cols))
    channel, tensor = Bound(smoother, 0.37, None), Bound(smoother, 0.37, 3.0)
    nothing: Any = None  # a smoother's description: these are bound already
    return [
        ("int8 BF16 to BF16", WeightOnly(8, "sm80", BF16), BF16),
        ("int8 BF16 to FP16", WeightOnly(8, "sm80", F16), BF16),
        ("int4 BF16 to BF16", WeightOnly(4, "sm80", BF16), BF16),
        ("int4 BF16 to FP16", WeightOnly(4, "sm80", F16), BF16),
        ("FP8 per channel, BF16", Fp8Rowwise(), BF16),
        ("FP8 per tensor, BF16", Fp8Tensor("key", number=0.003), BF16),
        ("SmoothQuant per channel, BF16 to FP16", SmoothWeight(nothing, F16, 2.0, bound=channel), BF16),
        ("SmoothQuant per channel, FP32 to BF16", SmoothWeight(nothing, BF16, 2.0, bound=channel), F32),
        ("SmoothQuant per tensor, BF16 to FP16", SmoothWeight(nothing, F16, 2.0, (("w", "key"),), bound=tensor), BF16),
        ("cast BF16 to FP16", Plain(F16), BF16),
        ("cast FP32 to BF16", Plain(BF16), F32),
    ]


def hf_encodings() -> Iterator[tuple[str, Codec, DType]]:
    """The same of every format of `--to hf`, as `convert` runs them unless told otherwise."""
    for recipe in RECIPES:
        encoding = recipe.codec(CodecOptions(BF16, 128, "float32", "key"))
        bound = encoding.bind(_Given(), "weight") if encoding.needs else encoding
        yield f"{recipe.quant}, {recipe.container}", bound, BF16


class _Given:
    """The maximum that a format needs first."""

    def get(self, key: str) -> np.ndarray[Any, Any]:
        return np.array(0.1, np.float32)


def decoders(rows: int, cols: int) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, work and stored bytes of sources that are decoded on the way."""
    noise = np.random.default_rng(0)
    out = np.empty(rows * cols, np.uint16)
    for name, code, per_row, per_col in (
        ("decode FP8 tiles to BF16", "e4m3", 128, 128), ("decode FP8 per channel to BF16", "e4m3", 1, cols),
        ("decode INT8 to BF16", "int8", 1, cols), ("decode NVFP4 to BF16", "e2m1", 1, 16), ("decode INT4 to BF16", "uint4", 1, 128),
    ):  # fmt: skip
        width = cols // 2 if code in NIBBLES else cols
        stored = noise.integers(0, 120, rows * width, np.uint8)
        scales = noise.uniform(0.5, 1, (-(-rows // per_row), -(-cols // per_col))).astype(np.float32)
        none = np.empty((0, 0), np.float32)  # no zero points, no factors of inputs
        what = (stored, decode_code.CODES[code], scales, none, none.reshape(-1), 0, per_row, per_col, rows, cols, 2, out)
        yield name, functools.partial(decode_code.decode_rows, *what), stored.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, cols = args.rows, args.cols
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02
    told = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    results: dict[str, dict[str, float]] = told.get("results", {})

    def note(name: str, size: int, kernel: Callable[[], object], definition: Callable[[], object] | None) -> None:
        if args.only not in name:
            return
        results[name] = {"kernel GB/s": size / best(kernel, 9) / 1e9}
        if definition is not None:
            results[name]["torch GB/s"] = size / best(definition, 3) / 1e9
        print(f"| {name} | {results[name]['kernel GB/s']:.1f} | {results[name].get('torch GB/s', 0):.2f} |", flush=True)

    def flat(source: DType) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
        block = values.to(getattr(torch, source.torch))
        return block, block.reshape(-1).view(torch.uint8).numpy().view(source.storage)

    for name, encoding, source in (*encodings(cols), *hf_encodings()):
        block, stored = flat(source)
        kernel = encoding.kernel(source)
        assert kernel is not None, f"{name} has no kernel"
        outs = [np.empty(part.nbytes(rows), np.uint8) for part in encoding.parts(rows, cols)]
        note(
            name, rows * cols * source.itemsize,
            lambda k=kernel, s=stored, o=outs: k(s, 0, cols, rows, cols, o),
            lambda e=encoding, b=block: e.encode(b, EncodeStats()),
        )  # fmt: skip
        errors, screen = encoding.error_kernel(source), encoding.screen(source)
        if errors is None and screen is not None:
            errors = functools.partial(screen.errors, source)
        kernel(stored, 0, cols, rows, cols, outs)
        if errors is not None and encoding.quantizes:
            if errors(stored, 0, cols, rows, cols, outs) is None:
                raise SystemExit(f"{name}: the kernel leaves these values to torch")
            work = functools.partial(errors, stored, 0, cols, rows, cols, outs)
            note(f"{name}, its errors", rows * cols * source.itemsize, work, None)
    block, stored = flat(BF16)
    maxima: Any = InputChannelAmax("key")
    note("column maxima, BF16", rows * cols * 2, lambda: maxima.kernel(BF16)(stored, rows, cols), lambda: maxima.tile(block, None))
    for name, work, size in decoders(rows, cols):
        note(name, size, work, None)
    args.out.write_text(json.dumps({"rows": rows, "cols": cols, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
