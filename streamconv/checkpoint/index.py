"""What a source holds: every tensor's name, type, shape and place. Reads config.json and headers, never a weight."""

from __future__ import annotations

import contextlib
import heapq
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.foreign import ADAPTER_WEIGHTS, foreign
from streamconv.checkpoint.limits import MAX_CONFIG, MAX_FILES, MAX_HEADER, MAX_TENSORS
from streamconv.checkpoint.meta import PARAMS, assemble, check_parts, is_meta, meta_files
from streamconv.checkpoint.rows import SourceFile, SourceTensor, tensor_at
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.tensor_table import TensorTable
from streamconv.checkpoint.untrusted import file_size, names_in, open_regular, read_json
from streamconv.checkpoint.weight_files import WEIGHT_MAP, Choice, choose, weight_files
from streamconv.errors import CheckpointError, TensorError, printable

_CONFIG = "config.json"
_TORCH = (".bin", ".pth", ".pt")


@dataclass(frozen=True, slots=True)
class Beside:
    """A file of a checkpoint that holds no weights; `fetch` brings it to `path`, where it is not there yet.

    Attributes:
        name: path below the checkpoint, with "/".
    """

    name: str
    path: Path
    size: int
    fetch: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """An opened source.

    Attributes:
        root: the folder, or the one weight file that was named.
        config: config.json as it is, or Meta's params.json.
        shards: the files, in the order of their names.
        tensors: by name, in the order of the files and of the data in them. For Meta `shard` and `begin` are those of the
            first piece, the rest is of the whole tensor.
        digests: for each shard that is no safetensors file, SHA-256 (hex) of what fixes where its tensors lie.
        assembled: for a Meta source, the same tensors with all their pieces; None for Hugging Face.
        unlisted: tensors that the index file does not list.
        absent: tensors that the index file lists and no file holds.
        notes: what the user should know of how the source was read.
        left_behind: what a target of another kind does not take over, in words.
        beside: files that the Hub lists, weights too; None for a folder, which is looked through instead.
        repo: what the Hub calls it, org/name.
        views: the tensors of a source whose files hold them cut, joined or in codes, by name; empty for any other.
        origin: how such files were made, as their target tells.
    """

    root: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: TensorTable
    digests: dict[int, str] = field(default_factory=dict)
    assembled: dict[str, SourceTensor] | None = None
    unlisted: frozenset[str] = frozenset()
    absent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    beside: tuple[Beside, ...] | None = None
    repo: str | None = None
    views: Mapping[str, SourceTensor] = field(default_factory=dict)
    origin: object = None
    left_behind: tuple[str, ...] = ()

    def name_of(self, shard: Shard) -> str:
        """The file's path in the checkpoint, with "/": two files never share it, wherever the checkpoint lies."""
        folder = self.root.parent if shard.path == self.root else self.root
        return shard.path.relative_to(folder).as_posix()

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_index(path: str | os.PathLike[str], tensors_only: bool = False) -> Index:
    """Open a Hugging Face folder, one weight file with its config.json beside it, or Meta's folder.

    For `tensors_only` config.json may be missing (`config` is empty then), and the file of an adapter will do.

    Raises:
        CheckpointError: something is missing or no checkpoint; HeaderError for a bad header.
        TensorError: a tensor is in two files, or not where the index file says.
    """
    root = Path(path)
    shown = printable(root)
    try:
        mode = os.stat(root).st_mode
    except FileNotFoundError:
        raise CheckpointError(f"no such file or folder: {shown}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot open {shown}: {error}") from None
    if stat.S_ISDIR(mode):
        folder, present = root, names_in(root)
        if not os.path.lexists(folder / _CONFIG):
            if is_meta(folder):
                return _open_meta(folder)
            weights = weight_files(present)
            if not (weights and tensors_only):
                raise (None if weights else foreign(shown, present, folder)) or _no_config(folder)
        config = _config_of(folder)
        chosen = choose(present, lambda name: folder / name)
        if not chosen.names:
            raise foreign(shown, present, folder) or CheckpointError(f"no .safetensors file in {shown}, nor any pytorch_model*.bin")
    elif root.suffix in (".safetensors", *_TORCH):
        folder, chosen = root.parent, Choice([root.name])
        if root.name.startswith(ADAPTER_WEIGHTS) and not tensors_only:
            raise foreign(shown, [root.name]) or CheckpointError(shown)
        if not os.path.lexists(folder / _CONFIG) and not tensors_only:
            raise CheckpointError(f"missing config.json beside {shown}", hint="put the model's config.json there")
        config = _config_of(folder)
    else:
        known = foreign(printable(root.parent), [root.name])
        raise known or CheckpointError(f"{shown} is neither a folder nor a weight file (.safetensors, .bin, .pth, .pt)")
    shards = tuple(Shard(folder / name) for name in chosen.names)
    return build_index(root, config, shards, chosen, _links_out(folder, chosen.names))


