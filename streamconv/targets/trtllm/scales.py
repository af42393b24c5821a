"""Scales as tensors of the rank files: those that a quantized source brings along, which follow the rows and columns of their weights, and
those of FP8 per tensor, which a calibration measured."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.checkpoint.dtypes import F8_E4M3, F32, U8, DType
from streamconv.checkpoint.rows import Extent, NoSource, PackedTensor, SourceTensor, content
from streamconv.checkpoint.shard import Shard
from streamconv.errors import printable
from streamconv.planning.draft import Draft, Fed
from streamconv.quants.fp8_tensor import Fp8Scale, Fp8Shared, Fp8Tensor, WeightMaximum
from streamconv.quants.gptq import GroupScales
from streamconv.quants.int_group import PairedRtn
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.import_scales import Stored

_LARGEST = 448.0
"""Of FP8 E4M3."""


def add_scales(builder: Draft, stored: Stored, dtype: DType, shards: Sequence[Shard], *, kept: bool, experts: int) -> list[str]:
    """Describe the scale tensors of every matrix that was fed with codes: they follow its rows and columns; gives what is wrong.

    Args:
        kept: the codes are those of a TensorRT-LLM checkpoint, whose scales may be those of a rank's own inputs.
        experts: on a rank, 0 for a dense model.
    """
    problems = {} if kept else dict.fromkeys(_misfits(builder, stored, shards))
    if problems:
        return list(problems)
    cut_anew = list[tuple[str, int, int]]()
    for matrix, feeds in builder.fed(stored.scales).items():
        (file, name), first = builder.place(matrix), stored.scales[feeds[0].source.name]
        if first.zeros is None and first.group:
            _modelopt_scales(builder, file, name, feeds, stored, dtype)
        elif first.zeros is None:
            local = experts if kept and ".mlp." in name else 0
            vector = Plain(first.scales.dtype, vector=True, suffix="per_channel_scale")
            rows = sum(feed.stop - feed.start for feed in feeds)
            number = builder.matrix(file, name, rows // max(local, 1), 1, vector, experts=local)
            for feed in feeds:
                scales, (left, right) = stored.scales[feed.source.name].scales, feed.cols[0]
                each = feed.source.cols // scales.cols
                if kept and (right - left != each or left % each):
                    cut_anew.append((feed.source.name, each, right - left))
                at = left // each if kept else 0
                builder.feed(number, scales, feed.start, feed.stop, cols=[(at, at + 1)])
        elif kept:
            _stored_groups(builder, file, name, feeds, stored)
        elif problem := _packed_groups(builder, file, name, feeds, stored, dtype):
            problems[problem] = None
    if cut_anew:
        (name, each, now), count = cut_anew[0], len({name for name, _, _ in cut_anew})
        more = f" (and {count - 1} more)" if count > 1 else ""
        message = f"a scale in the source is that of the {each} inputs of a rank, which would now have {now}, with another scale"
        problems[f"{printable(name)}{more}: {message}; keep --tp-size, or decode the source (--to hf) and convert that"] = None
    return list(problems)


def _misfits(builder: Draft, stored: Stored, shards: Sequence[Shard]) -> Iterator[str]:
    """FP8 weights that are not copied whole, packed ones cut inside a word, fused ones with other pre-scales."""
    checked: set[tuple[str, ...]] = set()
    for matrix, feeds in builder.fed(stored.scales).items():
        source, name = feeds[0].source, builder.place(matrix)[1]
        if isinstance(source, PackedTensor):
            step = 32 // source.bits
            if any(feed.start % step or feed.stop % step for feed in feeds):
                yield f"{printable(source.name)}: heads of {name} are no multiple of {step} channels, a word"
            key = tuple(dict.fromkeys(feed.source.name for feed in feeds))
            inputs = [stored.scales[name].inputs for name in key if key not in checked]
            checked.add(key)
            if len({b"" if tensor is None else content(tensor, shards) for tensor in inputs}) > 1:
                why = f"pre_quant_scale differs among the weights that {name} fuses; export with a ModelOpt that shares it"
                yield f"{printable(key[0])}: {why}"
        elif builder.codec(matrix) != Plain(F8_E4M3):
            yield f"{printable(source.name)} is FP8 already, but --quant leaves {name} out of FP8"
        elif sum(feed.stop - feed.start for feed in feeds) != builder.filled(matrix):
            yield f"{printable(source.name)} is FP8 and other weights that {name} fuses are not"


def _packed_groups(builder: Draft, file: int, name: str, feeds: Sequence[Fed], stored: Stored, dtype: DType) -> str | None:
    """`weights_scaling_factor` and `zero`: groups are rows; zeros and scales of all channels side by side."""
    owned = {feed.source.name: stored.scales[feed.source.name] for feed in feeds}
    first = owned[feeds[0].source.name]
    kind, groups = first.scales.dtype, first.scales.rows
    if len({(one.scales.dtype, one.scales.rows) for one in owned.values()}) > 1:
        return f"{printable(first.scales.name)}: dtype or groups differ among the weights that {name} fuses"
    packed = feeds[0].source
    assert isinstance(packed, PackedTensor)
    bits, pieces, cols, at = packed.bits, list[Extent](), list[tuple[int, int]](), 0
    parts = ([one.zeros for one in owned.values()], bits), ([one.scales for one in owned.values()], 8 * kind.itemsize)
    for tensors, size in parts:
        starts = {}
        for source, tensor in zip(owned, tensors, strict=True):
            if tensor is None:
                return f"{printable(source)}: no zeros"
            width = tensor.cols * tensor.dtype.itemsize
            starts[source] = at
            pieces.append(Extent(tensor.pieces[0].shard, tensor.pieces[0].begin, tensor.rows, width))
            at += width
        cols += [(starts[f.source.name] + f.start * size // 8, starts[f.source.name] + f.stop * size // 8) for f in feeds]
    joined = SourceTensor(" + ".join(one.scales.name for one in owned.values()), U8, (groups, at), tuple(pieces), 1)
    middle = 1 << (bits - 1)
    if packed.packing == "gptq" and stored.v1:
        middle -= 1
    codec = GroupScales(dtype, kind, bits, packed.packing == "awq", middle)
    low, high = feeds[0].cols[0]
    low, high = low // first.group, high // first.group
    number = builder.matrix(file, name, high - low, sum(b - a for a, b in cols), codec)
    builder.feed(number, joined, low, high, cols=_joined(cols))
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
    number = builder.matrix(file, name, rows, (high - low) // owned.group, codec)
    for feed in feeds:
        scales = stored.scales[feed.source.name]
        builder.feed(number, scales.scales, feed.start, feed.stop, cols=[(low // scales.group, high // scales.group)])
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


def _stored_groups(builder: Draft, file: int, name: str, feeds: Sequence[Fed], stored: Stored) -> None:
    """Scales and zeros [groups, N] of a rank, from those of other ranks."""
    sources = list(dict.fromkeys(feed.source.name for feed in feeds))
    owned = [stored.scales[source] for source in sources]
    left, right = feeds[0].cols[0]
    first, last = left // owned[0].group, right // owned[0].group
    for suffix, tensors in (("weights_scaling_factor", [s.scales for s in owned]), ("zero", [s.zeros for s in owned])):
        there = [tensor for tensor in tensors if tensor is not None]
        whole = there[0] if len(there) == 1 else _beside(there)
        starts = dict(zip(sources, accumulate((tensor.cols for tensor in there), initial=0), strict=False))
        cols = [(starts[feed.source.name] + feed.start, starts[feed.source.name] + feed.stop) for feed in feeds]
        number = builder.matrix(file, name, last - first, sum(b - a for a, b in cols), Plain(whole.dtype, suffix=suffix))
        builder.feed(number, whole, first, last, cols=cols)


def _beside(tensors: Sequence[SourceTensor]) -> SourceTensor:
    """Tensors of equal height whose pieces lie side by side, as one."""
    pieces = tuple(piece for tensor in tensors for piece in tensor.pieces)
    name = " + ".join(tensor.name for tensor in tensors)
    return SourceTensor(name, tensors[0].dtype, (tensors[0].rows, sum(tensor.cols for tensor in tensors)), pieces, 1)


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
