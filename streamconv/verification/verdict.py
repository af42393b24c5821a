"""What `verify` found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TensorError:
    """Decoded values against the source's, for some rows of a matrix of one rank: its first, and those that are not what was expected.

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


@dataclass(slots=True)
class Verdict:
    """What verify found; `problems` empty means good.

    Attributes:
        hashed: tensors whose hash is the manifest's.
        encoded: tensors that are, to the byte, what encoding the source again gives.
        errors: how far the values are from the source's, for every matrix.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    hashed: int = 0
    encoded: int = 0
    errors: list[TensorError] = field(default_factory=list)
    reader: str | None = None
