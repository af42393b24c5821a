"""Read the small JSON files of a source, which may be damaged or hostile."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from streamconv.checkpoint.limits import check_counts
from streamconv.checkpoint.untrusted import parse_json, read_file, refuse_lfs_pointer
from streamconv.errors import CheckpointError, TensorError, printable
from streamconv.memory import check_room

_JSON_TAKES = 5
"""Bytes of memory that a byte of a long index file takes while it is read."""


def read_json(path: Path, limit: int, *, unique: bool = False) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Args:
        unique: refuse an object that has a key twice, where plain JSON reading keeps the last.

    Raises:
        CheckpointError: not readable, larger than limit bytes or than limits.py allows, or no JSON object.
        TensorError: with unique, a key is there twice.
        BudgetError: it does not fit into the memory budget.
    """
    shown = printable(str(path))
    check_room(_JSON_TAKES * file_size(path), f"reading {shown}")
    raw = read_file(path, limit)
    refuse_lfs_pointer(raw, shown)
    check_counts(raw, shown)
    value = parse_json(raw, shown, twice=TensorError if unique else None)
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown} must hold a JSON object")
    return value


def file_size(path: Path) -> int:
    """Bytes of a file, 0 if that is not known."""
    with contextlib.suppress(OSError, ValueError):
        return os.stat(path).st_size
    return 0
