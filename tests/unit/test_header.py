"""The safetensors header: everything hostile is refused, everything accepted reads as stock reads it."""

# ruff: noqa: UP031 - JSON is full of braces, so "%" reads better than format
from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from streamconv.checkpoint import header_parse
from streamconv.checkpoint.dtypes import DTYPES, F16, F32
from streamconv.checkpoint.header import parse_header, read_header
from streamconv.checkpoint.header_parse import Header
from streamconv.checkpoint.limits import MAX_HEADER
from streamconv.errors import CheckpointError, HeaderError, RefusedError
from tests.headers import build_header

GOOD = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


def pack(header: str | bytes, data: bytes = b"ab", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parse(file: bytes) -> Header:
    return parse_header(file, len(file), "x.safetensors")


def entry(dtype: str = '"U8"', shape: str = "[2]", offsets: str = "[0,2]", more: str = "") -> str:
    return '{"a":{"dtype":%s,"shape":%s,"data_offsets":%s%s}}' % (dtype, shape, offsets, more)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "empty header": (pack("", b""), "start with"),
    "length past the end": (pack("{}", b"", 3), "past the end"),
    "length huge": (pack("{}", b"", 2**64 - 1), "limit"),
    "length above 100 MB": (pack("{}", b"", MAX_HEADER + 1), "limit"),
    "no object": (pack("[]", b""), "start with"),
    "leading blank": (pack(" {}", b""), "start with"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}", b""), "start with"),
    "zeros": (pack(b"\0" * 64, b""), "start with"),
    "not closed": (pack('{"a":' + GOOD), "expected"),
    "comma at the end": (pack('{"a":%s,}' % GOOD), "string expected"),
    "text after the end": (pack('{"a":%s}x' % GOOD), "after the header"),
    "NUL padding": (pack('{"a":%s}\0' % GOOD), "after the header"),
    "bad UTF-8": (pack(b'{"\xff":%s}' % GOOD.encode()), "UTF-8"),
    "bad UTF-8 with escape": (pack(b'{"\xff\\n":%s}' % GOOD.encode()), "UTF-8"),
    "lone surrogate": (pack('{"\\ud800":%s}' % GOOD), "UTF-8"),
    "bad escape": (pack('{"\\x":%s}' % GOOD), "not valid JSON"),
    "control character": (pack('{"a\n":%s}' % GOOD), "control character"),
    "deep nesting": (pack('{"a":' + "[" * 100_000), "bad JSON"),
    "deep object nesting": (pack('{"a":' * 100_000), "bad JSON"),
    "duplicate tensor": (pack('{"a":%s,"a":%s}' % (GOOD, GOOD)), "duplicate tensor a"),
    "duplicate tensor, escaped": (pack('{"a":%s,"\\u0061":%s}' % (GOOD, GOOD)), "duplicate tensor a"),
    "duplicate field": (pack(entry(more=',"dtype":"U8"')), "a"),
    "field instead of another": (pack('{"a":{"dtype":"U8","shape":[2],"shape":[2]}}'), "a"),
    "entry is a list": (pack('{"a":["U8",[2],[0,2]]}'), "tensor a is not an object"),
    "entry is null": (pack('{"a":null}'), "tensor a is not an object"),
    "missing key": (pack('{"a":{"dtype":"U8","shape":[2]}}'), "tensor a has no data_offsets"),
    "extra key": (pack(entry(more=',"x":1')), "tensor a has the unknown key x"),
    "comma in the entry": (pack(entry(more=",")), "tensor a"),
    "no comma in the entry": (pack('{"a":{"dtype":"U8" "shape":[2],"data_offsets":[0,2]}}'), "tensor a"),
    "unknown dtype": (pack(entry('"F128"')), "tensor a has dtype F128"),
    "lower-case dtype": (pack(entry('"u8"')), "dtype u8"),
    "dtype number": (pack(entry("8")), "tensor a"),
    "F4": (pack(entry('"F4"', "[4]")), "dtype F4"),
    "F6": (pack(entry('"F6_E2M3"', "[4]", "[0,3]"), b"abc"), "dtype F6_E2M3"),
    "complex": (pack(entry('"C64"', "[1]", "[0,8]"), b"a" * 8), "dtype C64"),
    "negative dimension": (pack(entry(shape="[-2]")), "tensor a: shape"),
    "two negative dimensions": (pack(entry(shape="[-2,-1]")), "tensor a: shape"),
    "minus zero": (pack(entry(offsets="[-0,2]")), "tensor a"),
    "leading zero": (pack(entry(shape="[02]")), "tensor a"),
    "boolean dimension": (pack(entry(shape="[true,2]")), "tensor a: shape"),
    "float dimension": (pack(entry(shape="[2.0]")), "tensor a: shape"),
    "exponent": (pack(entry(shape="[2e0]")), "tensor a: shape"),
    "NaN": (pack(entry(shape="[NaN]")), "tensor a: shape"),
    "string dimension": (pack(entry(shape='["2"]')), "tensor a: shape"),
    "huge dimension": (pack(entry(shape="[9223372036854775808]")), "impossible shape"),
    "huge empty dimension": (pack(entry(shape="[0,18446744073709551616]", offsets="[0,0]"), b""), "impossible shape"),
    "product overflows": (pack(entry(shape="[4294967296,4294967296,4294967296]")), "impossible shape"),
    "product overflows, then empty": (
        pack(entry(shape="[9223372036854775807,9,0]", offsets="[0,0]"), b""),
        "impossible",
    ),
    "dimension of 5000 digits": (pack(entry(shape="[" + "9" * 5000 + "]")), "tensor a"),
    "too many dimensions": (pack(entry(shape="[" + ",".join("1" * 99) + "]", offsets="[0,1]"), b"a"), "tensor a"),
    "three offsets": (pack(entry(offsets="[0,2,2]")), "tensor a"),
    "one offset": (pack(entry(offsets="[2]")), "tensor a"),
    "negative offset": (pack(entry(offsets="[-2,0]")), "tensor a: data_offsets"),
    "boolean offset": (pack(entry(offsets="[false,2]")), "tensor a: data_offsets"),
    "offsets backwards": (pack(entry(offsets="[2,0]")), "tensor a of shape"),
    "size does not fit": (pack(entry(shape="[3]")), "needs 3 bytes"),
    "dtype does not fit": (pack(entry('"F16"')), "needs 4 bytes"),
    "hole at the start": (pack(entry(offsets="[1,3]"), b"abc"), "hole of 1 bytes"),
    "hole": (pack('{"a":%s,"b":%s}' % (GOOD, GOOD.replace("[0,2]", "[3,5]")), b"abcde"), "tensor b leaves a hole"),
    "overlap": (pack('{"a":%s,"b":%s}' % (GOOD, GOOD.replace("[0,2]", "[1,3]")), b"abc"), "tensor b overlaps"),
    "same bytes twice": (pack('{"a":%s,"b":%s}' % (GOOD, GOOD)), "overlaps"),
    "empty tensor inside another": (
        pack('{"a":%s,"z":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}' % GOOD),
        "tensor z",
    ),
    "data past the end": (pack(entry(), b"a"), "tensor a reaches past the end"),
    "bytes after the last tensor": (pack(entry(), b"abc"), "1 bytes after the last"),
    "data without tensors": (pack("{}", b"x"), "1 bytes after the last"),
    "metadata null": (pack('{"__metadata__":null,"a":%s}' % GOOD), "__metadata__ must be an object"),
    "metadata list": (pack('{"__metadata__":[],"a":%s}' % GOOD), "__metadata__ must be an object"),
    "metadata number": (pack('{"__metadata__":{"a":1}}', b""), "strings only"),
    "metadata null value": (pack('{"__metadata__":{"a":null}}', b""), "strings only"),
    "metadata like a tensor": (pack('{"__metadata__":%s}' % GOOD), "strings only"),
    "metadata twice": (pack('{"__metadata__":{},"__metadata__":{}}', b""), "duplicate key __metadata__"),
    "metadata key twice": (pack('{"__metadata__":{"k":"1","k":"2"}}', b""), "duplicate key k"),
    "metadata surrogate": (pack('{"__metadata__":{"k":"\\udc00"}}', b""), "UTF-8"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused(name: str, tmp_path: Path) -> None:
    file, message = HOSTILE[name]
    with pytest.raises(HeaderError) as caught:
        parse(file)
    assert message in str(caught.value) and "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    with pytest.raises(HeaderError):
        read_header(path)


def test_what_is_legal() -> None:
    header = parse(pack('{"a":%s,"s":{"data_offsets":[2,3],"dtype":"I8","shape":[]}}  \n' % GOOD, b"abc"))
    assert header.tensors["s"].shape == () and header.tensors["s"].end - header.tensors["s"].begin == 1
    empty = parse(pack('{"z":{"dtype":"F16","shape":[0,7],"data_offsets":[0,0]},"a":%s}' % GOOD))
    assert empty.tensors["z"].begin == empty.tensors["a"].begin == empty.data_start
    assert parse(pack("{}", b"")).tensors == {}
    blanks = parse(pack('{ "__metadata__" : { "k\\n" : "v\\u00e4" } ,\n "a" :\t%s }' % GOOD.replace(":", " : ")))
    assert blanks.metadata == {"k\n": "vä"} and list(blanks.tensors) == ["a"]
    assert list(parse(pack('{"\\ud83d\\ude00\\"":%s}' % GOOD)).tensors) == ['😀"']


def test_hostile_size_is_refused() -> None:
    for text in (
        '{"a":{"dtype":"U8","shape":[' + " " * 20_000_000,
        '{"a":{"dtype":"U8","shape":[' + "1," * 10_000_000,
        "{" * 20_000_000,
        '{"__metadata__":{"a":"' + "\\n" * 10_000_000,
    ):
        with pytest.raises(HeaderError):
            parse(pack(text))


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError):
            read_header(path)


def _stock(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        return {k: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for k, v in deserialize(file)}
    except SafetensorError:
        return None


def _agree(file: bytes) -> None:
    stock = _stock(file)
    try:
        ours = parse(file)
    except HeaderError:
        return  # being stricter is fine
    assert stock is not None
    mine = {n: (t.dtype.name, t.shape, file[t.begin : t.end]) for n, t in ours.tensors.items()}
    assert mine == stock


_values = st.sampled_from(
    ["0", "1", "2", "-0", "-1", "2.0", "1e0", "true", "null", '"2"', "[]", "{}", "18446744073709551615", "02"]
)
_keys = st.sampled_from(["dtype", "shape", "data_offsets", "data_offsets", "x", "d\\u0074ype"])
_lists = st.lists(_values, max_size=3).map(lambda v: "[" + ",".join(v) + "]")
_fields = st.tuples(
    _keys, st.one_of(_lists, _values, st.sampled_from(['"U8"', '"F16"', '"F4"', '"C64"', '"\\u0055\\u0038"']))
)
_wild = st.lists(_fields, max_size=4).map(lambda fs: "{" + ",".join(f'"{k}":{v}' for k, v in fs) + "}")


@st.composite
def _nearly_good(draw: st.DrawFn) -> str:
    dtype = draw(st.sampled_from(["U8", "I8", "BOOL", "F16", "F4", "F8_E4M3", "F8_E8M0"]))
    shape, begin = draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.sampled_from([0, 0, 0, 1, 2, 3]))
    right = begin + math.prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else 1)
    end = draw(st.sampled_from([right, right, right, right + 1, 0, 2]))
    fields = [f'"dtype":"{dtype}"', f'"shape":{shape}', f'"data_offsets":[{begin}, {end}]']
    return "{" + ",".join(draw(st.permutations(fields))) + "}"


