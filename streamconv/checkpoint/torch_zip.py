"""PyTorch checkpoints (.bin, .pth, .pt): a zip of a pickle and one stored entry for each storage. torch is not needed.

Only the directory, data.pkl and the local headers of the entries are read; every tensor becomes a byte range of the file.
Zip and pickle are parsed strictly and in bounded memory: sizes are checked before anything is read.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from streamconv.checkpoint.header_parse import TensorEntry
from streamconv.checkpoint.limits import MAX_PICKLE, MAX_PICKLE_STEPS, MAX_ZIP_DIRECTORY, MAX_ZIP_ENTRIES
from streamconv.checkpoint.pickle_records import read_pickle
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.torch_names import Storage, TensorView
from streamconv.checkpoint.untrusted import refuse_lfs_pointer
from streamconv.digest import sha256
from streamconv.errors import CheckpointError, TensorError, printable

if TYPE_CHECKING:
    from zipfile import ZipInfo

_END, _END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q")
_LOCATOR, _LOCAL = struct.Struct("<4sIQI"), struct.Struct("<4s5H3I2H")
_ENTRY_SIZE = 46
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_ALL_ONES = 0xFFFFFFFF


class TorchFile(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by name, in the order of the state dict.
        digest: SHA-256 (hex) of the directory and data.pkl, which fix where every tensor lies.
        archive: the folder inside the zip: torch.save gives it the name of the file.
    """

    tensors: dict[str, TensorEntry]
    digest: str
    archive: str


def read_torch(shard: Shard) -> TorchFile:
    """The tensors of a checkpoint file.

    Raises:
        CheckpointError: no zip of torch.save, or its pickle holds anything but weights (nothing is executed).
        TensorError: a tensor lies outside of its storage or is not contiguous.
    """
    shown = printable(shard.path)
    directory, entries = _directory(shard, shown)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{shown} is a zip without a data.pkl; it was not written by torch.save")
    prefix = pickles[0][: -len("data.pkl")]
    if prefix + "constants.pkl" in entries:
        raise CheckpointError(f"{shown} is a TorchScript program, not a checkpoint", hint="save its state dict")
    if prefix + "byteorder" in entries:
        order = _content(shard, shown, prefix + "byteorder", entries, 16)
        if order != b"little":
            raise CheckpointError(f"{shown}: byteorder {printable(order.decode(errors='replace'))} is not supported")
    pickled = _content(shard, shown, pickles[0], entries, MAX_PICKLE)
    root = read_pickle(pickled, shown, MAX_PICKLE_STEPS)
    places: dict[str, tuple[int, int]] = {}
    tensors: dict[str, TensorEntry] = {}
    for name, view in _state_dict(root, shown).items():
        key = view.storage.key
        if key not in places:
            entry = f"{prefix}data/{key}"
            if entry not in entries:
                raise CheckpointError(f"{shown}: data.pkl names the storage {printable(key)}, which is not in the file")
            places[key] = _place(shard, shown, entry, entries[entry])
        tensors[name] = _tensor(shown, name, view, *places[key])
    digest = sha256(directory)
    digest.update(pickled)
    return TorchFile(tensors, digest.hexdigest(), prefix.rstrip("/"))


# ---- the zip


