"""Which files of a checkpoint hold its weights: the index file, and what counts where it and the files disagree."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from streamconv.checkpoint.foreign import ADAPTER_WEIGHTS
from streamconv.checkpoint.limits import MAX_FILES, MAX_WEIGHT_MAP
from streamconv.checkpoint.untrusted import read_json
from streamconv.errors import CheckpointError, printable

WEIGHT_MAP = "model.safetensors.index.json"
TORCH_WEIGHT_MAP = "pytorch_model.bin.index.json"
_WHOLE = {WEIGHT_MAP: "model.safetensors", TORCH_WEIGHT_MAP: "pytorch_model.bin"}


def read_weight_map(path: Path, present: Collection[str] | None = None) -> dict[str, str]:
    """An index file: tensor name -> file name.

    Args:
        present: the files that there are; None looks into the folder of the index file.

    Raises:
        CheckpointError: it is no index, or names a file that is not there or not part of this checkpoint.
        TensorError: a tensor is listed twice.
    """
    listed, shown = _weight_map(path), printable(path)
    for name in sorted(set(listed.values())):
        if present is None and not os.path.lexists(path.parent / name):
            raise CheckpointError(f"missing file {printable(name)}, named in {shown}", hint="is the download complete?")
        if present is None and not os.path.exists(path.parent / name):
            raise CheckpointError(f"{printable(name)}, named in {shown}, is a broken link", hint="is the download complete?")
        if present is not None and name not in present:
            raise CheckpointError(f"missing file {printable(name)}, named in {shown}", hint="is the upload complete?")
    return listed


def _weight_map(path: Path) -> dict[str, str]:
    shown = printable(path)
    listed = read_json(path, MAX_WEIGHT_MAP, unique=True).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{shown} has no weight_map")
    if not all(isinstance(value, str) for value in listed.values()):
        raise CheckpointError(f"{shown}: weight_map must map tensor names to file names")
    files = set(listed.values())
    if len(files) > MAX_FILES:
        raise CheckpointError(f"{shown} names {len(files)} files, above streamconv's own limit of {MAX_FILES}")
    for name in sorted(files):
        _check_plain(name, shown)
    shared = {name: name for name in files}
    return {tensor: shared[file] for tensor, file in listed.items()}  # one string for each file, not for each tensor


def _check_plain(name: str, index: str) -> None:
    """A file name from an index file must be a plain name of the right kind."""
    shown = printable(name)
    plain = name not in ("", ".", "..") and not any(mark in name for mark in "/\\:")
    if not plain or any(ord(letter) < 32 for letter in name) or len(name.encode(errors="replace")) > 255:
        raise CheckpointError(f"{index} names the file {shown}, which is not a plain file name")
    ending = ".bin" if index.endswith(TORCH_WEIGHT_MAP) else ".safetensors"
    if not name.endswith(ending):
        raise CheckpointError(f"{index} names the file {shown}, which is not a {ending} file")


class Choice(NamedTuple):
    """The weight files of a source.

    Attributes:
        weight_map: what the index file says, None without one.
        notes: which files are not read, and why.
    """

    names: list[str]
    weight_map: dict[str, str] | None = None
    notes: tuple[str, ...] = ()


def choose(present: Collection[str], path_of: Callable[[str], Path], remote: Collection[str] | None = None) -> Choice:
    """Which of these files hold the weights: as transformers, model.safetensors before shards and their index file.

    Args:
        present: names of all files.
        path_of: gives a small file's path.
        remote: as `present` of `read_weight_map`.

    Raises:
        CheckpointError, TensorError: see read_weight_map.
    """
    names = weight_files(present)
    listed = WEIGHT_MAP if not names or names[0].endswith(".safetensors") else TORCH_WEIGHT_MAP
    if not names and listed not in present:
        listed = TORCH_WEIGHT_MAP
    whole = _WHOLE[listed]
    if listed in present and (whole not in names or whole in _weight_map(path_of(listed)).values()):
        weight_map = read_weight_map(path_of(listed), remote)
        read, why = sorted(set(weight_map.values())), "the index file names {} other file{}, which are read"
    else:
        weight_map, read, why = None, [whole] if whole in names else names, f"{whole} is read, as transformers does"
    unused = [name for name in names if name not in read]
    if weight_map is None and listed in present:
        unused.append(listed)
    if not unused:
        return Choice(read, weight_map)
    more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    because = why.format(len(read), "s" * (len(read) != 1))
    return Choice(read, weight_map, (f"{printable(unused[0])}{more} in the source is not used: {because}",))


def weight_files(present: Iterable[str]) -> list[str]:
    """The weight files among those of a folder: safetensors, if there are none PyTorch's."""
    names = sorted(present)
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith((".", *ADAPTER_WEIGHTS))]
    weights = [name for name in weights if not name.endswith((".ranges.safetensors", ".int4.safetensors"))]  # of an output below the source
    # Mistral's repositories hold the same weights twice, once under Meta's names in consolidated*.safetensors.
    weights = [name for name in weights if not name.startswith("consolidated")] or weights
    return weights or [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