_names = st.sampled_from(['"a"', '"b"', '"\\u0061"', '"\\ud800"', '"__metadata__"', '"é"', '"a\\nb"', '"\x7f"', '""'])
_headers = st.lists(st.tuples(_names, st.one_of(_nearly_good(), _wild)), max_size=3).map(
    lambda es: "{" + ", ".join(f"{n}:{v}" for n, v in es) + "}"
)


@settings(max_examples=500)  # tests/fuzz/full.py: more
@given(_headers, st.integers(0, 8), st.sampled_from(["", " ", "\n", "\0", "\v"]))
def test_accepts_nothing_that_stock_rejects(header: str, size: int, padding: str) -> None:
    ends = [int(end) for end in re.findall(r", (\d)\]", header)]
    _agree(pack(header + padding, bytes(range(max(ends, default=0) + max(0, size - 6)))))


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    name = draw(st.text(st.characters(exclude_categories=("Cs",)), max_size=5))
    text, places = build_header([("n" + name, DTYPES[draw(st.sampled_from(list(DTYPES)))], (2,)), ("w", F16, ())])
    file = bytearray(text + bytes(max(end for _, end in places.values()) - len(text)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(file) - 1))
        file[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789"\\{}[],:- ')))
    return bytes(file)


@settings(max_examples=500)  # tests/fuzz/full.py: more
@given(_mutated())
def test_mutated_files(file: bytes) -> None:
    _agree(file)


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(["<f4", "<f2", "<i8", "<i4", "<i2", "i1", "u1", "?", "<f8", "<u8", "<u4", "<u2"]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=6,
    )
)
def test_written_as_stock_writes(tmp_path_factory: pytest.TempPathFactory, listed: dict[str, Any]) -> None:
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in listed.items()}
    _same_as_stock(tmp_path_factory.mktemp("stock") / "s.safetensors", arrays)


