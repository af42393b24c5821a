"""SHA-256 of little data by Python's own code: hashlib loads OpenSSL, of which 3.6 MiB stay resident."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol


class Digest(Protocol):
    """What hashlib's objects are."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...
    def digest(self) -> bytes: ...


def _sha256() -> Callable[..., Digest]:
    for name in ("_sha2", "_sha256", "hashlib"):  # since 3.12; before; where Python is built without its own
        try:
            return importlib.import_module(name).sha256  # type: ignore[no-any-return]
        except ImportError:
            continue
    raise AssertionError("hashlib is there")


sha256 = _sha256()
