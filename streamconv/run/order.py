"""What workers wait for while tiles are worked on out of order: their turn in the hash of a whole tensor, and reductions."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import xxhash

from streamconv.lazy import Bytes, np
from streamconv.memory import MIB
from streamconv.planning.plan import Matrix, OutputFile, RowRange


class Stop(Exception):
    """Another worker failed."""


class Hashes:
    """XXH3-128 of every tensor of the output, 16 bytes each."""

    SIZE = 16

    def __init__(self, files: Sequence[OutputFile]) -> None:
        self._files = [bytearray(self.SIZE * file.tensors) for file in files]

    def put(self, file: int, position: int, digest: bytes) -> None:
        """The hash of the tensor at a position in the order of the file's data."""
        self._files[file][position * self.SIZE : (position + 1) * self.SIZE] = digest

    def at(self, file: int, position: int) -> str:
        """The hash that was put there, hex."""
        return self._files[file][position * self.SIZE : (position + 1) * self.SIZE].hex()

    def of_files(self) -> list[Iterator[str]]:
        """For each file the hashes of its tensors, hex, in the order of the data."""
        return [self._hex(data) for data in self._files]

    def _hex(self, data: bytearray) -> Iterator[str]:
        for at in range(0, len(data), self.SIZE):
            yield data[at : at + self.SIZE].hex()


def hash_of(read_into: Callable[[int, memoryview], object], begin: int, end: int) -> str:
    """XXH3-128 (hex) of bytes that `read_into(offset, buffer)` reads."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(end - begin, MIB)))
    for at in range(begin, end, MIB):
        piece = buffer[: min(MIB, end - at)]
        read_into(at, piece)
        digest.update(piece)
    return digest.hexdigest()


class HashOrder:
    """Each matrix is hashed front to back: a worker waits until the rows before its own are hashed.

    Tiles are handed out in plan order and every matrix's rows ascend in it, so whoever is waited for is always at work. A hash has a
    state of half a KiB for as long as its matrix is begun and not finished; few are at a time.

    Args:
        loose: matrices whose rows come in any order; who writes the last of them hashes the whole.
    """

    def __init__(self, matrices: Sequence[Matrix], hashes: Hashes, loose: Collection[int] = ()) -> None:
        self._matrices, self._hashes, self._loose = matrices, hashes, loose
        self._next = array("Q", bytes(8 * len(matrices)))
        self._turn = threading.Condition()
        self._begun: dict[int, list[xxhash.xxh3_128]] = {}
        self.stopped = False

    def digests(self, matrix: int) -> list[xxhash.xxh3_128]:
        """The hashes of a matrix's parts so far; whose turn it is may update them."""
        if matrix not in self._begun:
            self._begun[matrix] = [xxhash.xxh3_128() for _ in self._matrices[matrix].places]
        return self._begun[matrix]

    def take(self, matrix: int, row: int, rows: int, parts: Sequence[Bytes]) -> None:
        if matrix in self._loose:
            return
        self.wait(matrix, row)
        for digest, part in zip(self.digests(matrix), parts, strict=True):
            digest.update(part.data)
        self.passed(matrix, row, rows)

    def is_loose(self, matrix: int) -> bool:
        return matrix in self._loose

    def wait(self, matrix: int, row: int) -> None:
        """Until it is the turn of `row`."""
        with self._turn:
            while self._next[matrix] != row and not self.stopped:
                self._turn.wait()
            if self.stopped:
                raise Stop

    def passed(self, matrix: int, row: int, rows: int) -> None:
        """These rows are hashed; with the last one the matrix is finished."""
        if row + rows == self._matrices[matrix].filled:
            self._finish(matrix)
        with self._turn:
            self._next[matrix] = row + rows
            self._turn.notify_all()

    def is_last(self, matrix: int, rows: int) -> bool:
        """These rows of a matrix are written, and with them all rows of a loose one."""
        if matrix not in self._loose:
            return False
        with self._turn:
            self._next[matrix] += rows
            return self._next[matrix] == self._matrices[matrix].filled

    def stop(self) -> None:
        with self._turn:
            self.stopped = True
            self._turn.notify_all()

    def close(self) -> None:
        """All tiles are done: finish what got no row at all.

        Raises:
            AssertionError: rows of a matrix were not written.
        """
        for number, matrix in enumerate(self._matrices):
            if self._next[number] != matrix.filled:
                raise AssertionError(f"{matrix.name}: {self._next[number]} of {matrix.filled} rows were written")
            if not matrix.filled and number not in self._loose:
                self._finish(number)

    def _finish(self, number: int) -> None:
        """Hash the zero rows at the end of a matrix, and note its hashes."""
        matrix, digests = self._matrices[number], self.digests(number)
        del self._begun[number]
        for digest, place in zip(digests, matrix.places, strict=True):
            begin, end = place.extent(matrix.filled, matrix.rows - matrix.filled)
            for at in range(begin, end, MIB):
                digest.update(bytes(min(MIB, end - at)))
            self._hashes.put(matrix.file, place.position, digest.digest())


class ReductionResults:
    """Merges what tiles contribute to a reduction; whoever needs the result waits until the last tile is in.

    Spans that reduce come before those that need them and tiles are handed out in that order, so whoever is waited for is
    always at work. What is kept is small: two bytes for each input channel, and scalars.
    """

    def __init__(self, spans: Iterable[RowRange]) -> None:
        self._missing: dict[str, int] = {}
        for span in spans:
            if span.reduce is not None:
                self._missing[span.reduce.key] = self._missing.get(span.reduce.key, 0) + span.stop - span.start
        self._values: dict[str, np.ndarray[Any, Any]] = {}
        self._change = threading.Condition()
        self._stopped = False

    def add(self, key: str, rows: int, value: np.ndarray[Any, Any]) -> None:
        """A tile of `rows` source rows found these maxima."""
        with self._change:
            known = self._values.get(key)
            self._values[key] = value if known is None else np.asarray(np.maximum(known, value))
            self._missing[key] -= rows
            self._change.notify_all()

    def get(self, key: str) -> np.ndarray[Any, Any]:
        """The result over all rows; always the same object.

        Raises:
            Stop: another worker failed.
        """
        with self._change:
            while self._missing[key] and not self._stopped:
                self._change.wait()
            if self._missing[key]:
                raise Stop
            return self._values[key]

    def stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
