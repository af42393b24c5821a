"""The JSON of a safetensors header, walked with one bounded regular expression per tensor.

No JSON tree is built, so a hostile header is refused at its first wrong byte, in little memory (limits.py), and what JSON allows
but no writer writes (duplicate keys, "-0", lone surrogates, nesting) has no way in.
"""

from __future__ import annotations

import json
import re
from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple, NoReturn

from streamconv.checkpoint.dtypes import DTYPES, DType
from streamconv.checkpoint.header_build import METADATA
from streamconv.checkpoint.limits import MAX_ESCAPED, MAX_METADATA, MAX_METADATA_KEYS, MAX_NAME, MAX_SHAPES, MAX_TENSORS
from streamconv.errors import HeaderError, printable

_LIMIT = 1 << 63
SPLIT = "split the file into several shards"
_WS = rb"[ \t\n\r]{0,256}"  # bounded, so that a hostile run of blanks fails at once
_INT = rb"(?:0|[1-9][0-9]{0,19})"
# Each run of blanks is followed by something that is no blank, so a failing match does not go back and forth.
_ENTRY = re.compile(
    (
        rb"\{(?:WS(?:"
        rb'"dtype"WS:WS"([^"\\\x00-\x1f]{0,64})"'
        rb'|"shape"WS:WS\[WS((?:INTWS(?:,WSINTWS){0,63})?)\]'
        rb'|"data_offsets"WS:WS\[WS(INT)WS,WS(INT)WS\]'
        rb")WS(?:,(?!WS\})|(?=\}))){3}\}"
    )
    .replace(b"WS", _WS)
    .replace(b"INT", _INT)
)
_NAME = re.compile(rb'WS"([^"\\\x00-\x1f]*)"WS:WS'.replace(b"WS", _WS))
_SEPARATOR = re.compile(rb"WS([,}])".replace(b"WS", _WS))
_BLANK = re.compile(rb"[ \t\n\r]*")
_LISTED = re.compile(
    rb', ?"([^"\\\x00-\x1f]*)": ?\{("dtype": ?"[^"\\\x00-\x1f]*", ?"shape": ?\[[0-9, ]*\]), ?"data_offsets": ?\[(INT), ?(INT)\]\}'.replace(
        b"INT", _INT
    )
)
"""An entry after another one, as every writer spells it: nothing in it is looked at twice, wherever a search for it begins."""
_CHUNK = 1 << 20
_STRING_PART = re.compile(rb'[^"\\\x00-\x1f]*(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*){0,1000}')


