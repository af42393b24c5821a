"""What FP8 per tensor and the FP8 KV cache need of a calibration: scales that go with the matrices."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import F8_E4M3, F32
from streamconv.checkpoint.rows import NoSource, SourceTensor
from streamconv.errors import printable
from streamconv.planning.draft import Draft
from streamconv.quants.fp8_given import Fp8Shared
from streamconv.quants.fp8_tensor import Fp8Scale, Fp8Tensor, WeightMaximum
from streamconv.quants.plain import Plain

_LARGEST = 448.0


def add_scales(builder: Draft, ranges: Ranges, tensors: Mapping[str, SourceTensor]) -> None:
    """Describe both scales of every FP8 matrix that was fed: one for the fused matrix, the same on all ranks.

    The largest weight is taken over the whole sources, the input over all of them (q, k and v see the same one).

    Raises:
        TensorError: ranges are missing or wrong.
    """
    fed = {matrix: feeds for matrix, feeds in builder.fed(tensors).items() if isinstance(builder.encoding(matrix), Fp8Tensor)}
    inputs = {_module(feed.source.name) + ".x": feed.source.cols for feeds in fed.values() for feed in feeds}
    ranges.check(inputs)
    reduced: set[tuple[str, str]] = set()
    for matrix, feeds in fed.items():
        encoding = builder.encoding(matrix)
        assert isinstance(encoding, Fp8Tensor)
        sources = {feed.source.name: feed.source for feed in feeds}
        for name, source in sources.items():
            if (encoding.key, name) not in reduced:
                reduced.add((encoding.key, name))
                builder.reduce(source, WeightMaximum(encoding.key))
        file, path = builder.place(matrix)
        scale = builder.matrix(file, path, 1, 1, Fp8Scale(encoding.key))
        builder.feed(scale, NoSource(f"weights_scaling_factor, {encoding.key}"), 0, 1)
        largest = ranges.amax([_module(name) + ".x" for name in sources])
        builder.constant(file, f"{path}.activation_scaling_factor", F32, (1,), struct.pack("<f", largest / _LARGEST))


def add_given_scales(builder: Draft, fp8: Mapping[str, tuple[float, float]]) -> list[str]:
    """Describe the scales that the source brings along: for a fused matrix the largest of each kind. Gives what is wrong.

    Args:
        fp8: weight name -> (its scale, that of its input).
    """
    problems = []
    for matrix, feeds in builder.fed(fp8).items():
        (file, path), encoding = builder.place(matrix), builder.encoding(matrix)
        if not (isinstance(encoding, Fp8Shared) or encoding == Plain(F8_E4M3)):
            problems.append(f"{printable(feeds[0].source.name)} is FP8, but TensorRT-LLM keeps {path} in the model dtype")
        elif sum(feed.stop - feed.start for feed in feeds) != builder.filled(matrix):
            problems.append(f"{printable(feeds[0].source.name)} is FP8 and other weights that {path} fuses are not")
        sources = dict.fromkeys(feed.source.name for feed in feeds)
        for suffix, kind in (("weights_scaling_factor", 0), ("activation_scaling_factor", 1)):
            builder.constant(file, f"{path}.{suffix}", F32, (1,), struct.pack("<f", max(fp8[name][kind] for name in sources)))
    return list(dict.fromkeys(problems))


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
