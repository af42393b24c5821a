"""The journal: which tiles are safely on the disk. It makes a resume exact.

A hidden file beside the output, append-only. Each line is the XXH3-64 of a JSON record, a blank, and the record;
reading stops at the first line that does not match, so a torn tail is as if it had never been written.

    {"run": ...}                      first line: what this work is for (see `identity`)
    {"tile": [span, start, stop],     source rows of a span (row ranges, so budget and workers may change at resume)
     "hash": [[...], ...],            XXH3-128 of the bytes of every part, for every distinct request of the span
     "found": [overflow, nonfinite],
     "errors": [[...], ...]}          with `--verify inline`
    {"ready": [...]}                  everything is on the disk; these files are about to get their names

A tile's line is written after fdatasync of the files that hold its bytes, and believed only if these still have its
hash.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import xxhash

from streamconv import __version__
from streamconv.checkpoint.limits import MAX_JOURNAL, MAX_JOURNAL_LINE
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.untrusted import parse_json
from streamconv.errors import OutputError, printable
from streamconv.planning.plan import Plan
from streamconv.run.fs import Folder, Mark, translate_errors, write_all

FORMAT = 2


@dataclass(frozen=True, slots=True)
class TileRecord:
    """Source rows [start, stop) of a span that are on the disk.

    Attributes:
        hashes: for every request of the span, XXH3-128 (hex) of each part's bytes.
        overflow, nonfinite: what encoding them found.
        errors: for every request what decoding it found, empty for a copy; none at all if nobody looked (`run.inline_check`).
    """

    span: int
    start: int
    stop: int
    hashes: tuple[tuple[str, ...], ...]
    overflow: int = 0
    nonfinite: int = 0
    errors: tuple[tuple[float, ...], ...] = ()

    def fits(self, plan: Plan) -> bool:
        """Whether it can be of this plan: rows of a span that writes, cut where tiles are cut.

        A line that nobody wrote for this plan could make a worker wait for ever, or cut a tile where its layout does not allow it.
        """
        if self.span >= len(plan.spans):
            return False
        span = plan.spans[self.span]
        inside = span.reduce is None and span.start <= self.start < self.stop <= span.stop
        whole = not (self.start - span.start) % span.align and (self.stop == span.stop or not (self.stop - span.start) % span.align)
        return inside and whole


@dataclass(slots=True)
class JournalState:
    """What a journal says; false if there is none with a whole first line.

    Attributes:
        run: its first record.
        tiles: span -> finished row ranges, ascending, disjoint.
        ready: the files that are to be published, if that is the last thing written.
        size: bytes of the file to go on after: what can be trusted, without a last "ready".
    """

    run: dict[str, Any] = field(default_factory=dict)
    tiles: dict[int, list[TileRecord]] = field(default_factory=dict)
    ready: tuple[str, ...] = ()
    size: int = 0
    mark: Mark | None = None

    def __bool__(self) -> bool:
        return self.mark is not None

    def of(self, plan: Plan) -> dict[int, list[TileRecord]]:
        """Span -> the row ranges that can be of this plan."""
        return {span: [done for done in tiles if done.fits(plan)] for span, tiles in self.tiles.items()}

    def add(self, done: TileRecord) -> None:
        """A later line replaces earlier ones that it overlaps."""
        ranges = self.tiles.setdefault(done.span, [])
        at = bisect_left(ranges, done.start, key=lambda other: other.stop - 1)
        end = at
        while end < len(ranges) and ranges[end].start < done.stop:
            end += 1
        ranges[at:end] = [done]


NONE = JournalState()
"""No journal."""


def identity(plan: Plan, shards: Sequence[Shard]) -> dict[str, Any]:
    """What the work is for; a journal of any other identity is not resumed."""
    return {
        "format": FORMAT,
        "streamconv": __version__,
        "fingerprint": plan.fingerprint(),
        "options": {"target": plan.target.key, **plan.target.to_json()},
        "files": sorted(plan.names),
        "sources": [
            [source.name, source.size, source.header_hash, *(shard.evidence() if shard is not None else ())]
            for source, shard in zip_longest(plan.sources, (*shards, *plan.beside))
        ],
    }


_FACTS = ("name", "size", "header", "modification time", "change time", "inode", "content")
"""What an entry of "sources" holds."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two identities, for people; empty if nothing that matters did."""
    if old == new:
        return []
    lines = []
    for key in ("streamconv", "format"):
        if old.get(key) != new[key]:
            name = "the version of streamconv" if key == "streamconv" else "the format of the journal"
            lines.append(f"{name} was {printable(old.get(key))}, is {new[key]}")
    if lines:
        return lines
    before, now = old["options"], new["options"]
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            lines.append(f"{printable(name)} was {printable(before.get(name))}, is {now.get(name)}")
    was, are = ({entry[0]: entry for entry in run["sources"]} for run in (old, new))
    for name in sorted({*was, *are}):
        pairs = zip(_FACTS, was.get(name, ()), are.get(name, ()), strict=False)
        if was.get(name) != are.get(name):
            changed = ", ".join(fact for fact, one, other in pairs if one != other)
            lines.append(f"source file {printable(name)} {f'has another {changed}' if changed else 'was added or removed'}")
    return lines or ["the plan of the output (config.json of the source?)"]


def _read(fd: int, path: Path) -> JournalState:
    past, at = JournalState(), 0
    with os.fdopen(fd, "rb", closefd=False) as file:
        if file.peek(16)[:16].strip(b"0123456789abcdef\0"):
            raise OutputError(f"{printable(path)} holds something else than a journal", hint="move it away; it was not touched")
        while at < MAX_JOURNAL and (line := file.readline(MAX_JOURNAL_LINE)).endswith(b"\n"):
            record = _record(line[:-1])
            if record is None or bool(past) == ("run" in record):
                break
            at += len(line)
            if not past:
                past = JournalState(record["run"], mark=Mark.of(os.fstat(fd)))
            elif "tile" in record:
                past.add(_done(record))
            past.ready = tuple(record.get("ready", ()))
            if not past.ready:
                past.size = at
    return past