def test_written_as_stock_writes_layers(tmp_path: Path) -> None:
    arrays = {f"transformer.layers.{i}.weight": np.full((2, 3), i, np.float16) for i in range(23)}
    arrays |= {"lm_head.weight": np.ones((4, 4), np.float16), 'é\n\x7f"': np.ones((), np.float32)}
    arrays |= {"z": np.ones((3,), np.bool_), "a": np.ones((5,), np.int8), "b": np.zeros((0, 2), np.int64)}
    _same_as_stock(tmp_path / "s.safetensors", arrays)


def _same_as_stock(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    save_file(arrays, path)
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bool": "BOOL"}
    entries = []
    for name, array in arrays.items():
        kind = str(array.dtype)
        short = names.get(kind) or kind[0].upper() + kind.lstrip("uint")
        entries.append((name, DTYPES[short], array.shape))
    header, places = build_header(entries)
    written = path.read_bytes()
    assert written.startswith(header) and len(written) == max([len(header), *(end for _, end in places.values())])
    for name, array in arrays.items():
        begin, end = places[name]
        assert written[begin:end] == array.tobytes()
    again = read_header(path)
    assert {n: (t.begin, t.end) for n, t in again.tensors.items()} == places
    assert again.data_start == len(header)


def test_written_as_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    kinds = [k for k in DTYPES.values() if hasattr(torch, k.torch) and k.name not in ("U16", "U32", "U64", "F8_E8M0")]
    tensors = {f"{n}.{k.name}": torch.zeros((2, 4), dtype=getattr(torch, k.torch)) for k in kinds for n in "xya"}
    save(tensors, tmp_path / "t.safetensors")
    header, places = build_header([(n, DTYPES[n[2:]], (2, 4)) for n in tensors])
    file = (tmp_path / "t.safetensors").read_bytes()
    assert file.startswith(header) and len(file) == max(end for _, end in places.values())


def test_metadata_agrees_with_stock(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    metadata = {"format": "pt", "ß\n": '{"a": "\\"😀"}'}
    save_file({"a": np.ones(3, np.float32)}, path, metadata=metadata)
    with safe_open(path, "np") as file:
        assert read_header(path).metadata == metadata == file.metadata()


def test_build_refuses_a_name_twice() -> None:
    for names in (["a", "a"], ["__metadata__"]):
        with pytest.raises(RefusedError, match="twice or reserved"):
            build_header([(name, F32, (1,)) for name in names])


def test_no_tensors() -> None:
    header, places = build_header([])
    assert places == {} and json.loads(header[8:]) == {} and len(header) == 16


LIMITED: dict[str, tuple[dict[str, int], str, str]] = {
    "tensors": ({"MAX_TENSORS": 2}, '{"a":%s,"b":%s,"c":%s}', "3 tensors, above streamconv's own limit of 2"),
    "shapes": ({"MAX_SHAPES": 1}, '{"a":%s,"b":{"dtype":"U8","shape":[0,1],"data_offsets":[0,0]}}', "2 different shapes, above"),
    "escaped names": ({"MAX_ESCAPED": 1}, '{"\\u0061":%s,"\\u0062":%s}', "2 names with escapes, above"),
    "name": ({"MAX_NAME": 3}, '{"abcd":%s}', "longer than streamconv's own limit of 3 bytes"),
    "escaped name": ({"MAX_NAME": 3}, '{"\\u0061":%s}', "longer than streamconv's own limit of 3 bytes"),
    "metadata keys": ({"MAX_METADATA_KEYS": 1}, '{"__metadata__":{"a":"","b":""}}', "2 keys in __metadata__, above"),
    "metadata": ({"MAX_METADATA": 9}, '{"__metadata__":{"a":"","b":""}}', "bytes of __metadata__, above"),
    "metadata string": ({"MAX_METADATA": 9}, '{"__metadata__":{"a":"xxxxxxxxxx"}}', "longer than streamconv's own limit of 9 bytes"),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, text, says = LIMITED[name]
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    file = pack(text.replace("%s", empty), b"")
    parse(file)
    for limit, value in limits.items():
        monkeypatch.setattr(header_parse, limit, value)
    with pytest.raises(HeaderError, match=re.escape(says)):
        parse(file)
    for limit, value in limits.items():  # at the limit is not above it
        monkeypatch.setattr(header_parse, limit, value + 30)
    parse(file)


def test_a_long_header_out_of_order_reads_the_same_from_a_file(tmp_path: Path) -> None:
    texts = [f'"{n}":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{n + 1}]}}' for n in range(5000)]
    file = pack("{" + ",".join(reversed(texts)) + "}", bytes(n % 256 for n in range(5000)))
    assert len(file) > 2 << 16
    (tmp_path / "x").write_bytes(file)
    read = read_header(tmp_path / "x")
    assert read == parse(file) and list(read.tensors) == [str(n) for n in range(5000)]
    _agree(file)
    os.truncate(tmp_path / "x", 1 << 17)
    with pytest.raises(HeaderError, match="past the end"):
        read_header(tmp_path / "x")
