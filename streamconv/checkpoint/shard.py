"""One source file: opened lazily, read with positioned reads only, and noticed when it changes under us.

What is read is copied: that works for cold files and on every file system. Mappings (mapping.py) save the copy of what is in the
page cache; a mapped page of a file that someone cuts off gives SIGBUS, even when it was populated before, so they are guarded.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import xxhash

from streamconv.checkpoint.header import header_of
from streamconv.checkpoint.header_parse import Header
from streamconv.checkpoint.page_cache import cached_places, private_mapping
from streamconv.checkpoint.untrusted import frees_descriptors, open_regular
from streamconv.digest import sha256
from streamconv.errors import CheckpointError, SourceChangedError, UnreadableError, printable

_ROWS_PER_CALL = 256  # two vectors a row stay below IOV_MAX, which is 1024 on Linux
_SAMPLE, _OF_TILE = 16, 4  # places of a file, and of a few MiB of it: one takes 3 microseconds
_PLACES, _PIECE = 8, 4096
_using = threading.Lock()
"""Held to begin or end a use of any shard's descriptor, and to close the idle ones."""
_SMALL_GAP = 4096  # reading over a gap up to a page is cheaper than one more call

_shards: weakref.WeakSet[Shard] = weakref.WeakSet()


class Identity(NamedTuple):
    """What stays the same as long as nobody changes or replaces a file; only ctime_ns cannot be put back by who does."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


def _close_idle() -> bool:
    """Close half of the shards that nobody reads right now; they open again by themselves. False if there is none."""
    with _using:
        idle = [shard for shard in _shards if shard.idle]
        for shard in idle[: (len(idle) + 1) // 2]:
            shard.close()
    return bool(idle)


frees_descriptors.append(_close_idle)


class Shard:
    """A source file. Safe to read from many threads; close() only when nobody reads any more."""

    __slots__ = ("__weakref__", "_cold", "_fd", "_identity", "_lock", "_mapping", "_users", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = -1
        self._cold = False
        self._identity: Identity | None = None
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        self._users = 0
        with _using:
            _shards.add(self)

    def __repr__(self) -> str:
        return f"Shard({str(self.path)!r})"

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor; opens the file at the first call.

        Raises:
            CheckpointError: the file cannot be opened.
            SourceChangedError: it was opened before, closed, and is now another file.
        """
        if self._fd >= 0:
            return self._fd
        with self._lock:
            if self._fd < 0:
                fd = open_regular(self.path)
                now = identity_of(os.fstat(fd))
                if self._identity not in (None, now):
                    os.close(fd)
                    raise self._changed("was replaced or changed")
                if self._identity is None:
                    self._cold = 2 * cached_places(fd, 0, now.size, _SAMPLE) < _SAMPLE
                self._identity, self._fd = now, fd
            return self._fd

    def prove(self, proof: Callable[[Shard], object]) -> None:
        """Call `proof` with the file: at once, or when it is there."""
        proof(self)

    @property
    def idle(self) -> bool:
        """It is open, and nobody reads it."""
        return self._fd >= 0 and not self._users

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        """The descriptor, which stays open meanwhile."""
        with _using:
            self._users += 1
        try:
            yield self.fileno()
        finally:
            with _using:
                self._users -= 1

    @property
    def identity(self) -> Identity:
        """As it was when the file was first opened."""
        if self._identity is None:
            self.fileno()
        assert self._identity is not None
        return self._identity

    @property
    def size(self) -> int:
        return self.identity.size

    def evidence(self) -> list[int | str]:
        """What tells this content from another of the same size, header and name: mtime_ns, ctime_ns, inode, `sample`."""
        known = self.identity
        return [known.mtime_ns, known.ctime_ns, known.inode, self.sample()]

    def sample(self) -> str:
        """XXH3-128 (hex) of some places of the content: other weights under the same size and times differ, most likely."""
        digest, last = xxhash.xxh3_128(), max(0, self.size - _PIECE)
        for place in range(_PLACES):
            begin = last * (place + 1) // _PLACES
            with self.window(begin, min(begin + _PIECE, self.size)) as window:
                digest.update(window)
        return digest.hexdigest()

    def header(self) -> Header:
        """What the header of a safetensors file says.

        Raises:
            HeaderError: it breaks a rule of the format.
        """
        with self.descriptor() as fd:
            return header_of(fd, self.path)

    def header_hash(self) -> str:
        """SHA-256 (hex) of the header of a safetensors file with its length, which fixes where every tensor lies."""
        with self.window(0, 8) as length:
            size = 8 + int.from_bytes(length, "little")
        with self.window(0, size) as header:
            return sha256(header).hexdigest()

    def close(self) -> None:
        """Give the descriptor back; a later read opens the file again, and checks that it is the same one."""
        with self._lock:
            fd, self._fd, self._mapping = self._fd, -1, None  # views that are still in use keep the mapping
        if fd >= 0:
            os.close(fd)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer from the file.

        Raises:
            SourceChangedError: the file ends before the buffer is full.
            UnreadableError: the system refuses.
        """
        self._fill(offset, [memoryview(buffer).cast("B")])

    def read_rows_into(
        self,
        offset: int,
        row_stride: int,
        row_bytes: int,
        rows: int,
        buffer: bytearray | memoryview,
        buffer_stride: int,
    ) -> None:
        """Read `rows` rows of `row_bytes` that lie `row_stride` apart in the file, to `buffer_stride` apart.

        The bytes of the buffer between the rows keep what they hold.

        Raises:
            SourceChangedError: as read_into.
            ValueError: the strides make rows overlap, or the buffer is too small.
        """
        if rows <= 0 or row_bytes == 0:
            return
        view = memoryview(buffer).cast("B")
        if row_stride < row_bytes or buffer_stride < row_bytes or len(view) < (rows - 1) * buffer_stride + row_bytes:
            raise ValueError("rows overlap, or do not fit into the buffer")
        if row_stride == row_bytes == buffer_stride:
            self._fill(offset, [view[: rows * row_bytes]])
            return
        gap = row_stride - row_bytes
        step = _ROWS_PER_CALL if gap <= _SMALL_GAP else 1
        skipped = memoryview(bytearray(gap if step > 1 else 0))
        for first in range(0, rows, step):
            views = []
            for row in range(first, min(first + step, rows)):
                views += [view[row * buffer_stride : row * buffer_stride + row_bytes], skipped]
            self._fill(offset + first * row_stride, views[:-1])  # what follows the last row may not exist

    @contextlib.contextmanager
    def window(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes [begin, end) of the file, read-only; do not keep them longer than the block.

        Raises:
            SourceChangedError: as read_into.
        """
        buffer = bytearray(max(0, end - begin))
        self.read_into(begin, buffer)
        yield memoryview(buffer).toreadonly()

    def view(self, begin: int, end: int) -> memoryview:
        """The bytes [begin, end) of the file without a copy, for those who accept a mapping's risk; valid as long as it is kept.

        Raises:
            SourceChangedError: the file is shorter than it was.
            UnreadableError: the system does not map it.
        """
        from streamconv.checkpoint.mapping import is_local

        if begin >= end:
            return memoryview(b"")
        if not is_local(self):  # pages of a network file system may be gone at any touch
            buffer = bytearray(end - begin)
            self.read_into(begin, buffer)
            return memoryview(buffer)
        with self.descriptor() as fd, self._lock:
            if os.fstat(fd).st_size < max(end, self.size):  # touching a page that is gone would end the process
                raise self._changed(f"ends at byte {os.fstat(fd).st_size}")
            try:
                self._mapping = self._mapping or private_mapping(fd, self.size)
            except OSError as error:
                raise self._unreadable(f"cannot be mapped: {os.strerror(error.errno or 0)}") from error
            return memoryview(self._mapping)[begin:end]

    def cached(self, begin: int, end: int) -> bool:
        """Most of the file was in the page cache before we read any of it, and all of this range seems to be."""
        with self.descriptor() as fd:
            if self._cold:
                return False
            with contextlib.suppress(OSError, ValueError), self._lock:  # ValueError: the file is shorter now
                self._mapping = self._mapping or private_mapping(fd, self.size)
            return cached_places(fd, begin, end, _OF_TILE, self._mapping) == _OF_TILE

    def lost(self, end: int) -> CheckpointError:
        """The error for bytes up to `end` that could not be had."""
        try:
            with self.descriptor() as fd:
                now = identity_of(os.fstat(fd))
        except CheckpointError as error:
            return error
        if now.size < end:
            return self._changed(f"ends at byte {now.size}, {end - now.size} bytes early")
        return self._unreadable("cannot be read") if now == self._identity else self._changed("was replaced or changed")

    def drop_page_cache(self, begin: int, end: int) -> None:
        """These bytes are not needed again: out of the page cache with them, if it was us who brought them in.

        What we read once must not push others out; and pages that are used again at once cost less than fresh ones.
        """
        if self._cold and end > begin and self._fd >= 0:
            with contextlib.suppress(OSError):  # advice only; some file systems take none
                os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Compare the file, by path and by descriptor, with what was first opened.

        Raises:
            SourceChangedError: it was replaced, changed, or is gone.
        """
        expected = self._identity or self.identity
        try:
            by_path = identity_of(os.stat(self.path))
            with self.descriptor() as fd:
                by_fd = identity_of(os.fstat(fd))
        except FileNotFoundError:
            raise self._changed("is gone") from None
        except OSError as error:
            raise self._unreadable(f"cannot be looked at: {error.strerror}") from error
        if by_path != expected or by_fd != expected:
            shrank = by_path.size != expected.size
            raise self._changed(f"changed its size to {by_path.size} bytes" if shrank else "was replaced or changed")

    def _fill(self, offset: int, views: list[memoryview]) -> None:
        with self.descriptor() as fd:
            self._fill_from(fd, offset, views)

    def _fill_from(self, fd: int, offset: int, views: list[memoryview]) -> None:
        left = sum(map(len, views))
        while left:
            try:
                got = os.preadv(fd, views, offset)  # at most 2 GiB a call; more takes several
            except BlockingIOError:
                continue  # O_NONBLOCK means nothing for regular files, but some FUSE servers pass it on
            except OSError as error:
                raise self._unreadable(f"cannot be read at byte {offset}: {os.strerror(error.errno or 0)}") from error
            if got <= 0:
                raise self._changed(f"ends at byte {offset}, {left} bytes early")
            left -= got
            offset += got
            if left:
                while got >= len(views[0]):
                    got -= len(views[0])
                    views = views[1:]
                views = [views[0][got:], *views[1:]]

    def _unreadable(self, what: str) -> UnreadableError:
        return UnreadableError(f"source file {printable(self.path)} {what}", hint="check the disk or the network")

    def _changed(self, what: str) -> SourceChangedError:
        return SourceChangedError(
            f"source file {printable(self.path)} {what}",
            hint="the source must not change while it is read; check the disk, then run again",
        )


def identity_of(status: os.stat_result) -> Identity:
    return Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
