"""Whether locks reach other machines: every worker holds one, and shows that it lives.

On Lustre without `flock`, or NFS mounted with `nolock`, a lock keeps out the processes of its own machine alone, and nothing says so. Who
can take the lock of a worker of another machine that goes on living knows.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time

from streamconv.errors import OutputError, printable
from streamconv.process import start_thread
from streamconv.run import recorder
from streamconv.run.fs import Folder, write_all

BEAT = 1.0
"""Seconds between two signs of life."""
_NAME = re.compile(r"worker-(.+)-(\d+)-([0-9a-f]+)")


class Presence:
    """This worker, as others see it, until `close`."""

    def __init__(self, folder: Folder, token: str, host: str = "") -> None:
        self.folder, self.host = folder, re.sub(r"[^\w.-]", "_", host or os.uname().nodename)[:64]
        self.name = f"worker-{self.host}-{os.getpid()}-{token}"
        self._beats, self._over, self._using = 0, threading.Event(), threading.Lock()
        self._fd = folder.open(self.name)
        folder.lock_range(self._fd, 0, 1)
        self._beat()
        if recorder.THREADED:
            start_thread(self._live, "presence")

    def _beat(self) -> None:
        with self._using:
            if self._fd >= 0:
                self._beats += 1
                write_all(self.folder.disk, self._fd, f"{self._beats:12}\n".encode(), 0)
                self.folder.disk.sync_data(self._fd)

    def _live(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over.wait(BEAT):
                self._beat()

    def check(self) -> None:
        """Look at the workers of other machines; remove what dead ones left.

        Raises:
            OutputError: one of them lives, and its lock is free here.
        """
        named = [(name, _NAME.fullmatch(name)) for name in self.folder.names()]
        looks = {name: self._look(name) for name, parsed in named if parsed and parsed[1] != self.host}
        free = {name: beat for name, (is_free, beat) in looks.items() if is_free}
        if not free:
            return
        time.sleep(3 * BEAT)
        for name, before in free.items():
            _, now = self._look(name)
            if now and now != before:
                raise OutputError(
                    f"a worker is at work on {printable(name.split('-', 1)[1].rpartition('-')[0])}, and its lock is free here: the locks of"
                    f" {printable(self.folder.path)} do not reach other machines",
                    hint="give each worker a part of its own, with --no-lock --part K/N, and publish with `streamconv finalize`;"
                    " or start over with --private-parts",
                )
            if now == before:
                self.folder.unlink(name)

    def _look(self, name: str) -> tuple[bool, bytes]:
        """Whether the lock of a worker is free, and what it wrote last; nothing of one that is gone."""
        with contextlib.suppress(OSError, OutputError):
            fd = self.folder.open(name, make=False)
            try:
                return not self.folder.disk.locked(fd, 0), os.pread(fd, 32, 0)
            finally:
                self.folder.disk.close(fd)
        return False, b""

    def close(self) -> None:
        self._over.set()
        with self._using:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError, OutputError):
                self.folder.unlink(self.name)
            with contextlib.suppress(OSError):
                self.folder.disk.close(fd)
