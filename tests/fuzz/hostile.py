"""The worst files known, each as small as it can be for what it would cost a careless reader."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

MANY, TOO_MANY = 249_999, 400_000
_EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
_FACE, _FACE_ESCAPED = "😀".encode(), b"\\ud83d\\ude00"


def pack(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _object(parts: Iterable[bytes]) -> bytes:
    return b"{" + b",".join(parts) + b"}"


def _tensors(count: int, entry: bytes = b'"%d":' + _EMPTY) -> bytes:
    """`count` tensors, then one that is wrong: all are read before it is found."""
    return _object([*(entry % number for number in range(count)), b'"wrong":1'])


def _shapes(count: int, dimensions: int) -> bytes:
    more = b"".join(b",%d" % (1000 + number) for number in range(dimensions - 2))
    return _object(b'"%d":{"dtype":"U8","shape":[0,1%06d%s],"data_offsets":[0,0]}' % (n, n, more) for n in range(count))


def _long_names(letter: bytes) -> bytes:
    names = (b'"%d%s%s":%s' % (number, letter, b"x" * 65_000, _EMPTY) for number in range(510))
    return _object([*names, b'"wrong":1'])


_SPACED = b'"%d":{ "dtype" : "U8" ,  "shape" :  [0]  ,  "data_offsets"  :  [0   ,  0]    }     '

HEADERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "2,400,000 keys of metadata": (
        lambda: b'{"__metadata__":' + _object(b'"%d":""' % n for n in range(2_400_000)) + b"}",
        "keys in __metadata__, above streamconv's own limit",
    ),
    "metadata of 20 MB": (lambda: b'{"__metadata__":{"a":"' + b"x" * 20_000_000 + b'"}}', "longer than streamconv's own limit"),
    "metadata of escapes": (lambda: b'{"__metadata__":{"a":"' + b"\\n" * 2_000_000 + b'","b":1}}', "strings only"),
    "metadata of wide letters": (lambda: b'{"__metadata__":{"a":"' + _FACE + b"x" * 4_100_000 + b'","b":1}}', "strings only"),
    "header of 33 MiB": (lambda: b"{" + b" " * (33 << 20), "above streamconv's own limit of 33554432"),
    "400,000 empty tensors": (lambda: _tensors(TOO_MANY), "tensors, above streamconv's own limit"),
    "250,000 tensors, the last wrong": (lambda: _tensors(MANY), "tensor wrong is not an object"),
    "250,000 tensors, written wide": (lambda: _tensors(MANY, _SPACED), "tensor wrong is not an object"),
    "100,000 different shapes": (lambda: _shapes(100_000, 3), "different shapes, above streamconv's own limit"),
    "shapes of 60 dimensions": (lambda: _shapes(30_000, 60), "different shapes, above streamconv's own limit"),
    "100,000 escaped names": (lambda: _tensors(100_000, b'"\\u0061%d":' + _EMPTY), "escapes, above streamconv's own limit"),
    "names of 65,000 wide letters": (lambda: _long_names(_FACE), "tensor wrong is not an object"),
    "names of 65,000 letters, escaped": (lambda: _long_names(_FACE_ESCAPED), "tensor wrong is not an object"),
    "a name of 33 MB": (lambda: b'{"' + b"a" * 33_000_000, "longer than streamconv's own limit"),
    "33 MB of blanks": (lambda: b"{" + b" " * 33_000_000, "a string expected"),
    "33 MB of braces": (lambda: b"{" * 33_000_000, "a string expected"),
    "a shape of 16 million numbers": (lambda: b'{"a":{"dtype":"U8","shape":[' + b"1," * 16_000_000, "too long"),
}


def _map(parts: Iterable[bytes]) -> bytes:
    return b'{"weight_map":' + _object(parts) + b"}"


INDEXES: dict[str, tuple[Callable[[], bytes], str]] = {
    "10 million objects": (lambda: b'{"weight_map":[' + b"{}," * 10_000_000 + b"{}]}", "objects and lists, above streamconv's own limit"),
    "5 million lists": (lambda: b'{"weight_map":[' + b"[]," * 5_000_000 + b"[]]}", "objects and lists, above streamconv's own limit"),
    "5 million numbers": (lambda: b'{"weight_map":[' + b"1," * 5_000_000 + b"1]}", "values, above streamconv's own limit"),
    "40 MB": (lambda: b" " * 40_000_000, "at most 33554432 are accepted"),
    "290,000 files": (
        lambda: _map(b'"a%d%s":"b%d%s"' % (n, b"x" * 50, n, b"y" * 30) for n in range(290_000)),
        "names 290000 files, above streamconv's own limit",
    ),
    "one wide letter in 33 MB": (lambda: _map([b'"' + _FACE + b"x" * 33_000_000 + b'":1']), "not plain ASCII"),
    "one escaped wide letter in 33 MB": (lambda: _map([b'"' + _FACE_ESCAPED + b"x" * 33_000_000 + b'":1']), "must map"),
    "escaped wide names": (
        lambda: _map(b'"%s%d%s":1' % (_FACE_ESCAPED, n, b"x" * 6500) for n in range(5100)),
        "must map",
    ),
    "lists 40,000 deep": (lambda: b'{"weight_map":' + b"[" * 40_000, "nested too deeply"),
    "objects 40,000 deep": (lambda: b'{"a":' * 40_000, "nested too deeply"),
    "numbers of 4299 digits": (lambda: b'{"weight_map":[' + b",".join([b"9" * 4299] * 7700) + b"]}", "an integer of 4299 digits"),
    "a number of 33 million digits": (lambda: b'{"weight_map":' + b"1" * 33_000_000 + b"}", "an integer of 33000000 digits"),
    "a fraction of 33 million digits": (lambda: b'{"weight_map":' + b"1" * 33_000_000 + b".5}", "no weight_map"),
    "one name 290,000 times": (lambda: _map([b'"a":"b"'] * 290_000), "twice"),
}

CONFIGS: dict[str, tuple[Callable[[], bytes], str]] = {
    "1 million lists": (lambda: b'{"a":[' + b"[]," * 1_000_000 + b"[]]}", "objects and lists, above streamconv's own limit"),
    "5 MB": (lambda: b" " * 5_000_000, "at most 4194304 are accepted"),
    "a config of lists": (lambda: b'{"architectures":["A"],"hidden_size":' + b"[" * 900 + b"]" * 900 + b"}", "nested too deeply"),
    "a dtype of lists": (lambda: b'{"architectures":["A"],"torch_dtype":' + b"[" * 900 + b"]" * 900 + b"}", "nested too deeply"),
    "a size of 4299 digits": (lambda: b'{"architectures":["A"],"rope_theta":' + b"9" * 4299 + b"}", "an integer of 4299 digits"),
    "a name of 4 MB": (lambda: b'{"architectures":["A"],"hidden_size":"' + b"x" * 4_000_000 + b'"}', "hidden_size is 'x"),
}


def torch_file(pickle: bytes, entries: int = 0, storages: Mapping[str, bytes] | None = None) -> bytes:
    """A zip as torch.save makes it: data.pkl, empty storages by number, and those given by name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", pickle)
        for number in range(entries):
            archive.writestr(f"a/data/{number}", b"")
        for name, content in (storages or {}).items():
            archive.writestr(f"a/data/{name}", content)
    return file.getvalue()


