"""Disks that count, stop, fail or write down every write-side operation."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamconv.run.fs import Disk, Folder, Mark

FAULTS = {
    name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EROFS", "EINTR")
} | {"short": 0}


class Killed(BaseException):
    """The process is dead; nothing it does reaches the disk any more."""


class Tapped(Disk):
    """Every operation but `close` goes through `act`, numbered from 0.

    Attributes:
        mounted: every output is taken for a mount point, or none is.
    """

    mounted = False

    def __init__(self) -> None:
        self.count = 0
        self.fds: set[int] = set()

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        raise NotImplementedError

    def _tap(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        number, self.count = self.count, self.count + 1
        self.number = number
        return self.act(name, do, *args)

    def enter(self, path: Path, folder: Folder | None = None) -> int:
        fd: int = self._tap("enter", super().enter, path, folder)
        self.fds.add(fd)
        return fd

    def open(self, folder: Folder, name: str, flags: int, mode: int = 0o666) -> int:
        fd: int = self._tap("open", super().open, folder, name, flags, mode)
        self.fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.fds.discard(fd)
        super().close(fd)

    def why_inside(self, out: Path, begun: bool) -> str | None:
        return "is said to be a mount point" if self.mounted else None

    def bury(self) -> None:
        """What the system does for a dead process: close its files, and with them give up its lock."""
        for fd in list(self.fds):
            self.close(fd)

    def truncate(self, fd: int, size: int) -> None:
        self._tap("truncate", super().truncate, fd, size)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        done: int = self._tap("pwrite", super().pwrite, fd, data, offset)
        return done

    def push(self, fd: int, offset: int, size: int) -> None:
        self._tap("push", super().push, fd, offset, size)

    def sync(self, fd: int) -> None:
        self._tap("sync", super().sync, fd)

    def sync_data(self, fd: int) -> None:
        self._tap("sync_data", super().sync_data, fd)

    def lock(self, fd: int) -> None:
        self._tap("lock", super().lock, fd)

    def lock_range(self, fd: int, begin: int, end: int) -> None:
        self._tap("lock_range", super().lock_range, fd, begin, end)

    def rename(self, folder: Folder, old: str, new: str, known: Mark) -> None:
        self._tap("rename", super().rename, folder, old, new, known)

    def mkdir(self, folder: Folder, name: str) -> None:
        self._tap("mkdir", super().mkdir, folder, name)

    def unlink(self, folder: Folder, name: str, known: Mark) -> None:
        self._tap("unlink", super().unlink, folder, name, known)

    def rmdir(self, folder: Folder, name: str) -> None:
        self._tap("rmdir", super().rmdir, folder, name)


class Counting(Tapped):
    """Remembers the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        self.names.append(name)
        return do(*args)


class Killing(Tapped):
    """Calls `die` instead of operation k (a child kills itself; in one process `Killed` is raised for good)."""

    def __init__(self, k: int, die: Callable[[], None]) -> None:
        super().__init__()
        self.k, self.die, self.dead = k, die, False

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        if self.number >= self.k or self.dead:
            self.dead = True
            self.die()
        return do(*args)


class Watched(Tapped):
    """Calls `look` before every operation, and in the middle of every write: each is a moment to be killed at."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.look = look

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        if name not in ("enter", "sync", "sync_data", "push", "lock", "lock_range"):  # these change nothing that a killed process leaves
            self.look()
        if name == "pwrite" and len(args[1]) > 1:
            fd, data, offset = args
            os.pwrite(fd, data[: len(data) // 2], offset)
            self.look()
        return do(*args)


class Intruding(Tapped):
    """Calls `intrude` before operation k: somebody else is at work on the same names."""

    def __init__(self, k: int, intrude: Callable[[], None]) -> None:
        super().__init__()
        self.k, self.intrude = k, intrude

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        if self.number == self.k:
            self.intrude()
        return do(*args)


class Failing(Tapped):
    """Operation k fails, once or from then on."""

    def __init__(self, k: int, fault: str, forever: bool) -> None:
        super().__init__()
        self.k, self.fault, self.forever = k, fault, forever
        self.failed = ""

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        if self.number == self.k or (self.forever and self.number > self.k):
            if self.fault != "short":
                self.failed = self.failed or name
                raise OSError(FAULTS[self.fault], os.strerror(FAULTS[self.fault]))
            if name == "pwrite":
                self.failed = self.failed or name
                fd, data, offset = args
                return os.pwrite(fd, data[: max(1, len(data) // 3)], offset)
        return do(*args)


class Recording(Tapped):
    """Writes down what was done, by inode, for a replay of what a power cut leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Any, ...]] = []

    def act(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        result = do(*args)
        if name == "enter":
            self.log.append(("enter", result, args[0]))
        elif name == "open":
            self.log.append(("open", result, args[0].path / args[1]))
        elif name == "pwrite":
            self.log.append(("pwrite", args[0], args[2], bytes(args[1][:result])))
        elif name == "rename":
            self.log.append(("rename", args[0].path / args[1], args[0].path / args[2]))
        elif name in ("mkdir", "unlink", "rmdir"):
            self.log.append((name, args[0].path / args[1]))
        elif name not in ("push", "lock", "lock_range"):
            self.log.append((name, *args))
        return result