class TensorEntry(NamedTuple):
    """One tensor of a file; begin and end are offsets in the file, not in its data section."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


Form = tuple[DType, tuple[int, ...]]
"""What tensors of one dtype and shape share."""


@dataclass(frozen=True)
class Header:
    """What a header says, a column for each fact: a checkpoint has a quarter of a million tensors and some dozens of forms.

    Attributes:
        names: in the order of the data.
        forms: the dtypes and shapes that there are; `form`: which of them each tensor has.
        begins: offset in the file where each begins, and at last where the file ends.
        metadata: the `__metadata__` strings; empty when there are none.
        data_start: offset of the first data byte.
    """

    names: list[str]
    forms: list[Form]
    form: list[int]
    begins: array[int]
    metadata: dict[str, str]
    data_start: int

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """By name, in the order of their data."""
        columns = zip(self.names, self.form, self.begins[:-1], self.begins[1:], strict=True)
        return {name: TensorEntry(name, *self.forms[form], begin, end) for name, form, begin, end in columns}


Columns = tuple[list[str], list[Form], list[int], "array[int]"]
"""As in `Header`."""


class HeaderParser:
    """Args: the whole header with its length, the size of the file, and what messages call it."""

    def __init__(self, text: bytes | bytearray, file_size: int, where: str) -> None:
        self.text, self.file_size, self.where = text, file_size, where
        self.shapes: dict[bytes, tuple[tuple[int, ...], int]] = {}  # few distinct shapes: share and check once
        self.escaped = 0
        # Inside a string these quotes would be escaped, so this counts tensors (or a few strings that say just that).
        self.within(text.count(b'"data_offsets"'), MAX_TENSORS + MAX_METADATA_KEYS, "tensors")

    def within(self, count: int, limit: int, what: str) -> None:
        if count > limit:
            self.fail(f"the header has {count} {what}, above streamconv's own limit of {limit}", hint=SPLIT)

    def run(self) -> Header:
        text, base = self.text, len(self.text)
        tensors: dict[str, TensorEntry] = {}
        metadata: dict[str, str] | None = None
        columns: Columns | None = None
        pos = self.blank(9)
        more = text[pos : pos + 1] != b"}"
        if not more:
            pos += 1
        while more:
            plain = _NAME.match(text, pos)
            if plain and len(plain[1]) <= MAX_NAME and plain[1].isascii():
                name, pos = plain[1].decode(), plain.end()
            else:
                start = self.blank(pos)
                name, pos = self.string(start, MAX_NAME)
                if text.find(b"\\", start, pos) >= 0:
                    self.escaped += 1
                    self.within(self.escaped, MAX_ESCAPED, "names with escapes")
                pos = self.blank(self.expect(b":", self.blank(pos)))
            if name == METADATA:
                if metadata is not None:
                    self.fail("duplicate key __metadata__", pos)
                metadata, pos = self.metadata(pos)
                more, pos = self.separator(pos)
                continue
            entry = _ENTRY.match(text, pos)
            if entry is None:
                self.explain(name, pos)
            if name in tensors:
                self.fail(f"duplicate tensor {printable(name)}")
            tensors[name] = self.entry(name, *entry.groups())
            more, pos = self.separator(entry.end())
            if more and len(tensors) == 1 and (rest := self.listed(tensors[name], pos - 1)):
                columns, pos, more = *rest, False
        self.within(len(tensors), MAX_TENSORS, "tensors")
        if self.blank(pos) != base:
            self.fail("characters after the header's closing '}'", pos)
        return Header(*(columns or self.tiled(tensors)), metadata or {}, base)

    def listed(self, first: TensorEntry, pos: int) -> tuple[Columns, int] | None:
        """The columns, and where the header's object ends, if it is spelled as writers do, in the order of the data.

        What is wrong, or only unusual, gives None: walking from entry to entry tells what it is.

        Args:
            pos: of the comma after the first entry.
        """
        base, names, form, numbers = len(self.text), [first.name], [0], dict[bytes, int]()
        forms, sizes, stops, rest = [(first.dtype, first.shape)], [first.end - first.begin], [first.end - len(self.text)], b""
        while pos < base:
            stop = self.text.find(b"},", pos + _CHUNK) + 1 or base
            pieces = _LISTED.split(self.text[pos:stop])
            raw, spellings, rest = pieces[1::5], pieces[2::5], pieces[-1]
            if any(pieces[:-1:5]) or (rest and stop < base) or max(map(len, raw), default=0) > MAX_NAME:
                return None
            try:
                names += b"\n".join(raw).decode().split("\n")
                for text in dict.fromkeys(spellings):
                    if text not in numbers:
                        spelled = _ENTRY.fullmatch(b'{%b,"data_offsets":[0,0]}' % text)
                        own, size = self.form("", spelled[1], spelled[2]) if spelled else self.fail("")
                        numbers[text] = len(forms)
                        forms.append(own)
                        sizes.append(size)
            except (UnicodeDecodeError, HeaderError):
                return None
            numbered = [*map(numbers.__getitem__, spellings)]
            ends = [*accumulate(map(sizes.__getitem__, numbered), initial=stops[-1])]
            if [*map(int, pieces[3::5])] != ends[:-1] or [*map(int, pieces[4::5])] != ends[1:]:
                return None
            form += numbered
            stops += ends[1:]
            pos = stop
        if first.begin != base or stops[-1] != self.file_size - base or not rest.startswith(b"}"):
            return None
        if len(names) > MAX_TENSORS or len({*names}) < len(names) or METADATA in names:
            return None
        return (names, forms, form, array("Q", [base, *(base + stop for stop in stops)])), base - len(rest) + 1

    def entry(self, name: str, dtype: bytes | None, shape: bytes | None, begin: bytes | None, end: bytes | None) -> TensorEntry:
        if dtype is None or shape is None or begin is None or end is None:
            self.fail(f"tensor {printable(name)} has a key twice")  # three fields, yet one of the three is missing
        (kind, dims), size = self.form(name, dtype, shape)
        first, last = int(begin), int(end)
        if last - first != size:
            self.fail(
                f"tensor {printable(name)} of shape {list(dims)} and dtype {kind} needs {size}"
                f" bytes, but its data_offsets are [{first}, {last}]"
            )
        base = len(self.text)
        return TensorEntry(name, kind, dims, base + first, base + last)

    def form(self, name: str, dtype: bytes, shape: bytes) -> tuple[Form, int]:
        """Dtype and shape as the header spells them, and the bytes of such a tensor."""
        kind = DTYPES.get(dtype.decode("latin-1"))
        if kind is None:
            self.fail(f"tensor {printable(name)} has dtype {printable(dtype.decode(errors='replace'))}, not supported")
        known = self.shapes.get(shape)
        if known is None:
            dims = tuple(map(int, shape.split(b","))) if shape else ()
            count = 1
            for dim in dims:
                count *= dim
                if dim >= _LIMIT or count >= _LIMIT:
                    self.fail(f"tensor {printable(name)} has an impossible shape")
            self.within(len(self.shapes) + 1, MAX_SHAPES, "different shapes")
            known = self.shapes[shape] = dims, count
        return (kind, known[0]), known[1] * kind.itemsize

    def tiled(self, tensors: dict[str, TensorEntry]) -> Columns:
        """The columns, in the order of the data, which the tensors must fill without hole or overlap."""
        at = len(self.text)
        ordered = list(tensors.values())
        ordered.sort(key=attrgetter("end"))  # two stable passes: by begin, then by end, without a tuple for each
        ordered.sort(key=attrgetter("begin"))
        for entry in ordered:
            if entry.begin != at:
                what = "overlaps the one before" if entry.begin < at else f"leaves a hole of {entry.begin - at} bytes"
                self.fail(f"tensor {printable(entry.name)} {what}")
            at = entry.end
            if at > self.file_size:
                self.fail(f"tensor {printable(entry.name)} reaches past the end of the file (truncated download?)")
        if at != self.file_size:
            self.fail(f"{self.file_size - at} bytes after the last tensor")
        tensors.clear()
        numbers = {form: at for at, form in enumerate(dict.fromkeys((entry.dtype, entry.shape) for entry in ordered))}
        form = [numbers[entry.dtype, entry.shape] for entry in ordered]
        return [entry.name for entry in ordered], [*numbers], form, array("Q", [*(entry.begin for entry in ordered), at])

    def metadata(self, pos: int) -> tuple[dict[str, str], int]:
        values: dict[str, str] = {}
        start = pos
        pos = self.blank(self.expect(b"{", pos, "__metadata__ must be an object"))
        if self.text[pos : pos + 1] == b"}":
            return values, pos + 1
        while True:
            key, pos = self.string(self.blank(pos), MAX_METADATA)
            pos = self.blank(self.expect(b":", self.blank(pos)))
            value, pos = self.string(pos, MAX_METADATA, "__metadata__ must hold strings only")
            if key in values:
                self.fail(f"duplicate key {printable(key)} in __metadata__")
            values[key] = value
            self.within(len(values), MAX_METADATA_KEYS, "keys in __metadata__")
            self.within(pos - start, MAX_METADATA, "bytes of __metadata__")
            more, pos = self.separator(pos)
            if not more:
                return values, pos

    def string(self, start: int, limit: int, otherwise: str = "bad JSON, a string expected") -> tuple[str, int]:
        pos = self.expect(b'"', start, otherwise)
        while self.text[pos : pos + 1] != b'"':
            part = _STRING_PART.match(self.text, pos)
            if part is None or part.end() == pos:
                self.fail("bad JSON, a string does not end or holds a control character", start)
            pos = part.end()
            if pos - start > limit + 1:
                self.too_long(start, limit)
        pos += 1
        quoted = self.text[start:pos]
        try:
            value: str = json.loads(quoted.decode()) if b"\\" in quoted else quoted[1:-1].decode()
            value.encode()  # a lone surrogate is no text
        except ValueError:
            self.fail("a string is not valid JSON in UTF-8", start)
        return value, pos

    def separator(self, pos: int) -> tuple[bool, int]:
        """Whether there is more after it, and where."""
        match = _SEPARATOR.match(self.text, pos)
        if match is None:
            self.fail("bad JSON, ',' or '}' expected", pos)
        return match[1] == b",", match.end()

    def blank(self, pos: int) -> int:
        match = _BLANK.match(self.text, pos)
        return match.end() if match else pos

    def expect(self, mark: bytes, pos: int, otherwise: str | None = None) -> int:
        if self.text[pos : pos + 1] != mark:
            self.fail(otherwise or f"bad JSON, '{mark.decode()}' expected", pos)
        return pos + 1

    def explain(self, name: str, pos: int) -> NoReturn:
        """Say what is wrong with an entry that the pattern does not match; only a short piece is looked at."""
        shown = printable(name)
        try:
            value, _ = json.JSONDecoder().raw_decode(self.text[pos : pos + 4096].decode(errors="replace"))
        except (ValueError, RecursionError):
            self.fail(f"tensor {shown}: bad JSON, or a value too long", pos)
        if not isinstance(value, dict):
            self.fail(f"tensor {shown} is not an object")
        for key in ("dtype", "shape", "data_offsets"):
            if key not in value:
                self.fail(f"tensor {shown} has no {key}")
        extra = [key for key in value if key not in ("dtype", "shape", "data_offsets")]
        if extra:
            self.fail(f"tensor {shown} has the unknown key {printable(extra[0])}")
        for key in ("shape", "data_offsets"):
            listed = value[key]
            if not isinstance(listed, list) or not all(type(n) is int and 0 <= n < _LIMIT for n in listed):
                self.fail(f"tensor {shown}: {key} must be a list of non-negative integers")
        self.fail(f"tensor {shown} is not well formed")

    def too_long(self, pos: int, limit: int) -> NoReturn:
        self.fail(f"a string is longer than streamconv's own limit of {limit} bytes", pos)

    def fail(self, what: str, pos: int | None = None, hint: str | None = None) -> NoReturn:
        at = "" if pos is None else f" (at byte {pos})"
        raise HeaderError(f"{self.where}: {what}{at}", hint=hint)
