"""streamconv.json: what was asked, from what, and the hash of everything written, itself too. No times, no host names.

It has a line for every tensor of every rank, so it is written in pieces and never held whole, and whoever needs only what was asked
(`read_head`) builds nothing from these lines.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from streamconv import __version__
from streamconv.checkpoint.limits import MAX_CONTAINERS, MAX_MANIFEST, MAX_OUTPUT_TENSORS, check_counts
from streamconv.checkpoint.rows import SourceFile
from streamconv.checkpoint.untrusted import parse_json, read_file, shown_value
from streamconv.errors import VerifyError, printable
from streamconv.planning.plan import Plan

NAME = "streamconv.json"
FORMAT = 2
_READ = (1, 2)
_BREAK = re.compile(rb"(,?)\n *")
_LINE = re.compile(rb'\n   "header": "([0-9a-f]{32})"|\n    ("(?:[^"\\]|\\.)*"): "([0-9a-f]{32})"|\n  \}|"tensors": \{\}')
"""The header of a file, a tensor, or its end."""
_FILES = b'\n "files": {'
_CHECK = re.compile(rb',\n "check": "([0-9a-f]{32})"\n}\n\Z')
_PIECE = 1 << 20

_File = tuple[str, int, str, Iterable[tuple[str, str]]]
"""Name, size, hash of the header, and (tensor, hash) in the order of the data."""


def build(
    plan: Plan,
    hashes: Sequence[Iterable[str]],
    no_lock: bool = False,
    side: Iterable[tuple[str, int, str]] = (),
    snr: Mapping[str, Mapping[str, float | str]] | None = None,
) -> Iterator[bytes]:
    """The manifest's bytes, in pieces; the same for the same output.

    Args:
        side: name, bytes and XXH3-128 (hex) of every other file but config.json; asked for when the first piece is.
        hashes: for each file of the plan, XXH3-128 (hex) of its tensors in the order of the data.
        no_lock: the run was allowed to go on without a lock, and without syncing folders.
        snr: what `--verify inline` measured, file -> tensor -> dB.
    """
    head: dict[str, Any] = {
        "format": FORMAT,
        "streamconv": __version__,
        "target": plan.target.key,
        "family": plan.family,
        "dtype": plan.dtype.torch,
        "fingerprint": plan.fingerprint(),
        "options": plan.target.to_json(),
        "source": [{"file": source.name, "size": source.size, "header_sha256": source.header_hash} for source in plan.sources],
        "hash": "xxh3_128",
        "config": xxhash.xxh3_128(plan.config).hexdigest(),
        "side": {name: [size, digest] for name, size, digest in side},
    }
    if plan.source_config is not None:
        head["source_config"] = plan.source_config
    if plan.losses is not None:
        head["losses"] = plan.losses.to_json()
    if snr is not None:
        head["snr"] = {file: dict(sorted(values.items())) for file, values in sorted(snr.items())}
    if no_lock:
        head["no_lock"] = True
    pairs = zip(plan.files, hashes, strict=True)
    listed = ((f.name, f.size, xxhash.xxh3_128(f.header).hexdigest(), zip(f.names(), digests, strict=True)) for f, digests in pairs)
    yield from _render(head, listed)


def _render(head: Mapping[str, Any], files: Iterable[_File]) -> Iterator[bytes]:
    """JSON with an indent of one, whose last entry is the hash of the rest on one line."""
    check = xxhash.xxh3_128()
    piece = bytearray(json.dumps(head, indent=1)[:-2].encode())  # without "\n}"
    for lines in _file_lines(files):
        piece += lines
        if len(piece) >= _PIECE:
            check.update(_on_one_line(piece))
            yield bytes(piece)
            piece.clear()
    check.update(_on_one_line(piece + b"\n}"))
    yield bytes(piece) + f',\n "check": "{check.hexdigest()}"\n}}\n'.encode()


def _file_lines(files: Iterable[_File]) -> Iterator[bytes]:
    """The entry "files": pieces that begin before a line break."""
    yield b","
    yield _FILES
    comma = ""
    for name, size, header, tensors in files:
        entry = f'{comma}\n  {json.dumps(name)}: {{\n   "size": {json.dumps(size)},\n   "header": {json.dumps(header)},\n   "tensors": {{'
        yield entry.encode()
        first = True
        for tensor, digest in tensors:
            yield f"{'' if first else ','}\n    {json.dumps(tensor)}: {json.dumps(digest)}".encode()
            first = False
        yield b"}\n  }" if first else b"\n   }\n  }"
        comma = ","
    yield b"\n }" if comma else b"}"


def _on_one_line(piece: bytes | bytearray) -> bytes:
    """Strings hold no line break, so each one is the layout's."""
    return _BREAK.sub(lambda match: b", " if match[1] else b"", piece)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest read back.

    Attributes:
        sizes: file -> bytes.
        hashes: file -> tensor -> XXH3-128 hex; empty if only the head was read.
        headers: file -> XXH3-128 hex of everything before its first tensor.
        target: key of the target; `asked` are its options, as they were written.
        config: XXH3-128 hex of config.json.
        side: other files -> bytes and XXH3-128 hex.
        check: XXH3-128 hex of all of it.
        source_config: config.json of the Hugging Face model that it was made from, None if it is not told.
    """

    target: str
    asked: dict[str, Any]
    fingerprint: str
    sources: tuple[SourceFile, ...]
    config: str
    side: dict[str, tuple[int, str]]
    check: str
    source_config: dict[str, Any] | None
    sizes: dict[str, int] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)


def load(folder: Path) -> Manifest | None:
    """The manifest of an output folder, None if it has none (another tool wrote it).

    Raises:
        VerifyError: it is not a manifest this version reads.
    """
    path = folder / NAME
    return read(path) if os.path.lexists(path) else None


def names(path: Path) -> frozenset[str]:
    """Files that a manifest tells of; none if there is no manifest, or it is not as it was written."""
    if not os.path.lexists(path):
        return frozenset()
    try:
        manifest = read(path)
    except VerifyError:
        return frozenset()
    return frozenset({*manifest.sizes, *manifest.side})


def is_of(folder: Path, fingerprint: object) -> bool:
    """A folder has a manifest, and it is that of this plan."""
    try:
        return os.path.lexists(folder / NAME) and read_head(folder / NAME).fingerprint == fingerprint
    except VerifyError:
        return False


def read(path: Path) -> Manifest:
    """Read a manifest. Raises VerifyError: it is not a manifest this version reads."""
    shown = printable(path)
    data = read_file(path, MAX_MANIFEST, VerifyError)
    check_counts(data, shown, VerifyError, MAX_OUTPUT_TENSORS + MAX_CONTAINERS)
    content = parse_json(data, shown, VerifyError)
    head = _head(content, shown)
    sizes, headers, hashes = head.sizes, head.headers, head.hashes
    files = _Checked(content, shown).get("files", dict)
    for name, value in files.items():
        file = _Checked(value, shown)
        sizes[name], headers[name], hashes[name] = file.get("size", int), file.get("header", str), file.get("tensors", dict)
        if not all(isinstance(digest, str) for digest in hashes[name].values()):
            raise _odd(shown, f"a hash of {printable(name)} is no text")
    plain = {key: value for key, value in content.items() if key not in ("files", "check")}
    at = 0
    for piece in _render(plain, ((name, sizes[name], headers[name], hashes[name].items()) for name in files)):
        if data[at : at + len(piece)] != piece:
            raise _changed(shown)
        at += len(piece)
    if at != len(data):
        raise _changed(shown)
    return head


def read_head(path: Path) -> Manifest:
    """A manifest without what it says of each file. Raises VerifyError: it is not a manifest this version reads."""
    shown = printable(path)
    data = read_file(path, MAX_MANIFEST, VerifyError)
    end, tail = data.find(_FILES), _CHECK.search(data, max(0, len(data) - 64))
    if end < 0 or tail is None:  # not ours, or of another version: let JSON reading say what is wrong
        check_counts(data, shown, VerifyError)
        _head(parse_json(data, shown, VerifyError), shown)
        raise _changed(shown)
    head = bytes(data[: end - 1]) + b"\n}"
    check_counts(head, shown, VerifyError)
    parsed = _head(parse_json(head, shown, VerifyError) | {"check": tail[1].decode()}, shown)
    check, at = xxhash.xxh3_128(), 0
    while at < tail.start():
        stop = data.find(b"\n", min(at + _PIECE, tail.start()), tail.start())
        stop = tail.start() if stop < 0 else stop
        # a comma belongs to the break after it
        stop -= stop < tail.start() and data[stop - 1 : stop] == b","
        check.update(_on_one_line(data[at:stop]))
        at = stop
    check.update(b"}")
    if check.hexdigest() != tail[1].decode():
        raise _changed(shown)
    return parsed


def recorded(path: Path, file: str) -> Iterator[tuple[str, str]]:
    """What a manifest that `read_head` has read tells of one file: nothing if it does not know it.

    Returns:
        ("", XXH3-128 hex of its header), then (tensor, XXH3-128 hex) in the order of the data.
    """
    data = read_file(path, MAX_MANIFEST, VerifyError)
    at = data.find(f"\n  {json.dumps(file)}: {{\n".encode(), max(0, data.find(_FILES)))
    for line in _LINE.finditer(data, at + 1) if at >= 0 else ():
        if line[1]:
            yield "", line[1].decode()
        elif line[2]:
            yield json.loads(line[2]), line[3].decode()
        else:
            return


def _odd(shown: str, why: str) -> VerifyError:
    return VerifyError(f"{shown} is not a streamconv manifest: {why}")


def _changed(shown: str) -> VerifyError:
    return VerifyError(f"{shown}: hash mismatch: the file was changed")


class _Checked:
    """An object of a manifest whose entries are taken with their types."""

    def __init__(self, value: object, shown: str) -> None:
        self.shown = shown
        if not isinstance(value, dict):
            raise _odd(shown, f"{shown_value(value)} is no object")
        self.value = value

    def get(self, key: str, kind: type[Any]) -> Any:
        value = self.value.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _odd(self.shown, f"{key} is {shown_value(value)}")
        return value


def _head(content: object, shown: str) -> Manifest:
    top = _Checked(content, shown)
    form = top.get("format", int)
    if form not in _READ:
        raise VerifyError(f"{shown}: format {shown_value(form)} is not {FORMAT}")
    target = "trtllm" if form == 1 else top.get("target", str)  # format 1 is older than the second target
    side = {}
    for name, entry in top.get("side", dict).items() if form > 1 else ():
        if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not int or not isinstance(entry[1], str):
            raise _odd(shown, f"side file {printable(name)} is {shown_value(entry)}")
        side[name] = entry[0], entry[1]
    listed = [_Checked(source, shown) for source in top.get("source", list)]
    sources = tuple(SourceFile(s.get("file", str), s.get("size", int), s.get("header_sha256", str)) for s in listed)
    texts = [top.get(key, str) for key in ("fingerprint", "config", "check")]
    config = top.get("source_config", dict) if "source_config" in top.value else None
    return Manifest(target, top.get("options", dict), texts[0], sources, texts[1], side, texts[2], config)
