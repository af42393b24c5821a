"""How much of a device, and of the host, the ring takes. Arithmetic only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamconv.device.triton_launch import has_kernel
from streamconv.errors import UsageError
from streamconv.memory import GIB, KIB, MIB
from streamconv.planning.plan import Matrix, RowRange
from streamconv.planning.tasks import encode_tasks

COMPUTE_STREAMS = 2
"""Tiles computed at the same time: one waits for the host between kernels while the other runs."""

BUFFERS = 2
"""Buffers of a slot: one is copied in while the other is computed."""

BEST_ARENA = 128 * MIB
"""Pinned host memory of a slot that more would not make faster."""
_LEAST_ARENA = 16 * MIB
_PLAN_SHARE = 16
"""All arenas together take at most this fraction of what a plan reads."""
_BEST_CHUNK = 96 * MIB
"""A tile of BEST_ARENA in one step: the interpreter then has a millisecond for each, and needs a quarter of it."""
_LEAST_CHUNK = 256 * KIB
_TINY = KIB
"""Sources smaller than this are counted as a whole, not by the byte."""
_ROUNDING = 4 * MIB
"""What torch's allocator rounds large requests up to, for each slot and lane."""


class NoRoom(UsageError):
    """A device that cannot be used as things are now; `auto` takes the CPU then."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Device memory that a plan's tiles take.

    Attributes:
        work: bytes of temporaries for each source byte.
        out: bytes of output for each source byte.
        fixed: bytes of temporaries whatever the rows are.
        least: source bytes of the smallest tile.
        small: bytes of output of sources of a few bytes, which no chunk is ever full of.
    """

    work: float = 0.0
    out: float = 0.0
    fixed: int = 0
    least: int = 0
    small: int = 0

    def larger(self, other: Demand) -> Demand:
        """What the tiles of either take."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Demand(*(max(pair) for pair in pairs))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How the ring of one device is built.

    Attributes:
        room: device bytes it may take in all.
        slots: tiles under way, one for each worker.
        chunk: source bytes of each of a slot's BUFFERS buffers.
    """

    room: int
    slots: int
    chunk: int


def demand(spans: Iterable[RowRange], matrices: Sequence[Matrix], fused: bool = False) -> Demand:
    """The most expensive of all spans in each respect; `fused`: what has a fused kernel runs it, and takes no temporaries."""
    work, out, fixed, least, small = 0.0, 0.0, 0, 0, 0
    seen = set()
    for span in spans:
        tasks = [task for task in encode_tasks(span, matrices) if not task.is_copy]
        whole = min((span.stop - span.start) * span.row_bytes, _TINY)
        key = (span.source.dtype, span.source.cols, span.align, span.reduce and span.reduce.bytes_per_element, whole, tuple(tasks))
        if key in seen or not (tasks or span.reduce):
            continue
        seen.add(key)
        encoded, each = 0, 0.0
        for task in tasks:
            codec, cols = task.codec, task.width
            encoded += task.row_costs[0]
            gathered = cols * span.source.dtype.itemsize * (len(task.cols) > 1)
            definition = not (fused and has_kernel(codec, span.source.dtype))
            each = max(each, (gathered + definition * cols * codec.torch_bytes_per_element) / span.row_bytes)
            fixed = max(fixed, codec.torch_bytes_per_column * cols)
        if span.reduce is not None:
            each = max(each, span.source.cols * span.reduce.bytes_per_element / span.row_bytes)
            fixed = max(fixed, span.source.cols * span.reduce.bytes_per_column)
        least = max(least, span.align * span.row_bytes)
        if whole < _TINY:  # all of it is one tile: a value of 4 bytes may be a whole smoother on the device
            fixed, small = max(fixed, int(each * whole)), max(small, encoded * whole // span.row_bytes)
        else:
            work, out = max(work, each), max(out, encoded / span.row_bytes)
    return Demand(work, out, fixed, least, small)


def reserve(free: int) -> int:
    """Device memory left to others and to the driver."""
    return max(256 * MIB, free // 16)


def fit(free: int, budget: int | None, wanted: int, need: Demand, name: str = "the GPU") -> Sizes:
    """Slots and buffers such that the whole ring stays inside the room; fewer slots before smaller chunks than 256 KiB.

    Args:
        free: free device memory, bytes.
        budget: what the user allows, None: at most 2 GiB.
        wanted: slots, at most.
        name: of the device, for the error.

    Raises:
        NoRoom: not even one slot with the smallest tile fits; says how much does.
    """
    room = min(2 * GIB if budget is None else budget, max(free - reserve(free), 0))
    least = max(need.least, min(_LEAST_CHUNK, max(need.least, 1)))
    for slots in range(max(1, wanted), 0, -1):
        fixed, each = _terms(slots, need)
        chunk = int(max(0, room - fixed) / each)
        if chunk >= max(least, _LEAST_CHUNK) or (slots == 1 and chunk >= least):
            return Sizes(room, slots, min(chunk, max(_BEST_CHUNK, need.least)))
    fixed, each = _terms(1, need)
    smallest = -(-int(fixed + each * max(least, 1)) // MIB) + 1
    raise NoRoom(
        f"{name} has {room // MIB} MiB for us, and the smallest tile takes {smallest} MiB",
        hint=f"--device-memory-budget {smallest}MiB or more, free memory on the GPU, or --device cpu",
    )


def _terms(slots: int, need: Demand) -> tuple[int, float]:
    """(bytes that do not depend on the chunk, bytes for each byte of it)."""
    lanes = min(COMPUTE_STREAMS, slots)
    fixed = lanes * (need.fixed + _ROUNDING) + slots * BUFFERS * (64 * KIB + need.small)
    return fixed, slots * BUFFERS * (1 + need.out) + lanes * need.work


def pinned_size(arena: int, least: int) -> int:
    """The largest pinned arena within `arena` bytes, `least` at the smallest: torch rounds pinned memory up to a power of two.

    Raises:
        NoRoom: rounded up, the smallest tile does not fit any more.
    """
    size = 1 << (max(arena, 1).bit_length() - 1)
    if size >= least:
        return size
    raise NoRoom(
        f"the memory budget leaves {arena // MIB} MiB of pinned memory for each worker, a tile takes {-(-least // MIB)} MiB",
        hint="a larger --memory-budget, fewer --workers, or --device cpu",
    )


def arena(size: int, slots: int, least: int) -> int:
    """Pinned bytes of a slot for a plan that reads `size` bytes, `least` in its smallest tile.

    Pinning takes 0.6 s a GiB, which a small plan does not win back.
    """
    smallest = 1 << (least - 1).bit_length() if least > 1 else 1
    return max(_LEAST_ARENA, smallest, min(BEST_ARENA, size // _PLAN_SHARE // slots))


def slots(cores: int, devices: int) -> int:
    """Workers of each device: enough to read, hash and write while copies and kernels of others run."""
    return max(3, min(6, cores // max(1, devices)))