def _text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


_P = b"\x80\x02"
_STEPS = "takes more than 700000 steps"
_SHAPE = b"(" + b"K\1" * 16 + b"tq\1"
_STORAGE = b"(" + b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aNK\1tQq\2"
TENSOR = _P + b"ctorch._utils\n_rebuild_tensor_v2\nq\0" + _SHAPE + _STORAGE + b"(h\2K\0h\1h\1NNtq\3"
TORCH: dict[str, tuple[Callable[[], bytes], str]] = {
    "16 million opcodes": (lambda: torch_file(_P + b"N0" * 8_000_000), _STEPS),
    "texts": (lambda: torch_file(_P + _text(b"ab") * 2_000_000), _STEPS),
    "floats": (lambda: torch_file(_P + (b"G" + b"\x40" + b"\1" * 7) * 1_500_000), _STEPS),
    "lists": (lambda: torch_file(_P + b"]" * 8_000_000), _STEPS),
    "objects": (lambda: torch_file(_P + b"}" * 8_000_000), _STEPS),
    "nested tuples": (lambda: torch_file(_P + b")" + b"\x85" * 8_000_000), _STEPS),
    "nested tuples, then refused": (lambda: torch_file(_P + b")" + b"\x85" * 690_000 + b"."), "holds no dict of tensors"),
    "a dict of nested tuples": (
        lambda: torch_file(_P + b"}" + _text(b"a") + b")" + b"\x85" * 690_000 + b"s."),
        "holds no tensors under names",
    ),
    "storage names": (lambda: torch_file(_P + b"ctorch\nFloatStorage\n" * 750_000), _STEPS),
    "tensors": (lambda: torch_file(TENSOR + b"h\0h\3R" * 230_000 + b"."), "builds over 60000 objects"),
    "tuples of twice the last": (lambda: torch_file(_P + b")" + b"q\0h\0\x86" * 2_000_000), _STEPS),
    "marks": (lambda: torch_file(_P + b"(" * 5_000_000 + b"t"), _STEPS),
    "memo of everything": (lambda: torch_file(_P + b"N" + b"".join(b"r" + struct.pack("<I", n) for n in range(1_200_000))), _STEPS),
    "a huge memo number": (lambda: torch_file(_P + b"Nr\xff\xff\xff\xff."), "holds no dict"),
    "a size of letters": (
        lambda: torch_file(_P + b"ctorch\nSize\n" + _text("錯".encode() * 5_000_000) + b"\x85R."),
        "data.pkl is broken",
    ),
    "a text longer than the file": (lambda: torch_file(_P + b"X\xff\xff\xff\xff"), "data.pkl is broken"),
    "a call of os.system": (lambda: torch_file(_P + b"cos\nsystem\n" + _text(b"touch pwned") + b"\x85R."), "nothing was executed"),
    "data.pkl of 17 MB": (lambda: torch_file(_P + b"N" * 17_000_000), "at most 16777216 are accepted"),
    "60,000 storages": (lambda: torch_file(_P + b"}.", 60_000), "for 60001 entries is not accepted"),
    "50,000 storages": (lambda: torch_file(_P + b"}.", 49_999), "holds no tensors"),
}

CASES: list[tuple[str, str, Callable[[], bytes], str]] = [
    (kind, name, make, says)
    for kind, cases in {"header": HEADERS, "index": INDEXES, "config": CONFIGS, "torch": TORCH}.items()
    for name, (make, says) in cases.items()
]
"""(kind, name, content, what is said of it); kinds as in child.py."""

_NAMES = {"header": "x.safetensors", "index": "model.safetensors.index.json", "config": "config.json", "torch": "x.bin"}


def write(folder: Path, kind: str, make: Callable[[], bytes]) -> Path:
    """A file of a case."""
    path, content = folder / _NAMES[kind], make()
    path.write_bytes(pack(content) if kind == "header" else content)
    return path
