"""What `verify` found."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamconv.reports import TensorError as TensorError


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
