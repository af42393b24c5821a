"""The files of an output as a part of the work writes them, while other machines write other parts of the same files.

A machine writes whole pages: of a page that two parts share, the last one to write it would undo what the other wrote. So a part writes
in place only the pages that are all its own, and the rest, some pages of each file, into a file aside, which goes into place when all
parts are done. On its own pages it holds byte-range locks: a machine that was cut off, whose part another one does, cannot write there.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence

import xxhash

from streamconv.errors import OutputError, printable
from streamconv.memory import MIB
from streamconv.planning.plan import OutputFile
from streamconv.run.fs import Folder, read_fully, translate_errors, write_all
from streamconv.run.output_folder import OutputFolder
from streamconv.run.place import Place

Ranges = Sequence[tuple[int, int]]


def own_pages(ranges: Ranges, size: int, page: int) -> list[tuple[int, int]]:
    """The whole pages inside byte ranges of a file of `size` bytes; what is beyond its end belongs to whoever has the last byte."""
    pages = []
    for begin, end in ranges:
        first, last = -(-begin // page) * page, size if end == size else end // page * page
        if first < last:
            pages.append((first, last))
    return pages


def shared(ranges: Ranges, own: Ranges) -> list[tuple[int, int]]:
    """Those bytes of `ranges` that are not in `own`."""
    pages = []
    for begin, end in ranges:
        at = begin
        for first, last in own:
            if begin <= first and last <= end:
                pages.append((at, first))
                at = last
        pages.append((at, end))
    return [(begin, end) for begin, end in pages if begin < end]


def apart(files: Sequence[OutputFile], extents: Sequence[Ranges], page: int, private: bool) -> Iterator[tuple[str, int, int]]:
    """(file, begin, end) of what a part with these byte ranges keeps aside: all of it, or what shares pages with others."""
    for file, ranges in zip(files, extents, strict=True):
        for begin, end in shared(ranges, [] if private else own_pages(ranges, file.size, page)):
            yield file.name, begin, end


class Aside:
    """Bytes that are kept apart: one sparse file, in which every byte lies as it would in all files of the output, one after the other."""

    def __init__(self, folder: Folder, name: str, files: Sequence[OutputFile], page: int, fresh: bool) -> None:
        self.folder, self.name, self.disk = folder, name, folder.disk
        self.path = folder.path / name
        self._at, at = dict[str, int](), 0
        for file in files:
            self._at[file.name] = at
            at += -(-file.size // page) * page
        with translate_errors(self.path, "write"):
            self._fd = folder.open(name, make=fresh, fresh=fresh)
        self.dirty = False

    def write(self, name: str, offset: int, data: memoryview) -> None:
        with translate_errors(self.path, "write"):
            write_all(self.disk, self._fd, data, self._at[name] + offset)
        self.dirty = True  # after: a sync meanwhile may have missed it

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """What was never written is zero; fewer bytes than asked for only where the file ends."""
        with translate_errors(self.path, "read"):
            return read_fully(self._fd, self._at[name] + offset, buffer)

    def copy(self, name: str, begin: int, end: int, take: Callable[[int, memoryview], object]) -> None:
        """Give `take` the bytes [begin, end) of a file, by (offset, bytes).

        Raises:
            OutputError: there are fewer; a server may show an old size for a while.
        """
        buffer = memoryview(bytearray(min(end - begin, MIB)))
        for at in range(begin, end, MIB):
            piece = buffer[: min(MIB, end - at)]
            if self.read_into(name, at, piece) < len(piece):
                shown = printable(self.path)
                raise OutputError(f"{shown} ends early", hint="run `streamconv finalize` again, on another machine if it stays so")
            take(at, piece)

    def sync(self) -> None:
        if self.dirty:
            self.dirty = False  # before: what is written meanwhile is for the next time
            with translate_errors(self.path, "sync"):
                self.disk.sync_data(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self.disk.close(fd)


class PartFolder(OutputFolder):
    """Writes one part of an output; the files are there, at full size.

    Args:
        place: of the output, where the work is open.
        extents: for each file the byte ranges of the part.
        page: bytes that one machine writes at once.
        aside: takes what others have a share of; its name tells this attempt from others.
        private: all of it goes aside, for file systems whose locks do not reach other machines.
    """

    def __init__(
        self, place: Place, files: Sequence[OutputFile], extents: Sequence[Ranges], page: int, aside: Aside, private: bool
    ) -> None:
        super().__init__(place)
        self.aside = aside
        self._own: dict[str, Ranges] = {}
        self._begins: dict[str, list[int]] = {}
        self._apart = list(apart(files, extents, page, private))
        for file, ranges in zip(files, extents, strict=True):
            if ranges:
                self._own[file.name] = [] if private else own_pages(ranges, file.size, page)
                self._begins[file.name] = [begin for begin, _ in self._own[file.name]]
                self._sizes[file.name] = file.size

    def open(self) -> None:
        """Open the files, and lock what is written in place.

        Raises:
            BlockingIOError: another attempt at this part still holds some of it.
            OutputError: a file is gone, or has another size.
        """
        for name, own in self._own.items():
            if own:
                with translate_errors(self._path(name), "open"):
                    self.adopt(name, self._sizes[name])
                for begin, end in own:
                    self.place.work.folder.lock_range(self._fds[name], begin, end)

    def _pieces(self, name: str, offset: int, size: int) -> Iterator[tuple[int, int, bool]]:
        """The bytes [offset, offset + size) as (begin, end, in place)."""
        own, at, stop = self._own[name], offset, offset + size
        number = max(0, bisect.bisect_right(self._begins[name], offset) - 1)
        for begin, end in own[number:]:
            if begin >= stop:
                break
            if end <= at:
                continue
            if at < begin:
                yield at, begin, False
            yield max(at, begin), min(end, stop), True
            at = min(end, stop)
        if at < stop:
            yield at, stop, False

    def write(self, name: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        for begin, end, mine in self._pieces(name, offset, len(view)):
            piece = view[begin - offset : end - offset]
            if mine:
                super().write(name, begin, piece)
            else:
                self.aside.write(name, begin, piece)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        for begin, end, mine in self._pieces(name, offset, len(buffer)):
            piece = buffer[begin - offset : end - offset]
            if not mine:
                done = self.aside.read_into(name, begin, piece)
                piece[done:] = bytes(len(piece) - done)
            elif super().read_into(name, begin, piece) < len(piece):
                raise OutputError(f"{name} ends early", hint="start over with --force")
        return len(buffer)

    def sync(self, names: Iterable[str]) -> None:
        super().sync(name for name in names if name in self._fds)
        self.aside.sync()

    def finish(self) -> str:
        """All of the part is written: wait until it is on the disk; gives the XXH3-128 (hex) of what is aside."""
        for name, fd in self._fds.items():
            with translate_errors(self._path(name), "sync"):
                self.disk.sync(fd)
        self.aside.sync()
        digest = xxhash.xxh3_128()
        for name, begin, end in self._apart:
            self.aside.copy(name, begin, end, lambda at, piece: digest.update(piece))
        return digest.hexdigest()

    def close(self) -> None:
        super().close()
        self.aside.close()
