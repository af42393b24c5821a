"""The scales of sources that are quantized already, as tensors of the rank files: they follow the rows and columns of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streamconv.checkpoint.dtypes import F8_E4M3, F32, U8, DType
from streamconv.checkpoint.rows import Extent, PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import printable
from streamconv.planning.draft import Draft, Fed
from streamconv.quants.awq import PairedRtn
from streamconv.quants.gptq import GroupScales
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.import_scales import Stored, content


def add_scales(builder: Draft, stored: Stored, dtype: DType, shards: Sequence[Shard]) -> list[str]:
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
        elif builder.encoding(matrix) != Plain(F8_E4M3):
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
    encoding = GroupScales(dtype, kind, bits, packed.packing == "awq", middle)
    low, high = feeds[0].cols[0]
    first, last = low // owned[0].group, high // owned[0].group
    made = builder.matrix(file, name, last - first, sum(b - a for a, b in cols), encoding)
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
    encoding = Plain(F32, suffix="weights_scaling_factor")
    made = builder.matrix(file, name, rows, (high - low) // owned.group, encoding)
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
        if isinstance(builder.encoding(matrix), PairedRtn):
            _unit_prescale(builder, *builder.place(matrix), dtype, sum(stop - start for start, stop in feeds[0].cols))
