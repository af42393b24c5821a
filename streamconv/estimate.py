"""How long a conversion should take, before it begins: from what the disks give in a moment, and what the processors did elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from streamconv import mounts
from streamconv.checkpoint.index import Index
from streamconv.errors import StreamconvError, printable
from streamconv.memory import GIB, MIB
from streamconv.planning.memory_plan import MemoryPlan, TileCost, processors
from streamconv.planning.reads import Reads
from streamconv.process import start_thread
from streamconv.reports import Estimate
from streamconv.run import probe
from streamconv.run.fs import existing, free_space

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
    """Looks at the disks of a conversion in a thread of its own; it may begin before the conversion is planned.

    Args:
        places: output folders; None: not known which.
    """

    def __init__(self, index: Index, places: Sequence[Path | None]) -> None:
        self._index, self._places = index, places
        self._read, self._writes = None if not index.shards else 0.0, dict[Path | None, float]()
        self._source, self._devices = 0, dict[Path | None, int]()
        """Devices: of the source, of each place."""
        self._here = 1.0
        """Share of the source's files that need no download."""
        self._unknown = list[str]()
        self._thread = start_thread(self._look, "disk-probe")

    def _look(self) -> None:
        shards = self._index.shards
        here = [shard.path for shard in shards if os.path.exists(shard.path)]
        if len(here) < len(shards):
            self._unknown.append("how fast the model is downloaded")
        try:
            if here:
                self._here, self._source = len(here) / len(shards), os.stat(here[0]).st_dev
                self._read = probe.read_rate(here[:: max(1, len(here) // 16)], _SECONDS)
        except (OSError, StreamconvError) as error:
            self._unknown.append(f"how fast the source is read ({getattr(error, 'strerror', None) or error})")
        for out in self._places:
            if out is None:
                self._unknown.append("how fast the output is written (no OUT is given)")
                continue
            place = existing(out)
            if mounts.in_memory(place):
                continue
            try:
                if (free_space(place) or SMALLEST) < SMALLEST:
                    raise OSError(0, "too little is free to try it")
                self._devices[out] = os.stat(place).st_dev
                self._writes[out] = probe.write_rate(place, _SECONDS / len(self._places))
            except (OSError, StreamconvError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                self._unknown.append(f"how fast {printable(out)} is written ({reason})")

    def estimate(
        self, reads: Reads, written: Mapping[Path | None, int], costs: Sequence[TileCost], memory_plan: MemoryPlan, on_device: bool
    ) -> Estimate | None:
        """Wait for what was found, but not long; None if a disk is still busy with the samples.

        Args:
            written: place -> bytes that will be written there; none where an output is finished.
        """
        if self._thread is None:
            return None
        self._thread.join(4 * _SECONDS)
        if self._thread.is_alive():
            return None
        busy = dict[int, float]()  # device -> seconds that its files take
        if self._read:
            busy[self._source] = reads.nbytes * self._here / max(self._read, 1.0)
        for place, rate in self._writes.items():
            busy[self._devices[place]] = busy.get(self._devices[place], 0.0) + written.get(place, 0) / max(rate, 1.0)
        disks = max(busy.values(), default=0.0)
        cores = max(1, min(memory_plan.workers, processors()))
        cpu = _cpu_seconds(reads, costs, sum(written.values()), on_device) / cores
        seconds = (_START_DEVICE if on_device else _START) + max(disks, cpu)
        bound = "the disks" if disks > cpu else "the processors"
        return Estimate(seconds, self._read or None, min(self._writes.values(), default=None), bound, tuple(self._unknown))


def look(index: Index, places: Sequence[Path | None], nbytes: int, runs: bool = False) -> Looking | None:
    """Begin to look at the disks, if so many bytes are worth its time: of a plan, or of a conversion that `runs`."""
    return Looking(index, places) if nbytes >= (LARGE if runs else SMALLEST) else None


def size_of(index: Index) -> int:
    """Bytes of a source's files."""
    return sum(shard.identity.size for shard in index.shards)


def _cpu_seconds(reads: Reads, costs: Sequence[TileCost], written: int, on_device: bool) -> float:
    """Of one core, for all tiles."""
    spent = reads.nbytes / (2 * _COPY) + written * (1 / _COPY + 1 / _HASH)
    for number, cost in enumerate(costs if not on_device else ()):
        if cost.kernel or cost.torch:
            spent += reads.bytes_of(number) / (_KERNEL if cost.kernel else _TORCH)
    return spent
