"""A source that streamconv wrote is held against its own streamconv.json before anything is made of it.

Tiles read a source in pieces and out of order, and the hashes of tensors run front to back: so each tensor is read once more, in order.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.limits import MAX_CONFIG
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.untrusted import read_file
from streamconv.errors import CheckpointError, TensorError, VerifyError, printable
from streamconv.planning.plan import Plan
from streamconv.run import manifest
from streamconv.run.order import hash_of

_HINT = "`streamconv verify` says what is wrong with it; if it was changed on purpose, remove streamconv.json or use --no-source-check"
_CONFIG = "config.json"

Wanted = Callable[[int, int, int], bool]
"""(number of a source file, where a tensor begins, where it ends) -> whether it is to be looked at."""


@dataclass(frozen=True, slots=True)
class Record:
    """What lies beside a source.

    Attributes:
        nbytes: of the source's files, which are read once more.
        problem: why it cannot be read.
        edited: config.json is not the one that was written.
    """

    path: Path
    nbytes: int
    problem: str = ""
    edited: bool = False

    def warnings(self) -> tuple[str, ...]:
        """What a plan says of it."""
        if self.problem:
            return (f"{self.problem}: nothing of the source can be held against it, and only --no-source-check converts it",)
        edited = f"{_CONFIG} is not the one that {printable(self.path)} tells of; it is taken as it is"
        return (edited,) if self.edited else ()


def record_of(index: Index) -> Record | None:
    """The streamconv.json beside a source; None if there is none."""
    path = index.shards[0].path.parent / manifest.NAME if index.shards else None
    if path is None or not os.path.lexists(path):
        return None
    nbytes = sum(shard.size for shard in index.shards)
    try:
        head = manifest.read_head(path)
        config = read_file(path.parent / _CONFIG, MAX_CONFIG)
    except (VerifyError, CheckpointError) as error:
        return Record(path, nbytes, problem=error.message)
    return Record(path, nbytes, edited=xxhash.xxh3_128(config).hexdigest() != head.config)


def check(index: Index, progress: Callable[[int], object] = lambda nbytes: None, wanted: Wanted = lambda *_: True) -> None:
    """Hash the source's tensors, and compare them with what lies beside it. Files of the Hub are hashed when they have been downloaded.

    Args:
        progress: told of bytes that were hashed.

    Raises:
        CheckpointError: a tensor or a header holds other bytes, or streamconv.json is not as it was written.
    """
    record = record_of(index)
    if record is None:
        return
    if record.problem:
        raise CheckpointError(record.problem, hint=_HINT)
    for number, shard in enumerate(index.shards):
        shard.prove(partial(_check_file, record.path, index.name_of(shard), progress, partial(wanted, number)))


def _check_file(path: Path, name: str, progress: Callable[[int], object], within: Callable[[int, int], bool], shard: Shard) -> None:
    hashes, file = manifest.recorded(path, name), printable(shard.path)
    first = next(hashes, None)
    if first is None:
        raise CheckpointError(f"{file}: {manifest.NAME} beside it tells of no such file", hint=_HINT)
    header = shard.header()
    with shard.window(0, header.data_start) as data:
        if xxhash.xxh3_128(data).hexdigest() != first[1]:
            raise CheckpointError(f"{file}: its header holds other bytes than {manifest.NAME} tells", hint=_HINT)
    problems = list[str]()
    for tensor, begin, end in zip(header.names, header.begins[:-1], header.begins[1:], strict=True):
        line = next(hashes, ("", ""))
        if within(begin, end) and line != (tensor, hash_of(shard.read_into, begin, end)):
            problems.append(f"{file}: {printable(tensor)} holds other bytes than {manifest.NAME} tells")
        progress(end - begin)
    if problems:
        raise TensorError(problems, hint=_HINT)


class OfPart:
    """What a part of a plan has to look at: the tensors that it reads, and those that no part reads tile by tile. Each but once."""

    def __init__(self, plan: Plan) -> None:
        self._every, self._done = _begins(plan), set[tuple[int, int]]()

    def wanted(self, part: Plan) -> Wanted:
        mine = _begins(part)

        def wanted(file: int, begin: int, end: int) -> bool:
            new = (file, begin) not in self._done and (_within(mine, file, begin, end) or not _within(self._every, file, begin, end))
            if new:
                self._done.add((file, begin))
            return new

        return wanted


def _begins(plan: Plan) -> dict[int, array[int]]:
    """Source file -> where the pieces of a plan's spans begin, ascending."""
    starts: dict[int, set[int]] = {}
    for span in plan.spans:
        for piece in span.source.pieces:
            starts.setdefault(piece.shard, set()).add(piece.begin)
    return {file: array("Q", sorted(begins)) for file, begins in starts.items()}


def _within(begins: dict[int, array[int]], file: int, begin: int, end: int) -> bool:
    starts = begins.get(file, array("Q"))
    at = bisect_left(starts, begin)
    return at < len(starts) and starts[at] < max(end, begin + 1)
