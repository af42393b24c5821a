"""What is there: every tensor of a source with its file and byte range. Opening reads headers only."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.header import Header, read_header_fd
from streamconv.checkpoint.shard import Shard
from streamconv.errors import CheckpointError, TensorError, printable

_MAX_JSON = 64 << 20
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of the source; `begin` is an absolute offset in file number `shard`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    shard: int
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Index:
    """An opened source.

    Attributes:
        root: its folder.
        config: config.json.
        shards: its files.
        tensors: name -> record, in file order.
    """

    root: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorRecord]

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def open_index(path: str | Path) -> Index:
    """Open a model folder, or a single .safetensors file with config.json beside it.

    Raises:
        CheckpointError: no such model, no config.json, a missing or unreadable shard.
        HeaderError: a shard's header breaks the format.
        TensorError: the index and the shards disagree about a tensor.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise CheckpointError(f"{printable(str(path))} does not exist")
    root = path if path.is_dir() else path.parent
    config = read_json(root / "config.json", "a Hugging Face model folder has one")
    names = _weight_map(root) if path.is_dir() else None
    if not path.is_dir():
        files = [path.name]
    elif names is not None:
        files = sorted(set(names.values()))
    else:
        files = _listed(root)
    shards = tuple(Shard(root / file) for file in files)
    tensors: dict[str, TensorRecord] = {}
    try:
        for number, shard in enumerate(shards):
            _add(tensors, number, shard, read_header_fd(shard.fd, shard.path), shards, names)
        if names is not None:
            for name, file in names.items():
                if name not in tensors:
                    raise TensorError(f"{_INDEX} places {printable(name)} in {printable(file)}, which does not hold it")
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return Index(root, config, shards, tensors)


def _add(
    tensors: dict[str, TensorRecord],
    number: int,
    shard: Shard,
    header: Header,
    shards: tuple[Shard, ...],
    names: dict[str, str] | None,
) -> None:
    for entry in header.tensors.values():
        if entry.name in tensors:
            other = shards[tensors[entry.name].shard].path.name
            raise TensorError(f"{printable(entry.name)} is in {printable(other)} and in {printable(shard.path.name)}")
        if names is not None and names.get(entry.name) != shard.path.name:
            placed = names.get(entry.name)
            where = f"placed in {printable(placed)}" if placed else "not listed"
            raise TensorError(f"{printable(shard.path.name)} holds {printable(entry.name)}, which {_INDEX} has {where}")
        size = entry.end - entry.begin
        tensors[entry.name] = TensorRecord(entry.name, entry.dtype, entry.shape, number, entry.begin, size)


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        CheckpointError: missing, too large, or not a JSON object.
    """
    where = printable(str(path))
    if not os.path.lexists(path):
        raise CheckpointError(f"missing {path.name} in {printable(str(path.parent))}", hint=hint)
    shard = Shard(path)
    try:
        if shard.size > _MAX_JSON:
            raise CheckpointError(f"{where}: {shard.size} bytes are too many")
        data = bytearray(shard.size)
        shard.read_into(0, memoryview(data))
    finally:
        shard.close()
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {printable(str(error), 120)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return content


def _weight_map(root: Path) -> dict[str, str] | None:
    if not os.path.lexists(root / _INDEX):
        return None
    content = read_json(root / _INDEX, "")
    found = content.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{_INDEX}: weight_map is not an object of file names")
    for file in set(found.values()):
        check_name(root, file, _INDEX)
    return found


def check_name(root: Path, file: str, index: str) -> None:
    """A file name from an index must be a plain name of a file inside the folder.

    A link may lead into the same Hub cache (snapshots/<revision>/file -> ../../blobs/<hash>) and nowhere else.

    Raises:
        CheckpointError: it is not, or the file is missing.
    """
    shown = printable(file)
    plain = file and "\0" not in file and "\\" not in file and PurePosixPath(file).name == file and file not in (".", "..")
    if not plain:
        raise CheckpointError(f"{index}: {shown!r} is not the name of a file in the folder")
    path = root / file
    if not os.path.lexists(path):
        raise CheckpointError(f"missing shard {shown}, which {index} names")
    if path.is_symlink():
        home, target = root.resolve(), path.resolve()
        blobs = home.parent.parent / "blobs"
        inside = home in target.parents or (home.parent.name == "snapshots" and target.parent == blobs)
        if not inside:
            raise CheckpointError(f"{shown} is a link out of the folder")


def _listed(root: Path) -> list[str]:
    """Every *.safetensors by name; consolidated files only if there is nothing else."""
    files = sorted(entry.name for entry in os.scandir(root) if entry.name.endswith(".safetensors"))
    chosen = [name for name in files if not name.startswith("consolidated")] or files
    if not chosen:
        raise CheckpointError(f"no .safetensors file in {printable(str(root))}")
    for name in chosen:
        check_name(root, name, str(root))
    return chosen


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of (at most 2000) names."""
    pool = [other for _, other in zip(range(2000), names, strict=False)]
    close = difflib.get_close_matches(name, pool, 1, 0.6)
    return close[0] if close else None
