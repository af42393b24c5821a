"""A file system that shows a folder, with a page cache of its own that is written back later, as a network client has.

    python -m tests.two_clients.mirror FOLDER MOUNTPOINT

Needs pyfuse3 (and libfuse3-dev to build it), /dev/fuse, and root. Ends when it is unmounted.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import pyfuse3
import trio

_ROOT = pyfuse3.ROOT_INODE


def _attributes(status: os.stat_result, inode: int) -> Any:
    entry = pyfuse3.EntryAttributes()
    for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
        setattr(entry, name, getattr(status, name))
    entry.st_ino, entry.st_blksize, entry.st_blocks = inode, 4096, status.st_blocks
    entry.generation, entry.entry_timeout, entry.attr_timeout = 0, 0, 0
    return entry


class Mirror(pyfuse3.Operations):  # type: ignore[misc]
    """Inodes are those of the folder, which lies on one file system; where each lies is found again by its path."""

    enable_writeback_cache = True

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._paths = {_ROOT: folder}
        self._top = os.stat(folder).st_ino
        self._kept: dict[int, int] = {}
        self._opened: dict[int, int] = {}  # descriptor -> inode: a file may have lost its name

    def _number(self, inode: int) -> int:
        return _ROOT if inode == self._top else inode

    def _path(self, inode: int, name: bytes | None = None) -> str:
        path = self._paths[inode]
        return path if name is None else os.path.join(path, os.fsdecode(name))

    def _entry(self, path: str) -> Any:
        status = self._told(os.lstat, path)
        number = self._number(status.st_ino)
        self._paths[number] = path
        if number not in self._kept:  # held open, its number goes to no other file, which the kernel would take for it
            self._kept[number] = self._told(os.open, path, os.O_PATH | os.O_NOFOLLOW)
        return _attributes(status, number)

    def _told(self, call: Any, *args: Any, **more: Any) -> Any:
        try:
            return call(*args, **more)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> Any:
        return self._entry(self._path(parent, name))

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return _attributes(self._told(os.stat, self._target(inode)), inode)

    def _target(self, inode: int) -> str | int:
        """A descriptor of it, or its path."""
        return next((fd for fd, held in self._opened.items() if held == inode), self._paths[inode])

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        target = self._target(inode) if fh is None else fh
        if fields.update_size:
            self._told(os.truncate, target, attr.st_size)
        if fields.update_mode:
            self._told(os.chmod, target, stat.S_IMODE(attr.st_mode))
        if fields.update_mtime:
            now = self._told(os.stat, target)
            self._told(os.utime, target, ns=(now.st_atime_ns, attr.st_mtime_ns))
        return _attributes(self._told(os.stat, target), inode)

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, inode: int, start: int, token: Any) -> None:
        for number, name in enumerate(sorted(self._told(os.listdir, self._path(inode)))):
            if number >= start:
                entry = self._entry(os.path.join(self._path(inode), name))
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number + 1):
                    return

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
        self._told(os.mkdir, self._path(parent, name), mode & 0o777)
        return self._entry(self._path(parent, name))

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        self._told(os.unlink, self._path(parent, name))

    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        self._told(os.rmdir, self._path(parent, name))

    async def rename(self, old_parent: int, old: bytes, new_parent: int, new: bytes, flags: int, ctx: Any) -> None:
        before, after = self._path(old_parent, old), self._path(new_parent, new)
        if flags & 1 and os.path.lexists(after):
            raise pyfuse3.FUSEError(errno.EEXIST)
        self._told(os.rename, before, after)
        for inode, path in self._paths.items():
            if path == before or path.startswith(before + "/"):
                self._paths[inode] = after + path[len(before) :]

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        fd = self._told(os.open, self._path(inode), os.O_RDWR if flags & (os.O_RDWR | os.O_WRONLY) else os.O_RDONLY)
        self._opened[fd] = inode
        return pyfuse3.FileInfo(fh=fd)

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        path = self._path(parent, name)
        fd = self._told(os.open, path, (flags | os.O_CREAT | os.O_RDWR) & ~(os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW), mode & 0o777)
        entry = self._entry(path)
        self._opened[fd] = entry.st_ino
        return pyfuse3.FileInfo(fh=fd), entry

    async def read(self, fh: int, offset: int, size: int) -> Any:
        return self._told(os.pread, fh, size, offset)

    async def write(self, fh: int, offset: int, data: bytes) -> Any:
        return self._told(os.pwrite, fh, data, offset)

    async def release(self, fh: int) -> None:
        del self._opened[fh]
        os.close(fh)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._told(os.fsync, fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    async def statfs(self, ctx: Any) -> Any:
        told, made = os.statvfs(self._paths[_ROOT]), pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(made, name, getattr(told, name))
        made.f_namemax = 255
        return made


def main() -> None:
    folder, mountpoint = sys.argv[1:]
    options = set(pyfuse3.default_options) | {"fsname=mirror", "allow_other"}
    pyfuse3.init(Mirror(os.path.realpath(folder)), mountpoint, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