def _record(text: bytes) -> dict[str, Any] | None:
    """What a line says, None if it is torn or no line of a journal."""
    record = unsealed(text)
    if record is None or len(record.keys() & {"run", "tile", "ready"}) != 1:
        return None
    if "run" in record:
        sound = _is_run(record["run"])
    else:
        sound = _all(str, record["ready"]) if "ready" in record else _is_tile(record)
    return record if sound else None


def unsealed(text: bytes) -> dict[str, Any] | None:
    """What `sealed` gave, without its line end; None if it is torn."""
    if text[:17] != xxhash.xxh3_64(text[17:]).hexdigest().encode() + b" ":
        return None
    try:
        record = parse_json(text[17:], "the journal", OutputError)
    except OutputError:
        return None
    return record if isinstance(record, dict) else None


def _is_run(run: object) -> bool:
    """What `differences` takes; of another format, or another version's, it looks at nothing more."""
    if not isinstance(run, dict):
        return False
    if run.get("format") != FORMAT or run.get("streamconv") != __version__:
        return True
    options, sources = run.get("options"), run.get("sources")
    valid = isinstance(sources, list) and all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in sources)
    return valid and isinstance(options, dict)


def _all(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_tile(record: dict[str, Any]) -> bool:
    values: list[Any] = [*(record.get(key) for key in ("tile", "found", "hash")), record.get("errors", [])]
    tile, counts, hashes, errors = values
    if not (_all(int, tile) and _all(int, counts) and _all(list, hashes) and _all(list, errors)):
        return False
    right = len(tile) == 3 and len(counts) == 2 and all(0 <= number < 1 << 62 for number in (*tile, *counts)) and tile[1] < tile[2]
    return right and all(_all(str, parts) for parts in hashes) and all(_all(float, kept) for kept in errors)


def _done(record: dict[str, Any]) -> TileRecord:
    (span, start, stop), (overflow, nonfinite) = record["tile"], record["found"]
    errors = tuple(tuple(kept) for kept in record.get("errors", []))
    return TileRecord(span, start, stop, tuple(tuple(parts) for parts in record["hash"]), overflow, nonfinite, errors)


class Journal:
    """A journal in a folder; whoever writes it holds the lock of the output, or of its part of it."""

    def __init__(self, base: Folder, name: str) -> None:
        self.base, self.name, self.disk, self.path = base, name, base.disk, base.path / name
        self._fd, self._size = -1, 0

    def read(self) -> JournalState:
        """What it says.

        Reading ends at the first line that is torn, or is none of ours. What it tells of tiles is held against the plan later.

        Raises:
            OutputError: it cannot be read, or something else has its name.
        """
        with translate_errors(self.path, "read"):
            try:
                fd = self.base.open(self.name, make=False)
            except FileNotFoundError:
                return JournalState()
            try:
                return _read(fd, self.path)
            finally:
                self.disk.close(fd)

    def start(self, run: dict[str, Any]) -> None:
        """Begin an empty journal."""
        with translate_errors(self.path, "write"):
            self._fd, self._size = self.base.open(self.name, private=True), 0
            if os.fstat(self._fd).st_size:
                self.disk.truncate(self._fd, 0)
            self._append(sealed({"run": run}))
            self.base.sync()

    def resume(self, past: JournalState) -> None:
        """Go on after the last line that can be trusted."""
        with translate_errors(self.path, "write"):
            self._fd, self._size = self.base.open(self.name, make=False), past.size
            if os.fstat(self._fd).st_size != past.size:
                self.disk.truncate(self._fd, past.size)
                self.disk.sync_data(self._fd)

    def add(self, tiles: Sequence[TileRecord]) -> None:
        """These tiles are on the disk."""
        lines = []
        for done in tiles:
            counts = [done.overflow, done.nonfinite]
            looked = {"errors": done.errors} if done.errors else {}
            lines.append(sealed({"tile": [done.span, done.start, done.stop], "hash": done.hashes, "found": counts} | looked))
        with translate_errors(self.path, "write"):
            self._append(b"".join(lines))

    def ready(self, names: Sequence[str]) -> None:
        """All is on the disk, and these files are to be published; the last one makes the folder a checkpoint.

        Raises:
            OutputError: the journal is not under its name any more, so a run that is killed now could not be finished.
        """
        with translate_errors(self.path, "write"):
            self.base.expect(self.name, Mark.of(os.fstat(self._fd)))
            self._append(sealed({"ready": names}))

    def remove(self, past: JournalState = NONE) -> None:
        """The work is published or given up. `past`: the journal of an earlier run, if this run has none."""
        mark = Mark.of(os.fstat(self._fd)) if self._fd >= 0 else past.mark
        self.close()
        with translate_errors(self.path, "remove"):
            there = self.base.look(self.name)
            if there is not None and Mark.of(there) == mark:  # else somebody has put something else there
                self.disk.unlink(self.base, self.name, mark)
                self.base.sync()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self.disk.close(fd)

    def _append(self, data: bytes) -> None:
        write_all(self.disk, self._fd, data, self._size)
        self.disk.sync_data(self._fd)
        self._size += len(data)


def sealed(record: dict[str, Any]) -> bytes:
    """A record with its hash before it."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return xxhash.xxh3_64(text).hexdigest().encode() + b" " + text + b"\n"
