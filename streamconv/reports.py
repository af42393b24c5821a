"""What a conversion tells when it is done."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class TensorError:
    """Decoded values against the source's: for all rows of a matrix (`--verify inline`), or for some of them: its first, and those
    that are not what was expected (`verify --source`).

    Attributes:
        rows: how many of them.
        snr_db: signal to noise; infinite if all values are equal.
    """

    file: str
    name: str
    rows: int
    largest: float
    relative: float
    snr_db: float


@dataclass(frozen=True, slots=True)
class Written:
    """One output of a conversion: files, tensors, bytes, tiles of an earlier run that were kept, and what the user should know of it.

    `finished`: an earlier run had made it, and nothing was done. `errors` of each matrix, if each tile was decoded (`verify_inline`).
    `losses` of a search for INT4 codes, as the manifest tells them.
    """

    out: str
    files: int
    tensors: int
    bytes_written: int
    resumed: int
    finished: bool
    warnings: tuple[str, ...]
    errors: tuple[TensorError, ...] = ()
    losses: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did: bytes, seconds, peak memory, and everything the user should know.

    `profile` says where the time went, in seconds: loading, creating the files, an average worker's share of each phase, all tiles
    together, and the final sync. Of `bytes_read`, `bytes_mapped` were encoded from a mapping of the source, without a copy.
    `parts` are those that this process did, None if it did not share the work; `published` if the output has its name.
    Of several outputs, `outputs` tells of each; the other figures are of all of them together, read once.
    """

    out: str
    files: int
    tensors: int
    bytes_read: int
    bytes_mapped: int
    bytes_written: int
    seconds: float
    peak_memory: int
    budget: int
    workers: int
    tiles: int
    resumed: int
    device: str
    profile: dict[str, float]
    warnings: tuple[str, ...]
    parts: tuple[int, ...] | None = None
    published: bool = True
    outputs: tuple[Written, ...] = ()


def together(made: Sequence[Written]) -> tuple[str, ...]:
    """The warnings of all outputs: what is true of each is said once, the rest with the output's name."""
    told = dict[str, None]()
    for written in made:
        for warning in written.warnings:
            common = all(warning in other.warnings for other in made)
            told[warning if common else f"{written.out}: {warning}"] = None
    return tuple(told)


def profile_of(laps: Sequence[float], spent: Mapping[str, float], workers: int) -> dict[str, float]:
    """Where the time went, in seconds.

    Args:
        laps: when the run began, had loaded, had made the files, had done the tiles, and had published.
        spent: worker seconds by phase.
    """
    load, create, tiles, sync = (after - before for before, after in itertools.pairwise(laps))
    phases = {phase: seconds / workers for phase, seconds in spent.items()}
    return {"load": load, "create": create, **phases, "tiles": tiles, "sync": sync}
