"""One mutated file through our readers and the stock ones: what they reject we reject, what we accept they read the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from safetensors import SafetensorError, deserialize, safe_open

from streamconv.checkpoint.header import parse_header, read_header
from streamconv.checkpoint.header_parse import Header
from streamconv.checkpoint.weight_files import read_weight_map
from streamconv.errors import CheckpointError, HeaderError
from tests.fuzz import mutate

FILES = ("m-1.safetensors", "m-2.safetensors")
EQUAL, BOTH_REJECT = "accepted by both, equal", "rejected by both"
ONLY_STOCK = "accepted only by stock: "

_REASONS = {
    r"has dtype .*, not supported": "a dtype that we do not support",
    r"duplicate tensor": "a tensor twice",
    r"duplicate key|has a key twice": "a key twice",
    r"twice": "a key twice",
    r"unknown key": "an unknown key in a tensor",
    r"start with": "no '{' at the start",
    r"plain file name|which is not a \.safetensors": "not a plain file name of the right kind",
    r"missing file": "a file that is not there",
    r"weight_map": "no map of names to names",
    r"must hold a JSON object": "no object",
    r"hole|overlaps|reaches past|after the last tensor": "data that the tensors do not fill exactly",
    r"not well formed|non-negative": "numbers or fields in a spelling that no writer uses",
    r"must be an object": "metadata is null",
    r"impossible shape": "a shape of more than 2^63 elements",
    r"streamconv's own limit|at most": "streamconv's own limit",
}


def _reason(error: CheckpointError, text: bytes) -> str:
    for pattern, reason in _REASONS.items():
        if re.search(pattern, error.message):
            return reason
    if _has_twice(text):  # the first of the two is wrong, and stock keeps the last
        return "a key twice"
    return "other: " + error.message[:120]


def _has_twice(text: bytes) -> bool:
    twice: list[bool] = []
    try:
        json.loads(text.decode(), object_pairs_hook=lambda pairs: twice.append(len(dict(pairs)) < len(pairs)) or dict(pairs))
    except ValueError:
        return False
    return any(twice)


def stock(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Name -> dtype, shape, bytes as the stock reader says; None if it rejects the file."""
    try:
        return {name: (held["dtype"], tuple(held["shape"]), bytes(held["data"])) for name, held in deserialize(file)}
    except SafetensorError:
        return None


def judge_file(file: bytes) -> str:
    """Compare on one safetensors file.

    Returns:
        EQUAL, BOTH_REJECT, or ONLY_STOCK with our reason.

    Raises:
        AssertionError: we accept what stock rejects, or read it otherwise. Any other exception is a fault as well.
    """
    theirs = stock(file)
    try:
        header = parse_header(file, len(file), "x.safetensors")
    except HeaderError as error:
        _check_message(error)
        return BOTH_REJECT if theirs is None else ONLY_STOCK + _reason(error, file[8 : 8 + int.from_bytes(file[:8], "little")])
    assert theirs is not None, "accepted, but stock rejects it"
    ours = {name: (held.dtype.name, held.shape, file[held.begin : held.end]) for name, held in header.tensors.items()}
    assert ours == theirs
    return EQUAL


def _check_message(error: CheckpointError) -> None:
    assert error.message.isprintable() and len(error.message) < 1000


def judge_on_disk(file: bytes, path: Path) -> None:
    """The same through the file system: read_header against safe_open, with the metadata; for a file that both accept."""
    path.write_bytes(file)
    header: Header = read_header(path)
    with safe_open(path, "np") as opened:
        assert sorted(opened.keys()) == sorted(header.tensors)
        assert (opened.metadata() or {}) == header.metadata
        for name, held in header.tensors.items():
            assert tuple(opened.get_slice(name).get_shape()) == held.shape


def judge_index(text: bytes, path: Path) -> str:
    """Compare on one index file, with what json.loads says of it."""
    try:
        theirs: Any = json.loads(text.decode())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        theirs = None
    path.write_bytes(text)
    try:
        ours = read_weight_map(path, FILES)
    except CheckpointError as error:
        _check_message(error)
        return BOTH_REJECT if theirs is None else ONLY_STOCK + _reason(error, text)
    assert ours == theirs and set(ours.values()) <= set(FILES)
    return EQUAL


def run(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """`count` cases, every fifth an index file. The same seed gives the same cases.

    Returns:
        verdicts with their numbers, and what went wrong, with the bytes of the case.
    """
    random, verdicts, wrong = Random(seed), Counter[str](), []
    for number in range(count):
        kind = "index" if number % 5 == 4 else "file"
        case = mutate.mutated_index(random, FILES) if kind == "index" else mutate.mutated_file(random)
        try:
            if kind == "index":
                verdict = judge_index(case, folder / "model.safetensors.index.json")
            else:
                verdict = judge_file(case)
                if verdict == EQUAL and number % 50 == 0:
                    judge_on_disk(case, folder / "x.safetensors")
        except Exception as error:  # any other exception is what is looked for
            wrong.append(f"{type(error).__name__}: {str(error)[:300]} in {case!r}")
        else:
            verdicts[f"{kind}: {verdict}"] += 1
    return verdicts, wrong
