"""Puts finished tiles on the disk and into the journal, in batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from streamconv.memory import MIB
from streamconv.process import start_thread
from streamconv.run.journal import Journal, TileRecord
from streamconv.run.output_folder import OutputFolder

BATCH_BYTES = 256 * MIB
"""Written bytes after which files are synced."""
BATCH_SECONDS = 2.0
"""Longest time that a finished tile waits for its line in the journal."""
THREADED = True
"""False syncs in the worker that wrote the last byte of a batch: runs repeat exactly (tests)."""


class Recorder:
    """Syncs what the workers wrote, in batches, and tells the journal; one thread of its own.

    Args:
        failed: told if the disk fails; the run must then stop.
    """

    def __init__(self, journal: Journal, folder: OutputFolder, failed: Callable[[BaseException], None]) -> None:
        self.journal, self.folder, self.failed = journal, folder, failed
        self._state = threading.Condition()
        self._tiles: list[TileRecord] = []
        self._files: set[str] = set()
        self._bytes, self._since, self._ending, self._broken = 0, 0.0, False, False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if THREADED:
            self._thread = start_thread(self._work, "journal")  # without one the workers record

    def add(self, done: TileRecord, files: set[str], size: int) -> None:
        """A tile was written: `size` bytes in `files`."""
        with self._state:
            if not self._tiles:
                self._since = time.monotonic()
            self._tiles.append(done)
            self._files |= files
            self._bytes += size
            if self._thread is None and self._bytes >= BATCH_BYTES:
                self._flush(*self._taken())  # inside the lock: one at a time
            elif self._bytes >= BATCH_BYTES or len(self._tiles) == 1:
                self._state.notify()

    def finish(self, seconds: float | None = None) -> bool:
        """Record what is pending. False if that took longer than `seconds`."""
        with self._state:
            self._ending = True
            self._state.notify()
        if self._thread is not None:
            self._thread.join(seconds)
            return not self._thread.is_alive()
        self._flush(*self._taken())
        return True

    def _taken(self) -> tuple[list[TileRecord], set[str]]:
        taken = self._tiles, self._files
        self._tiles, self._files, self._bytes = [], set(), 0
        return taken

    def _flush(self, tiles: list[TileRecord], files: set[str]) -> None:
        if tiles and not self._broken:
            try:
                self.folder.sync(sorted(files))
                self.journal.add(tiles)
            except BaseException:
                self._broken = True  # after a failed fsync nothing says what is on the disk
                raise

    def _work(self) -> None:
        try:
            while True:
                with self._state:
                    while not self._ending and self._bytes < BATCH_BYTES:
                        left = self._since + BATCH_SECONDS - time.monotonic() if self._tiles else None
                        if left is not None and left <= 0:
                            break
                        self._state.wait(left)
                    ending, taken = self._ending, self._taken()
                self._flush(*taken)
                if ending:
                    return
        except BaseException as error:
            self.failed(error)
