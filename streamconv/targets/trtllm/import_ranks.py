"""Codes of a TensorRT-LLM checkpoint that is cut anew: they stay what they are, laid out for another generation or on other ranks.

What a direct conversion would have measured over other inputs than the source's ranks have is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.source_tensors import Changed
from streamconv.checkpoint.strided_rows import Strided, beside
from streamconv.errors import printable
from streamconv.planning.draft import Draft
from streamconv.quants.plain import Plain
from streamconv.targets.trtllm.import_scales import Scales, Stored
from streamconv.targets.trtllm.rank_views import SCALE, ZERO


def take_codes(tensors: Mapping[str, SourceTensor]) -> Stored:
    """The tensors of a checkpoint, the scales of codes apart."""
    stored = Stored(Changed(tensors))
    for name in tensors:
        if name.endswith(".weight" + SCALE):
            weight, scales = name.removesuffix(SCALE), stored.tensors.pop(name)
            zeros = stored.tensors.pop(weight + ZERO, None)
            group = tensors[weight].cols // scales.rows if zeros is not None else 0
            stored.scales[weight] = Scales(scales, zeros, None, group)
    return stored


def add_group_scales(builder: Draft, stored: Stored) -> None:
    """Describe scales and zeros [groups, N] of every matrix that was fed with group-wise integers."""
    for matrix, feeds in builder.fed(stored.scales).items():
        file, name = builder.place(matrix)
        sources = list(dict.fromkeys(feed.source.name for feed in feeds))
        owned = [stored.scales[source] for source in sources]
        left, right = feeds[0].cols[0]
        first, last = left // owned[0].group, right // owned[0].group
        for suffix, tensors in (("weights_scaling_factor", [s.scales for s in owned]), ("zero", [s.zeros for s in owned])):
            held = [tensor for tensor in tensors if isinstance(tensor, Strided)]
            whole = held[0] if len(held) == 1 else beside(" + ".join(tensor.name for tensor in held), held)
            starts = dict(zip(sources, accumulate((tensor.cols for tensor in held), initial=0), strict=False))
            cols = [(starts[feed.source.name] + feed.start, starts[feed.source.name] + feed.stop) for feed in feeds]
            made = builder.matrix(file, name, last - first, sum(b - a for a, b in cols), Plain(whole.dtype, suffix=suffix))
            builder.feed(made, whole, first, last, cols=cols)


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
