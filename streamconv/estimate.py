"""How long a conversion should take, before it begins: from what the disks give in a moment, and what the processors did elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from streamconv import mounts
from streamconv.checkpoint.index import Index
from streamconv.errors import StreamconvError, printable
from streamconv.hub.shard import HubShard
from streamconv.memory import GIB, MIB
from streamconv.planning.memory_plan import MemoryPlan, TileCost, processors
from streamconv.planning.reads import Reads
from streamconv.process import start_thread
from streamconv.reports import Estimate
from streamconv.run import probe
from streamconv.run.fs import free_space

SMALLEST = 256 * MIB
"""Bytes read and written below which a plan estimates nothing: looking at the disks would take as long as the conversion."""
LARGE = 16 * GIB
"""Bytes read and written below which a run does not look: half a second would be felt."""
_SECONDS = 0.25
"""For each of the disks."""
_START, _START_DEVICE = 0.6, 4.0
"""Seconds until the first tile: libraries and kernels are loaded."""
_COPY, _HASH, _KERNEL, _TORCH = 2.0e9, 12e9, 6e9, 0.3e9
"""Bytes a second of one core, as `benchmarks/kernels.py` found them: into the page cache (and out of it, at twice that), hashed,
encoded by a kernel of ours, and by torch."""


class Looking:
    """Looks at the disks of a conversion in a thread of its own.

    Args:
        places: output folder -> bytes that will be written there; None: not known which.
    """

    def __init__(self, index: Index, reads: Reads, places: Mapping[Path | None, int]) -> None:
        self._index, self._reads, self._places = index, reads, places
        self._busy = dict[int, float]()
        """Device -> seconds that its files take."""
        self._read, self._writes = None if not index.shards else 0.0, list[float]()
        self._unknown = list[str]()
        self._thread = start_thread(self._look, "disk-probe")

    def _look(self) -> None:
        shards = self._index.shards
        here = [shard.path for shard in shards if not isinstance(shard, HubShard) or os.path.exists(shard.path)]
        if len(here) < len(shards):
            self._unknown.append("how fast the model is downloaded")
        try:
            if here:
                self._read = probe.read_rate(here[:: max(1, len(here) // 16)], _SECONDS)
                self._take(here[0], self._reads.nbytes * len(here) / len(shards), self._read)
        except (OSError, StreamconvError) as error:
            self._unknown.append(f"how fast the source is read ({getattr(error, 'strerror', None) or error})")
        for out, nbytes in self._places.items():
            if out is None:
                self._unknown.append("how fast the output is written (no OUT is given)")
                continue
            place = out
            while not os.path.exists(place):
                place = place.parent
            if mounts.in_memory(place):
                continue
            try:
                if (free_space(place) or SMALLEST) < SMALLEST:
                    raise OSError(0, "too little is free to try it")
                self._writes.append(probe.write_rate(place, _SECONDS / len(self._places)))
                self._take(place, nbytes, self._writes[-1])
            except (OSError, StreamconvError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                self._unknown.append(f"how fast {printable(str(out))} is written ({reason})")

    def _take(self, path: Path, nbytes: float, rate: float) -> None:
        device = os.stat(path).st_dev
        self._busy[device] = self._busy.get(device, 0.0) + nbytes / max(rate, 1.0)

    def estimate(self, costs: Sequence[TileCost], shares: MemoryPlan, on_device: bool) -> Estimate | None:
        """Wait for what was found, but not long; None if a disk is still busy with the samples."""
        if self._thread is None:
            return None
        self._thread.join(4 * _SECONDS)
        if self._thread.is_alive():
            return None
        disks = max(self._busy.values(), default=0.0)
        cores = max(1, min(shares.workers, processors()))
        cpu = _cpu_seconds(self._reads, costs, sum(self._places.values()), on_device) / cores
        seconds = (_START_DEVICE if on_device else _START) + max(disks, cpu)
        bound = "the disks" if disks > cpu else "the processors"
        return Estimate(seconds, self._read or None, min(self._writes, default=None), bound, tuple(self._unknown))


def look(index: Index, reads: Reads, places: Mapping[Path | None, int], wanted: bool, runs: bool = False) -> Looking | None:
    """Begin to look at the disks, if that is `wanted` and worth its time: of a plan, or of a conversion that `runs`."""
    return Looking(index, reads, places) if wanted and reads.nbytes + sum(places.values()) >= (LARGE if runs else SMALLEST) else None


def _cpu_seconds(reads: Reads, costs: Sequence[TileCost], written: int, on_device: bool) -> float:
    """Of one core, for all tiles."""
    spent = reads.nbytes / (2 * _COPY) + written * (1 / _COPY + 1 / _HASH)
    for number, cost in enumerate(costs if not on_device else ()):
        if cost.kernel or cost.torch:
            spent += reads.bytes_of(number) / (_KERNEL if cost.kernel else _TORCH)
    return spent
