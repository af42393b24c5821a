"""Which rank holds what: rank arithmetic, pipeline stages and tensor parallel slices."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.options import Version


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank file. `moe_tp` and `moe_ep` are its places in the expert grid."""

    file: int
    tp: int
    pp: int
    moe_tp: int
    moe_ep: int


@dataclass(frozen=True, slots=True)
class ParallelMapping:
    """Sizes of the parallel groups. Context parallel ranks share files, so they do not appear here."""

    tp_size: int
    pp_size: int
    moe_tp_size: int
    moe_ep_size: int

    def ranks(self) -> list[Rank]:
        return [
            Rank(pp * self.tp_size + tp, tp, pp, tp // self.moe_ep_size, tp % self.moe_ep_size)
            for pp in range(self.pp_size)
            for tp in range(self.tp_size)
        ]

    def stage(self, pp: int) -> list[Rank]:
        """The tensor parallel ranks of a pipeline stage, in order."""
        return self.ranks()[pp * self.tp_size : (pp + 1) * self.tp_size]


def stage_layers(layers: int, pp_size: int, version: Version) -> list[range]:
    """Global layers owned by each stage. 0.16 needs pp_size to divide layers: the caller refuses first."""
    base, extra = divmod(layers, pp_size)
    if version == "0.16":
        return [range(p * base, (p + 1) * base) for p in range(pp_size)]
    starts = [p * base + min(p, extra) for p in range(pp_size + 1)]
    return [range(starts[p], starts[p + 1]) for p in range(pp_size)]


def kv_heads(kv: int, tp_size: int, tp: int) -> tuple[int, int]:
    """KV heads [first, last) of a rank; fewer heads than ranks means that consecutive ranks share one."""
    if kv >= tp_size:
        each = kv // tp_size
        return tp * each, (tp + 1) * each
    head = tp // (tp_size // kv)
    return head, head + 1


def even(size: int, parts: int, part: int) -> tuple[int, int]:
    """Part `part` of `parts` equal slices of `size`."""
    return size // parts * part, size // parts * (part + 1)


def padded(size: int, parts: int, part: int) -> tuple[int, int]:
    """Slice of ceil(size/parts) rows cut at `size`: vocabulary rows of a rank, padding left off."""
    chunk = -(-size // parts)
    return min(part * chunk, size), min((part + 1) * chunk, size)
