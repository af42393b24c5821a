"""What a conversion tells when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamconv.memory import show_size


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
    `losses` of a search for INT4 codes, as the manifest tells them. `parts` are those that this process did, None if it did not share
    the work; `published` if the output then had its name.
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
    parts: tuple[int, ...] | None = None
    published: bool = True


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a conversion should take.

    Attributes:
        seconds: of wall-clock time; at least, if something is not known.
        read_rate: bytes a second of the source's files, None where that was not measured.
        write_rate: of the slowest output's file system, None where that was not measured.
        bound: "the disks" or "the processors".
        unknown: what `seconds` leaves out, and why.
    """

    seconds: float
    read_rate: float | None
    write_rate: float | None
    bound: str
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        rates = [f"{what} {show_size(rate)}/s" for what, rate in (("reading", self.read_rate), ("writing", self.write_rate)) if rate]
        text = f"{'at least' if self.unknown else 'about'} {duration(self.seconds)}, bound by {self.bound}"
        return "; ".join([f"{text} ({', '.join(rates)})" if rates else text, *(f"not known: {what}" for what in self.unknown)])

    def off(self, took: float) -> str:
        """How far it was off, in words."""
        ratio = took / self.seconds
        text = f"{abs(ratio - 1):.0%} {'longer' if ratio > 1 else 'less'} than the{' at least' if self.unknown else ''}"
        return f"{duration(took)}, {text} {duration(self.seconds)} that were estimated"


def duration(seconds: float) -> str:
    """Seconds for people: "8.1 s", "12 min", "3.4 h"."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.{1 if seconds < 10 else 0}f} s"


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did: bytes, seconds, peak memory, and everything the user should know.

    `profile` says where the time went, in seconds: loading, creating the files, an average worker's share of each phase, all tiles
    together, and the final sync. Of `bytes_read`, `bytes_mapped` were encoded from a mapping of the source, without a copy.
    `parts` are those that this process did, None if it did not share the work; `published` if the output has its name.
    Of several outputs, `outputs` tells of each; the other figures are of all of them together, read once.
    `estimate` was made before; None below 16 GiB and where nobody asked. It is of the whole work, without what an earlier run did.
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
    estimate: Estimate | None = None


def together(reports: Sequence[Written]) -> tuple[str, ...]:
    """The warnings of all outputs: what is true of each is said once, the rest with the output's name."""
    lines = dict[str, None]()
    for written in reports:
        for warning in written.warnings:
            common = all(warning in other.warnings for other in reports)
            lines[warning if common else f"{written.out}: {warning}"] = None
    return tuple(lines)
