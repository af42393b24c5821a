"""Downloads in plan order, one file ahead of the run, and removal of those that were read."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence

from streamconv import memory
from streamconv.checkpoint.shard import Shard
from streamconv.errors import HubError, printable
from streamconv.hub.shard import AT_A_TIME, HubShard
from streamconv.planning.reads import Reads
from streamconv.process import start_thread
from streamconv.run.fs import free_space
from streamconv.run.journal import TileRecord


class Fetch:
    """Downloads the shards of a run in the order in which it needs them, one ahead.

    Args:
        past: of each output, span -> row ranges that need no reading any more.
        keep: "all" leaves the files in the cache; "none" removes each that was downloaded once its last row was read.
    """

    def __init__(self, reads: Reads, shards: Sequence[Shard], past: Sequence[Mapping[int, Sequence[TileRecord]]], keep: str) -> None:
        self.keep = keep
        self._turn = threading.Condition()
        self._stopped = False
        self._seen: set[HubShard] = set()
        self._held: set[HubShard] = set()
        self._left: dict[HubShard, int] = {}
        self._uses: dict[tuple[int, int], tuple[HubShard, ...]] = {}
        needed: dict[HubShard, None] = {}
        remote_at_all = any(isinstance(shard, HubShard) for shard in shards)
        for output, number in dict.fromkeys(share[:2] for read in (reads if remote_at_all else ()) for share in read.shares):
            span = reads.plans[output].spans[number]
            remote = (shards[piece.shard] for piece in span.source.pieces)
            uses = self._uses[output, number] = tuple(dict.fromkeys(shard for shard in remote if isinstance(shard, HubShard)))
            rows = span.stop - span.start
            for shard in uses:
                self._left[shard] = self._left.get(shard, 0) + rows
                if sum(done.stop - done.start for done in past[output].get(number, ())) < rows:
                    needed[shard] = None
        self._order = tuple(needed)

    def start(self) -> None:
        """Check the space and begin with the first file.

        Raises:
            HubError: the cache has no room for what will be there at a time.
        """
        if not self._order:
            return
        missing = sorted((shard.file.size for shard in self._order if not os.path.exists(shard.path)), reverse=True)
        need, folder = sum(missing if self.keep == "all" else missing[:AT_A_TIME]), self._order[0].path.parent
        free = free_space(folder)
        if free is not None and need > free:
            raise HubError(
                f"no space for the download: {memory.show_size(need)} needed, {memory.show_size(free)} free"
                f" in the cache {printable(folder)}",
                hint="free some space, set HF_HOME" + (", or use --hub-keep none" if self.keep == "all" else ""),
            )
        for shard in self._left:
            shard.fetch = self
        start_thread(self._ahead, "hub-fetch")  # without one each file is fetched when it is needed

    def reached(self, shard: HubShard) -> None:
        """A worker needs this file now."""
        with self._turn:
            self._seen.add(shard)
            self._held.add(shard)
            self._turn.notify_all()

    def consumed(self, output: int, span: int, rows: int) -> None:
        """These rows of a span will not be read again."""
        for shard in self._uses.get((output, span), ()):
            with self._turn:
                self._left[shard] -= rows
                over = self._left[shard] <= 0 and self.keep == "none"
            if over:
                shard.free()
                with self._turn:
                    self._held.discard(shard)
                    self._seen.add(shard)
                    self._turn.notify_all()

    def close(self) -> None:
        """No further file is begun; does not wait for the one under way."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def _ahead(self) -> None:
        before: HubShard | None = None
        for shard in self._order:
            with self._turn:
                while not self._stopped and (
                    (before is not None and before not in self._seen) or (self.keep == "none" and len(self._held - {shard}) > 1)
                ):
                    self._turn.wait()
                if self._stopped:
                    return
                over = self._left[shard] <= 0
                if not over:
                    self._held.add(shard)
            if not over:
                with contextlib.suppress(Exception):  # whoever needs the file tries again, and says why it failed
                    shard.download(ahead=True)
            before = shard
