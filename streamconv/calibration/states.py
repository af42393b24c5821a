"""The hidden states of all samples between two layers: in a file, or on the device where they fit.

In a file they are synced after every layer. While memory is free the page cache holds them, and when it is not the system lets them go.
On a device a layer takes less time than writing them, so they are written only now and then: an interrupted run repeats some layers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import BinaryIO

import torch

from streamconv.calibration.scratch import Scratch
from streamconv.errors import SourceChangedError
from streamconv.memory import MIB
from streamconv.run.fs import translate_errors

Shape = tuple[int, int, int]
"""Samples, tokens, hidden size."""

_PIECE = 64 * MIB
"""Bytes that cross the bus at a time."""

_OVERHEAD = 10
"""States on a device are written when this many times their writing has passed: a tenth of the time at most goes there."""

_GUESS = 1e9
"""Bytes a second of the first writing."""


class Files:
    """States in a file of each layer. `dtype`: computing type."""

    def __init__(self, scratch: Scratch, dtype: torch.dtype, device: str) -> None:
        self._scratch, self._dtype, self._device = scratch, dtype, device

    @contextmanager
    def filling(self) -> Iterator[None]:
        """A context in which what goes into layer 0 is `put`."""
        with translate_errors(self._scratch.folder, "write"), open(self._scratch.states(0), "wb") as self._after:
            yield

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """A context in which the states of all samples are taken, and put as layer `number` made them; saved when it ends."""
        with (
            translate_errors(self._scratch.folder, "write"),
            open(self._scratch.states(number), "rb") as self._before,
            open(self._scratch.states(number + 1), "wb") as self._after,
        ):
            yield
            self._after.flush()
            os.fsync(self._after.fileno())
        self._scratch.saved(number + 1)

    def rewind(self) -> None:
        """What is taken next are the states of the first sample."""
        self._before.seek(0)

    def take(self, shape: Shape) -> torch.Tensor:
        """The next states, on the device."""
        return _read(self._before, torch.empty(shape, dtype=self._dtype)).to(self._device)

    def put(self, states: torch.Tensor) -> None:
        """What the states become, in the order they were taken."""
        self._after.write(_bytes(states))


class OnDevice:
    """States in one tensor [tokens, hidden] on the device, changed in place.

    Args:
        scratch: the folder, whose states they are if a run was interrupted.
        hidden: size of a state.
    """

    def __init__(self, scratch: Scratch, tokens: int, hidden: int, dtype: torch.dtype, device: str) -> None:
        self._scratch, self._at, self._taken = scratch, 0, 0
        self._all = torch.empty(tokens, hidden, dtype=dtype, device=device)
        self._rows = max(1, _PIECE // (hidden * dtype.itemsize))
        self._cost, self._last = self._all.nbytes / _GUESS, time.monotonic()
        if scratch.done:
            with translate_errors(scratch.folder, "read"), open(scratch.states(scratch.done), "rb") as file:
                for piece in self._all.split(self._rows):  # type: ignore[no-untyped-call]
                    piece.copy_(_read(file, torch.empty(piece.shape, dtype=dtype)))

    @contextmanager
    def filling(self) -> Iterator[None]:
        """As Files.filling."""
        yield

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """As Files.layer, but saved only if that is due."""
        self._at = self._taken = 0
        yield
        began = time.monotonic()
        if began - self._last < _OVERHEAD * self._cost:
            return
        with translate_errors(self._scratch.folder, "write"), open(self._scratch.states(number + 1), "wb") as file:
            for piece in self._all.split(self._rows):  # type: ignore[no-untyped-call]
                file.write(_bytes(piece))
            file.flush()
            os.fsync(file.fileno())
        self._scratch.saved(number + 1)
        self._last = time.monotonic()
        self._cost = self._last - began

    def rewind(self) -> None:
        """As Files.rewind."""
        self._taken = 0

    def take(self, shape: Shape) -> torch.Tensor:
        """As Files.take."""
        first, self._taken = self._taken, self._taken + prod(shape[:2])
        return self._all[first : self._taken].view(shape)

    def put(self, states: torch.Tensor) -> None:
        """As Files.put."""
        rows = states.reshape(-1, states.shape[-1])
        self._all[self._at : self._at + len(rows)].copy_(rows)
        self._at += len(rows)


def fit_on_device(device: str, size: int) -> bool:
    """Whether a CUDA device has room for `size` bytes of states and as much beside them."""
    return torch.device(device).type == "cuda" and 2 * size <= torch.cuda.mem_get_info(device)[0]


def _bytes(states: torch.Tensor) -> memoryview:
    data: memoryview = states.detach().contiguous().cpu().view(torch.uint8).numpy().data
    return data.cast("B")


def _read(file: BinaryIO, states: torch.Tensor) -> torch.Tensor:
    if file.readinto(states.view(torch.uint8).numpy().data.cast("B")) != states.nbytes:  # type: ignore[attr-defined]
        raise SourceChangedError(f"{file.name}: ends early", hint="remove it and start again")
    return states
