"""Scales as tensors of the rank files: those that a quantized source brings along, which follow the rows and columns of their weights, and
those of FP8 per tensor, which a calibration measured."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import F8_E4M3, F32, U8, DType
from streamconv.checkpoint.rows import Extent, NoSource, PackedTensor, SourceTensor, content
from streamconv.checkpoint.shard import Shard
from streamconv.errors import printable
from streamconv.planning.draft import Draft, Fed
from streamconv.quants.awq import PairedRtn
from streamconv.quants.fp8_given import Fp8Shared
from streamconv.quants.fp8_tensor import Fp8Scale, Fp8Tensor, WeightMaximum
from streamconv.quants.gptq import GroupScales
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.import_scales import Stored

_LARGEST = 448.0
"""Of FP8 E4M3."""


def add_imported(builder: Draft, stored: Stored, dtype: DType, shards: Sequence[Shard]) -> list[str]:
    """Describe the scale tensors of every weight that was fed from a packed or FP8 source; gives what is wrong."""
    problems: dict[str, None] = dict.fromkeys(_misfits(builder, stored))
    checked: set[tuple[str, ...]] = set()
    if problems:
        return list(problems)
    for matrix, feeds in builder.fed(stored.scales).items():
        file, name = builder.place(matrix)
        first = stored.scales[feeds[0].source.name]
        if isinstance(feeds[0].source, PackedTensor) and first.zeros is not None:
            problem = _group_scales(builder, file, name, feeds, stored, dtype)
            if problem:
                problems[problem] = None
            continue
        if not first.group:
            vector = Plain(F32, vector=True, suffix="per_channel_scale")
            made = builder.matrix(file, name, sum(feed.stop - feed.start for feed in feeds), 1, vector)
            for feed in feeds:
                builder.feed(made, stored.scales[feed.source.name].scales, feed.start, feed.stop)
            continue
        key = tuple(dict.fromkeys(feed.source.name for feed in feeds))
        if key not in checked:
            checked.add(key)
            if len({_prequant(stored.scales[source].inputs, shards) for source in key}) > 1:
                problems[
                    f"{printable(key[0])}: pre_quant_scale differs among the weights that {name} fuses;"
                    " export with a ModelOpt that shares it"
                ] = None
        _modelopt_scales(builder, file, name, feeds, stored, dtype)
    return list(problems)


def _misfits(builder: Draft, stored: Stored) -> list[str]:
    """FP8 weights that are not copied whole, and packed ones cut inside a word."""
    found = []
    for matrix, feeds in builder.fed(stored.scales).items():
        source, name = feeds[0].source, builder.place(matrix)[1]
        if isinstance(source, PackedTensor):
            step = 32 // source.bits
            if any(feed.start % step or feed.stop % step for feed in feeds):
                found.append(f"{printable(source.name)}: heads of {name} are no multiple of {step} channels, a word")
        elif builder.codec(matrix) != Plain(F8_E4M3):
            found.append(f"{printable(source.name)} is FP8 already, but --quant leaves {name} out of FP8")
        elif sum(feed.stop - feed.start for feed in feeds) != builder.filled(matrix):
            found.append(f"{printable(source.name)} is FP8 and other weights that {name} fuses are not")
    return found


def _prequant(tensor: SourceTensor | None, shards: Sequence[Shard]) -> bytes:
    return b"" if tensor is None else content(tensor, shards)


def _group_scales(builder: Draft, file: int, name: str, feeds: Sequence[Fed], stored: Stored, dtype: DType) -> str | None:
    """`weights_scaling_factor` and `zero`: groups are rows; zeros and scales of all channels side by side."""
    sources = {feed.source.name: feed.source for feed in feeds}
    owned = [stored.scales[source] for source in sources]
    kind = owned[0].scales.dtype
    if len({(one.scales.dtype, one.scales.rows) for one in owned}) > 1:
        return f"{printable(owned[0].scales.name)}: dtype or groups differ among the weights that {name} fuses"
    zeros_at: dict[str, int] = {}
    scales_at: dict[str, int] = {}
    pieces, at = [], 0
    for starts, tensors in (
        (zeros_at, [one.zeros for one in owned]),
        (scales_at, [one.scales for one in owned]),
    ):
        for source, tensor in zip(sources, tensors, strict=True):
            if tensor is None:
                return f"{printable(source)}: no zeros"
            width = tensor.cols * tensor.dtype.itemsize
            starts[source] = at
            pieces.append(Extent(tensor.pieces[0].shard, tensor.pieces[0].begin, tensor.rows, width))
            at += width
    title = " + ".join(one.scales.name for one in owned)
    joined = SourceTensor(title, U8, (owned[0].scales.rows, at), tuple(pieces), 1)
    packed = feeds[0].source
    assert isinstance(packed, PackedTensor)
    bits, size = packed.bits, kind.itemsize
    cols = []
    for feed in feeds:
        start = zeros_at[feed.source.name]
        cols.append((start + feed.start * bits // 8, start + feed.stop * bits // 8))
    for feed in feeds:
        start = scales_at[feed.source.name]
        cols.append((start + feed.start * size, start + feed.stop * size))
    middle = 1 << (bits - 1)
    if packed.packing == "gptq" and stored.v1:
        middle -= 1
    codec = GroupScales(dtype, kind, bits, packed.packing == "awq", middle)
    low, high = feeds[0].cols[0]
    first, last = low // owned[0].group, high // owned[0].group
    made = builder.matrix(file, name, last - first, sum(b - a for a, b in cols), codec)
    builder.feed(made, joined, first, last, cols=_joined(cols))
    return None


def _joined(cols: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges made one."""
    out: list[tuple[int, int]] = []
    for start, stop in cols:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