def build_index(root: Path, config: dict[str, Any], shards: tuple[Shard, ...], chosen: Choice, notes: Sequence[str] = ()) -> Index:
    """Read the headers of the chosen files; closes them if one is bad."""
    digests: dict[int, str] = {}
    try:
        tensors, unlisted = read_tensors(shards, chosen.weight_map, digests)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    absent = tuple(chosen.weight_map or ())
    return Index(root, config, shards, tensors, digests, unlisted=unlisted, absent=absent, notes=(*chosen.notes, *notes))


def _no_config(folder: Path) -> CheckpointError:
    hint = "a checkpoint folder holds config.json beside its weights"
    with contextlib.suppress(OSError, ValueError):  # of a folder of the Hub's cache (models--org--name) the revision that came last
        snapshots = [path for path in (folder / "snapshots").iterdir() if os.path.exists(path / _CONFIG)]
        newest = max(snapshots, key=lambda path: (path.stat().st_mtime_ns, path.name))
        hint = f"this is the Hub's cache of a model, which is in {printable(newest)}"
    return CheckpointError(f"missing config.json in {printable(folder)}", hint=hint)


def _config_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / _CONFIG, MAX_CONFIG) if os.path.lexists(folder / _CONFIG) else {}


def _open_meta(folder: Path) -> Index:
    params = read_json(folder / PARAMS, MAX_CONFIG)
    from streamconv.checkpoint.torch_zip import read_torch

    files = meta_files(folder)
    shards = tuple(Shard(folder / name) for names in files for name in names)
    parts: list[dict[str, SourceTensor]] = []
    digests: dict[int, str] = {}
    archives: list[str] = []
    try:
        for names in files:
            union: dict[str, SourceTensor] = {}
            for _ in names:
                number = len(digests)
                content = read_torch(shards[number])
                digests[number] = content.digest
                for name, tensor in content.tensors.items():
                    if name in union:
                        raise TensorError(f"tensor {printable(name)} is in two files of consolidated.{len(parts):02d}")
                    union[name] = tensor_at(name, tensor.dtype, tensor.shape, number, tensor.begin)
            parts.append(union)
            archives.append(content.archive)
        assembled = assemble(parts, params)
        check_parts(parts, archives, shards)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    tensors = TensorTable()
    for name, whole in assembled.items():
        first = whole.pieces[0]
        tensors.add(name, whole.dtype, whole.shape, first.shard, first.begin)
    notes = _links_out(folder, [shard.path.name for shard in shards])
    return Index(folder, params, shards, tensors, digests, assembled, notes=notes)


def source_files(index: Index) -> tuple[SourceFile, ...]:
    """Identity of every shard: its size and a hash of its header, which fixes where every tensor lies."""
    numbered = enumerate(index.shards)
    return tuple(SourceFile(index.name_of(s), s.size, index.digests.get(number) or s.header_hash()) for number, s in numbered)


