"""Read the small JSON files of a source, which may be damaged or hostile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from streamconv.checkpoint import lfs
from streamconv.checkpoint.limits import MAX_CONTAINERS, MAX_TENSORS, MAX_WIDE_JSON
from streamconv.checkpoint.shard import open_regular
from streamconv.errors import CheckpointError, TensorError, printable


def read_json(path: Path, limit: int, *, unique: bool = False) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Args:
        unique: refuse an object that has a key twice, where plain JSON reading keeps the last.

    Raises:
        CheckpointError: not readable, larger than limit bytes or than limits.py allows, or no JSON object.
        TensorError: with unique, a key is there twice.
    """
    shown = printable(str(path))

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(pairs)
        if len(held) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise TensorError(f"{shown} lists {printable(twice)} twice", hint="remove one of the two entries")
        return held

    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError(f"{shown} has {size} bytes; at most {limit} are accepted")
        with os.fdopen(fd, "rb", closefd=False) as file:
            raw = file.read(size)
        if lfs.is_pointer(raw):
            raise CheckpointError(f"{shown} {lfs.POINTER}", hint=lfs.HINT)
        _check_counts(raw, shown)
        text = raw.decode()
        del raw  # not two copies of a long text while it is parsed
        value = json.loads(text, object_pairs_hook=once if unique else None)
    except RecursionError:
        raise CheckpointError(f"{shown} is nested too deeply") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {shown}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{shown} is not valid JSON: {printable(str(error))}") from None
    finally:
        os.close(fd)
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown} must hold a JSON object")
    return value


def _check_counts(raw: bytes, shown: str) -> None:
    """Nothing is built from a JSON text that could become many times its size."""
    told = "above streamconv's own limit of"
    containers, values = raw.count(b"{") + raw.count(b"["), raw.count(b",")
    if containers > MAX_CONTAINERS:
        raise CheckpointError(f"{shown} holds {containers} objects and lists, {told} {MAX_CONTAINERS}")
    if values > MAX_TENSORS + MAX_CONTAINERS:
        raise CheckpointError(f"{shown} holds {values} values, {told} {MAX_TENSORS} tensors")
    if len(raw) > MAX_WIDE_JSON and not raw.isascii():
        raise CheckpointError(f"{shown} has {len(raw)} bytes, {told} {MAX_WIDE_JSON} for a file that is not plain ASCII")
