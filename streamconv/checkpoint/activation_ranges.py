"""Activation ranges: what a calibration run measured, read from a safetensors file.

For a linear module M the file holds `M.x` [in] and `M.y` [out]: the largest absolute input and output of each channel.
`M.w` may be there; it is not used. Vectors are read when they are asked for and not kept.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from streamconv.checkpoint.header import read_header
from streamconv.checkpoint.rows import SourceFile
from streamconv.checkpoint.shard import Shard
from streamconv.errors import DataError, TensorError, UsageError, printable
from streamconv.lazy import np

HINT = "run `streamconv calibrate MODEL -o FILE ...` and pass --activation-ranges FILE"


_LEAST = 448 * 2.0**-126
"""A scale is at least a 448th of the range; below the normal numbers of float32 its reciprocal is infinite."""


class Ranges:
    """An open activation-ranges file; equal only to itself. Safe to read from any thread.

    Raises:
        UsageError: there is no such file. HeaderError: it is no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not os.path.isfile(self.path):
            raise UsageError(f"--activation-ranges {printable(path)}: no such file", hint=HINT)
        self._entries = read_header(self.path).tensors
        self.shard = Shard(self.path)
        weakref.finalize(self, self.shard.close)  # plans and codecs refer to it: the last of them closes it

    def identity(self) -> SourceFile:
        """The hash is the SHA-256 of the content."""
        import hashlib  # with OpenSSL, faster and larger

        digest, size = hashlib.sha256(), self.shard.size
        for at in range(0, size, 1 << 20):
            with self.shard.window(at, min(at + (1 << 20), size)) as window:
                digest.update(window)
        return SourceFile(self.path.name, size, digest.hexdigest())

    def problem(self, name: str, length: int) -> str | None:
        """What is wrong with the vector `name` that must hold `length` float32 values, all finite and not negative."""
        entry = self._entries.get(name)
        where = f"{printable(self.path)}: {printable(name)}"
        if entry is None:
            return f"{where} is missing; was it measured on this model?"
        if entry.dtype.name != "F32" or entry.shape != (length,):
            return f"{where} is {entry.dtype.name} {list(entry.shape)}, expected F32 [{length}] for this model"
        values = self.vector(name)
        if not bool((np.isfinite(values) & (values >= 0)).all()):
            return f"{where}: not finite or negative; measure it again"
        if not values.any():
            return f"{where}: all values are zero; no text has passed this layer"
        return None

    def silent(self, name: str) -> bool:
        """Nothing was measured under this name: it is missing, or all values are zero."""
        entry = self._entries.get(name)
        return entry is None or (entry.dtype.name == "F32" and len(entry.shape) == 1 and not self.vector(name).any())

    def vector(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [channels]."""
        entry = self._entries[name]
        values = np.empty(entry.shape, np.float32)
        self.shard.read_into(entry.begin, values.view(np.uint8).data)
        return values

    def amax(self, names: list[str]) -> float:
        """The maximum over some vectors; a float32 value, large enough for a scale that is made from it.

        Raises:
            DataError: it is so small that its scale could not be divided by.
        """
        largest, name = max((float(self.vector(name).max()), name) for name in names)
        if largest < _LEAST:
            where = f"{printable(self.path)}: {printable(name)}"
            raise DataError(f"{where}: the largest value is {largest:g}, too small for a scale", hint="measure it again")
        return largest

    def check(self, lengths: dict[str, int]) -> None:
        """Check vectors (name -> length).

        Raises:
            TensorError: some are missing or wrong; all of them are listed.
        """
        wrong = [line for line in (self.problem(name, length) for name, length in lengths.items()) if line]
        if wrong:
            raise TensorError(wrong, hint=HINT)