def _directory(shard: Shard, shown: str) -> tuple[bytes, dict[str, ZipInfo]]:
    """The central directory, and its entries by name."""
    broken = CheckpointError(f"{shown} is not a whole zip file", hint="is the download complete?")
    size = shard.size
    head = _read(shard, 0, min(size, 512))
    if head[:4] != b"PK\x03\x04":
        raise _not_a_zip(shown, head)
    tail_at = max(0, size - _END.size - 65535)
    tail = _read(shard, tail_at, size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise broken
    _, disk, first_disk, here, count, length, begin, comment = _END.unpack_from(tail, at)
    end_at = tail_at + at
    if disk or first_disk or here != count or end_at + _END.size + comment != size:
        raise broken
    limit = end_at
    if end_at >= _LOCATOR.size:
        mark, _, end64, _ = _LOCATOR.unpack(_read(shard, end_at - _LOCATOR.size, end_at))
        if mark == b"PK\x06\x07":
            if end64 + _END64.size > end_at - _LOCATOR.size:
                raise broken
            record = _END64.unpack(_read(shard, end64, end64 + _END64.size))
            mark, _, _, _, disk, first_disk, here, count, length, begin = record
            if mark != b"PK\x06\x06" or disk or first_disk or here != count:
                raise broken
            limit = end64
    if begin + length != limit:
        raise broken
    if length > MAX_ZIP_DIRECTORY or count > MAX_ZIP_ENTRIES or count * _ENTRY_SIZE > length:
        raise CheckpointError(f"{shown}: a zip directory of {length} bytes for {count} entries is not accepted")
    directory = _read(shard, begin, limit)
    return directory, _entries(directory, count, begin, shown, broken)


def _entries(directory: bytes, count: int, limit: int, shown: str, broken: CheckpointError) -> dict[str, ZipInfo]:
    import zipfile  # slow to load, and no other format needs it

    end = _END.pack(b"PK\x05\x06", 0, 0, count & 0xFFFF, count & 0xFFFF, len(directory), 0, 0)
    try:
        infos = zipfile.ZipFile(io.BytesIO(directory + end)).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise broken from error
    entries: dict[str, ZipInfo] = {}
    for info in infos:
        if info.orig_filename in entries:
            raise CheckpointError(f"{shown}: the zip holds {printable(info.orig_filename)} twice")
        sizes = (info.file_size, info.compress_size, info.header_offset)
        if info.volume not in (0, 0xFFFF) or _ALL_ONES in sizes or info.header_offset + _LOCAL.size > limit:
            raise broken
        entries[info.orig_filename] = info
    if len(infos) != count:
        raise broken
    return entries


def _place(shard: Shard, shown: str, name: str, entry: ZipInfo) -> tuple[int, int]:
    """(begin, size) of an entry's bytes in the file."""
    where = f"{shown}: the zip entry {printable(name)}"
    if entry.flag_bits & 0x2041:
        raise CheckpointError(f"{where} is encrypted")
    if entry.compress_type != 0 or entry.compress_size != entry.file_size:
        raise CheckpointError(f"{where} is compressed", hint="torch.save stores entries; do not zip the file again")
    at = entry.header_offset + _LOCAL.size
    mark, _, flags, method, _, _, _, _, _, named, extra = _LOCAL.unpack(_read(shard, entry.header_offset, at))
    begin = at + named + extra
    if mark != b"PK\x03\x04" or method != 0 or flags & 0x41 or begin + entry.file_size > shard.size:
        raise CheckpointError(f"{where} does not lie where the directory says", hint="is the download complete?")
    if _read(shard, at, at + named).decode("utf-8" if entry.flag_bits & 0x800 else "cp437", errors="replace") != name:
        raise CheckpointError(f"{where} has another name in its own header")
    return begin, entry.file_size


def _content(shard: Shard, shown: str, name: str, entries: dict[str, ZipInfo], limit: int) -> bytes:
    if entries[name].file_size > limit:
        size = entries[name].file_size
        raise CheckpointError(f"{shown}: {printable(name)} has {size} bytes; at most {limit} are accepted")
    begin, size = _place(shard, shown, name, entries[name])
    return _read(shard, begin, begin + size)


def _read(shard: Shard, begin: int, end: int) -> bytes:
    with shard.window(begin, end) as window:
        return bytes(window)


def _not_a_zip(shown: str, head: bytes) -> CheckpointError:
    if head[:1] == b"\x80" or head[257:262] == b"ustar":
        return CheckpointError(
            f"{shown} is in the format of PyTorch before 1.6, which has no directory of its tensors",
            hint="load it with torch.load(weights_only=True) and save it again, better still as .safetensors",
        )
    refuse_lfs_pointer(head, shown)
    return CheckpointError(f"{shown} is not a PyTorch checkpoint", hint="is the download complete?")


# ---- the state dict


def _state_dict(root: Any, shown: str) -> dict[str, TensorView]:
    """Name -> tensor, from a state dict or from one under a usual name (model, state_dict, ...)."""
    for _ in range(3):
        if type(root) is not dict:
            raise CheckpointError(f"{shown} holds no dict of tensors")
        if any(isinstance(value, TensorView) for value in root.values()):
            break
        inner = [key for key in _WRAPPERS if type(root.get(key)) is dict]
        if len(inner) > 1:
            raise CheckpointError(f"{shown} holds both {inner[0]} and {inner[1]}; which are the weights?")
        if not inner:
            break
        root = root[inner[0]]
    tensors: dict[str, TensorView] = {}
    for key, value in root.items():
        if isinstance(value, TensorView):
            if type(key) is not str:
                raise CheckpointError(f"{shown}: {key!r} is not a tensor name")
            tensors[key] = value
        elif _holds_tensors(value):
            raise CheckpointError(f"{shown}: {printable(key)} holds more tensors, nested; a flat dict is needed")
    if not tensors:
        raise CheckpointError(f"{shown} holds no tensors under names")
    return tensors


def _holds_tensors(value: Any) -> bool:
    """Whether a tensor is anywhere inside; a container that is in many places is looked at once."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, TensorView | Storage):
            return True
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)
    return False


def _tensor(shown: str, name: str, view: TensorView, begin: int, size: int) -> TensorEntry:
    where = f"{shown}: {printable(name)}"
    unit = view.storage.dtype.itemsize if view.storage.dtype else 1
    if view.storage.numel * unit != size:
        raise TensorError(f"{where}: data.pkl says {view.storage.numel * unit} bytes, the storage {printable(view.storage.key)} has {size}")
    if len(view.shape) != len(view.strides):
        raise TensorError(f"{where}: {len(view.shape)} dimensions, {len(view.strides)} strides")
    count = 1
    for length in view.shape:
        count *= length
        if count >= 1 << 63 and 0 not in view.shape:
            raise TensorError(f"{where}: shape {list(view.shape)} is too large")
    nbytes = count * view.dtype.itemsize
    if count:
        dense = 1
        for length, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
            if length != 1 and stride != dense:
                raise TensorError(
                    f"{where}: shape {list(view.shape)} with strides {list(view.strides)} is not contiguous",
                    hint="save it again after .contiguous()",
                )
            dense *= length
    start = view.offset * view.dtype.itemsize
    if start + nbytes > size:
        raise TensorError(f"{where}: bytes {start} to {start + nbytes} are outside of its storage of {size} bytes")
    return TensorEntry(name, view.dtype, view.shape, begin + start, begin + start + nbytes)