def _modelopt_scales(builder: Draft, file: int, name: str, feeds: Sequence[Fed], stored: Stored, dtype: DType) -> None:
    owned = stored.scales[feeds[0].source.name]
    low, high = feeds[0].cols[0]
    rows = sum(feed.stop - feed.start for feed in feeds)
    codec = Plain(F32, suffix="weights_scaling_factor")
    made = builder.matrix(file, name, rows, (high - low) // owned.group, codec)
    for feed in feeds:
        scales = stored.scales[feed.source.name]
        builder.feed(made, scales.scales, feed.start, feed.stop, cols=[(low // scales.group, high // scales.group)])
    if owned.inputs is None:
        _unit_prescale(builder, file, name, dtype, high - low)
        return
    vector = Plain(dtype, vector=True, suffix="prequant_scaling_factor")
    builder.feed(builder.matrix(file, name, high - low, 1, vector), owned.inputs, low, high)


def _unit_prescale(builder: Draft, file: int, name: str, dtype: DType, cols: int) -> None:
    one = {"F16": b"\x00\x3c", "BF16": b"\x80\x3f"}[dtype.name]
    builder.constant(file, f"{name}.prequant_scaling_factor", dtype, (cols,), one * cols)


def add_unit_prescales(builder: Draft, tensors: Mapping[str, SourceTensor], dtype: DType) -> None:
    """W4A16_AWQ has a pre-scale for each input channel; weights that are rounded to nearest here have ones."""
    for matrix, feeds in builder.fed(tensors).items():
        if isinstance(builder.codec(matrix), PairedRtn):
            _unit_prescale(builder, *builder.place(matrix), dtype, sum(stop - start for start, stop in feeds[0].cols))


def add_group_scales(builder: Draft, stored: Stored) -> None:
    """Describe scales and zeros [groups, N] of every matrix that was fed with group-wise integers."""
    for matrix, feeds in builder.fed(stored.scales).items():
        file, name = builder.place(matrix)
        sources = list(dict.fromkeys(feed.source.name for feed in feeds))
        owned = [stored.scales[source] for source in sources]
        left, right = feeds[0].cols[0]
        first, last = left // owned[0].group, right // owned[0].group
        for suffix, tensors in (("weights_scaling_factor", [s.scales for s in owned]), ("zero", [s.zeros for s in owned])):
            there = [tensor for tensor in tensors if tensor is not None]
            whole = there[0] if len(there) == 1 else _beside(there)
            starts = dict(zip(sources, accumulate((tensor.cols for tensor in there), initial=0), strict=False))
            cols = [(starts[feed.source.name] + feed.start, starts[feed.source.name] + feed.stop) for feed in feeds]
            made = builder.matrix(file, name, last - first, sum(b - a for a, b in cols), Plain(whole.dtype, suffix=suffix))
            builder.feed(made, whole, first, last, cols=cols)


def _beside(tensors: Sequence[SourceTensor]) -> SourceTensor:
    """Tensors of equal height whose pieces lie side by side, as one."""
    pieces = tuple(piece for tensor in tensors for piece in tensor.pieces)
    name = " + ".join(tensor.name for tensor in tensors)
    return SourceTensor(name, tensors[0].dtype, (tensors[0].rows, sum(tensor.cols for tensor in tensors)), pieces, 1)


def add_channel_scales(builder: Draft, stored: Stored, experts: int) -> list[str]:
    """Describe the scales of every matrix that was fed with codes; gives what is wrong.

    Args:
        experts: on a rank, 0 for a dense model.
    """
    odd: list[tuple[str, int, int]] = []
    for matrix, feeds in builder.fed(stored.scales).items():
        file, name = builder.place(matrix)
        local = experts if ".mlp." in name else 0
        kind = stored.scales[feeds[0].source.name].scales.dtype
        vector = Plain(kind, vector=True, suffix="per_channel_scale")
        rows = sum(feed.stop - feed.start for feed in feeds)
        made = builder.matrix(file, name, rows // max(local, 1), 1, vector, experts=local)
        for feed in feeds:
            scales, (left, right) = stored.scales[feed.source.name].scales, feed.cols[0]
            each = feed.source.cols // scales.cols
            if right - left != each or left % each:
                odd.append((feed.source.name, each, right - left))
            builder.feed(made, scales, feed.start, feed.stop, cols=[(left // each, left // each + 1)])
    if not odd:
        return []
    (name, each, now), count = odd[0], len({name for name, _, _ in odd})
    more = f" (and {count - 1} more)" if count > 1 else ""
    told = f"a scale in the source is that of the {each} inputs of a rank, which would now have {now}, with another scale"
    return [f"{printable(name)}{more}: {told}; keep --tp-size, or decode the source (--to hf) and convert that"]


def add_calibrated(builder: Draft, ranges: Ranges, tensors: Mapping[str, SourceTensor]) -> None:
    """Describe both scales of every FP8 matrix that was fed: one for the fused matrix, the same on all ranks.

    The largest weight is taken over the whole sources, the input over all of them (q, k and v see the same one).

    Raises:
        TensorError: ranges are missing or wrong.
    """
    fed = {matrix: feeds for matrix, feeds in builder.fed(tensors).items() if isinstance(builder.codec(matrix), Fp8Tensor)}
    inputs = {_module(feed.source.name) + ".x": feed.source.cols for feeds in fed.values() for feed in feeds}
    ranges.check(inputs)
    reduced: set[tuple[str, str]] = set()
    for matrix, feeds in fed.items():
        codec = builder.codec(matrix)
        assert isinstance(codec, Fp8Tensor)
        sources = {feed.source.name: feed.source for feed in feeds}
        for name, source in sources.items():
            if (codec.key, name) not in reduced:
                reduced.add((codec.key, name))
                builder.reduce(source, WeightMaximum(codec.key))
        file, path = builder.place(matrix)
        scale = builder.matrix(file, path, 1, 1, Fp8Scale(codec.key))
        builder.feed(scale, NoSource(f"weights_scaling_factor, {codec.key}"), 0, 1)
        largest = ranges.amax([_module(name) + ".x" for name in sources])
        builder.constant(file, f"{path}.activation_scaling_factor", F32, (1,), struct.pack("<f", largest / _LARGEST))


def add_given_scales(builder: Draft, fp8: Mapping[str, tuple[float, float]]) -> list[str]:
    """Describe the scales that the source brings along: for a fused matrix the largest of each kind. Gives what is wrong.

    Args:
        fp8: weight name -> (its scale, that of its input).
    """
    problems = []
    for matrix, feeds in builder.fed(fp8).items():
        (file, path), codec = builder.place(matrix), builder.codec(matrix)
        if not (isinstance(codec, Fp8Shared) or codec == Plain(F8_E4M3)):
            problems.append(f"{printable(feeds[0].source.name)} is FP8, but TensorRT-LLM keeps {path} in the model dtype")
        elif sum(feed.stop - feed.start for feed in feeds) != builder.filled(matrix):
            problems.append(f"{printable(feeds[0].source.name)} is FP8 and other weights that {path} fuses are not")
        sources = dict.fromkeys(feed.source.name for feed in feeds)
        for suffix, kind in (("weights_scaling_factor", 0), ("activation_scaling_factor", 1)):
            builder.constant(file, f"{path}.{suffix}", F32, (1,), struct.pack("<f", max(fp8[name][kind] for name in sources)))
    return list(dict.fromkeys(problems))


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
