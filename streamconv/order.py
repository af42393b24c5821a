"""Whole-tensor hashes while tiles are worked on out of order."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamconv.plan import Matrix

if TYPE_CHECKING:
    import numpy as np


class Stop(Exception):
    """Another worker failed."""


class Order:
    """Each matrix is hashed front to back: a worker waits until the rows before its own are hashed.

    Tiles are handed out in plan order and every matrix's rows ascend in it, so whoever is waited for is always at work.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        import xxhash

        self._next = [0] * len(matrices)
        self._turn = threading.Condition()
        self.digests = [[xxhash.xxh3_128() for _ in matrix.places] for matrix in matrices]
        self.stopped = False

    def take(self, matrix: int, row: int, rows: int, parts: Sequence[np.ndarray[Any, Any]]) -> None:
        self.wait(matrix, row)
        for digest, part in zip(self.digests[matrix], parts, strict=True):
            digest.update(part.data)
        self.passed(matrix, row, rows)

    def wait(self, matrix: int, row: int) -> None:
        """Until it is the turn of `row`."""
        with self._turn:
            while self._next[matrix] != row and not self.stopped:
                self._turn.wait()
            if self.stopped:
                raise Stop

    def passed(self, matrix: int, row: int, rows: int) -> None:
        with self._turn:
            self._next[matrix] = row + rows
            self._turn.notify_all()

    def stop(self) -> None:
        with self._turn:
            self.stopped = True
            self._turn.notify_all()

    def pad(self, number: int, matrix: Matrix) -> None:
        """Hash the zero rows at the end of a matrix."""
        if self._next[number] != matrix.filled:
            raise AssertionError(f"{matrix.name}: {self._next[number]} of {matrix.filled} rows were written")
        for digest, place in zip(self.digests[number], matrix.places, strict=True):
            left = (matrix.rows - matrix.filled) * place.row_bytes
            while left:
                digest.update(bytes(min(left, 1 << 20)))
                left -= min(left, 1 << 20)