def description_size(root: Path) -> int:
    """Bytes of the index file and of all headers of a folder, as far as they can be read."""
    total = file_size(root / WEIGHT_MAP)
    for path in root.glob("*.safetensors") if os.path.isdir(root) else [root]:
        with contextlib.suppress(OSError, CheckpointError):
            fd = open_regular(path)
            try:
                total += min(int.from_bytes(os.pread(fd, 8, 0), "little"), MAX_HEADER)
            finally:
                os.close(fd)
    return total


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like this one, if any is; quick even among hundreds of thousands."""
    import difflib

    # It is slow: it sees only the names of nearly the same length that share the most pieces.
    pieces = set(name.split("."))
    close = (other for other in names if abs(len(other) - len(name)) <= 8)
    best = heapq.nlargest(50, close, key=lambda other: len(pieces.intersection(other.split("."))))
    similar = difflib.get_close_matches(name[:300], [other[:300] for other in best], n=1)
    return next((other for other in best if similar and other[:300] == similar[0]), None)


def read_tensors(shards: Sequence[Shard], weight_map: dict[str, str] | None, digests: dict[int, str]) -> tuple[TensorTable, frozenset[str]]:
    """What the headers of the files say, checked against the index file if there is one.

    Args:
        weight_map: what the index file says; the names of the tensors that were found are taken out.

    Returns:
        the tensors, and the names that the index file does not list.
    """
    table, unlisted = TensorTable(), set[str]()
    if len(shards) > MAX_FILES:
        raise CheckpointError(f"the checkpoint has {len(shards)} weight files, above streamconv's own limit of {MAX_FILES}")
    for number, shard in enumerate(shards):
        file = shard.path.name
        names, forms, form, begins = _held(shard, number, digests)
        places = [None] * len(names) if weight_map is None else [weight_map.pop(name, None) for name in names]  # each name is kept once
        if table.holds_any(names) or not {None, file}.issuperset(places):
            for name, place in zip(names, places, strict=True):
                first = shards[table[name].shard].path.name if name in table else None
                listed = first if first is not None and weight_map is not None and name not in unlisted else place
                if listed not in (None, file):
                    where = f"the index file places it in {printable(listed)}"
                    raise TensorError(f"tensor {printable(name)} is in {printable(file)}, but {where}")
                if first is not None:
                    raise TensorError(f"tensor {printable(name)} is in two files, {printable(first)} and {printable(file)}")
        if weight_map is not None and None in places:
            unlisted.update(name for name, place in zip(names, places, strict=True) if place is None)
        table.extend(names, forms, form, begins, number)
        if len(table) > MAX_TENSORS:
            raise CheckpointError(f"the checkpoint has over {MAX_TENSORS} tensors, which is streamconv's own limit")
    return table, frozenset(unlisted)


def _held(
    shard: Shard, number: int, digests: dict[int, str]
) -> tuple[list[str], Sequence[tuple[DType, tuple[int, ...]]], Sequence[int], Sequence[int]]:
    """Names, forms, the form of each and where it begins of the tensors of one file, whatever its format; see `Header`."""
    if shard.path.suffix in _TORCH:
        from streamconv.checkpoint.torch_zip import read_torch

        content = read_torch(shard)
        digests[number] = content.digest
        tensors = content.tensors.values()
        forms = [(tensor.dtype, tensor.shape) for tensor in tensors]
        return [*content.tensors], forms, range(len(tensors)), [tensor.begin for tensor in tensors]
    header = shard.header()
    return header.names, header.forms, header.form, header.begins[:-1]


def _links_out(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """A note on weight files that are links out of the folder, other than those of the Hub's cache into its blobs/."""
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    links = {name: Path(os.path.realpath(folder / name)) for name in names if os.path.islink(folder / name)}
    out = {name: real for name, real in links.items() if home not in real.parents and real.parent != blobs}
    if not out:
        return ()
    name, real = next(iter(out.items()))
    more = f" (and {len(out) - 1} more files are links out of the folder)" if len(out) > 1 else ""
    return (f"{printable(name)} is a link to {printable(real)}{more}",)
