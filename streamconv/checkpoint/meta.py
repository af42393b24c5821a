"""Meta checkpoints: params.json and consolidated.NN.pth, each tensor cut over F files.

Whatever F and the ranks wanted are, a tensor is the assembled whole: its pieces lie one above the other (axis 0) or side by
side (axis 1), and are never copied together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.untrusted import names_in
from streamconv.errors import CheckpointError, TensorError, printable

PARAMS = "params.json"
_FILE = re.compile(r"consolidated\.([0-9]{2})(\.pth)?")
_PART = re.compile(r"consolidated-.*\.pth")
_SAMPLE, _SAMPLED = 4096, 16
"""Bytes of a weight, and weights of a file, that tell it from a copy of another."""


FileTensors = Mapping[str, SourceTensor]
"""What one of Meta's F files holds, by name."""


def is_meta(folder: Path) -> bool:
    """Whether a folder is a Meta checkpoint; consolidated.*.safetensors of other makers are none."""
    return os.path.lexists(folder / PARAMS) and bool(_numbered(folder))


def _numbered(folder: Path) -> dict[int, list[str]]:
    numbered: dict[int, list[str]] = {}
    for name in sorted(names_in(folder)):
        known = _FILE.fullmatch(name)
        if known and (known[2] or os.path.isdir(folder / name)):
            numbered.setdefault(int(known[1]), []).append(name)
    return numbered


def meta_files(folder: Path) -> list[list[str]]:
    """For each of Meta's F files, in order, the files (relative to the folder) that hold it: one, or a split directory's.

    Raises:
        CheckpointError: a number is missing or there twice.
    """
    numbered = _numbered(folder)
    shown = printable(folder)
    files = []
    for number in range(max(numbered, default=-1) + 1):
        names = numbered.get(number, [])
        if len(names) != 1:
            what = "missing file" if not names else "both a file and a folder"
            raise CheckpointError(f"{shown}: {what} consolidated.{number:02d}.pth", hint="is the download complete?")
        if names[0].endswith(".pth"):
            files.append(names)
            continue
        parts = sorted(name for name in names_in(folder / names[0]) if _PART.fullmatch(name))
        if not parts:
            raise CheckpointError(f"{shown}: the folder {names[0]} holds no consolidated-*.pth")
        files.append([f"{names[0]}/{part}" for part in parts])
    return files


def assemble(files: Sequence[FileTensors], params: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """Every tensor as one, in the order of the first file.

    Args:
        files: Meta's F files, in order.
        params: params.json, for the number of tokens.

    Raises:
        TensorError: a file lacks a tensor that others hold, or shapes or dtypes do not fit together.
    """
    for number, file in enumerate(files):
        for other in files:
            lacking = next((name for name in other if name not in file), None)
            if lacking is not None:
                raise TensorError(f"tensor {printable(lacking)} is not in consolidated.{number:02d}, but in other files")
    vocab = _vocabulary(files, params)
    return {name: _join(name, [file[name] for file in files], vocab) for name in files[0]}


def check_parts(files: Sequence[FileTensors], archives: Sequence[str], shards: Sequence[Shard]) -> None:
    """Meta's F files are the parts of one checkpoint, each in its place, as far as that shows without reading weights.

    Args:
        archives: the name that each was saved under.

    Raises:
        CheckpointError: what every file holds whole differs, two files begin with the same weights, or files were exchanged.
    """
    names = [f"consolidated.{number:02d}" for number in range(len(files))]
    if sorted(archives) == names and list(archives) != names:
        odd = next(number for number, archive in enumerate(archives) if archive != names[number])
        raise CheckpointError(f"{names[odd]}.pth was saved as {archives[odd]}.pth", hint="give the files their own names again")

    def begins(number: int, name: str, most: int) -> bytes:
        (piece,) = files[number][name].pieces
        with shards[piece.shard].window(piece.begin, piece.begin + min(files[number][name].nbytes, most)) as data:
            return bytes(data)

    cut = [name for name, tensor in files[0].items() if len(tensor.shape) > 1][:_SAMPLED]
    begin_of = [tuple(begins(number, name, _SAMPLE) for name in cut) for number in range(len(files))]
    for number in range(1, len(files)):
        for name, tensor in files[0].items():
            if len(tensor.shape) < 2 and begins(number, name, tensor.nbytes) != begins(0, name, tensor.nbytes):
                problem = f"{printable(name)} differs between {names[0]}.pth and {names[number]}.pth"
                raise CheckpointError(problem, hint="they are parts of different checkpoints, or one is damaged")
        first = begin_of.index(begin_of[number])
        if first < number and any(data.strip(data[:1]) for data in begin_of[number]):  # a constant says nothing
            raise CheckpointError(f"{names[number]}.pth holds the weights of {names[first]}.pth", hint="download it again")


def output_rows(tensors: Mapping[str, SourceTensor]) -> int | None:
    """Rows of the output matrix: the number of tokens where params.json states none."""
    output = tensors.get("output.weight")
    return output.shape[0] if output is not None and output.shape else None


def _vocabulary(files: Sequence[FileTensors], params: Mapping[str, Any]) -> int:
    size = params.get("vocab_size", -1)
    if type(size) is int and size > 0:
        return size
    return sum(file["output.weight"].rows for file in files if "output.weight" in file)


def _axis(name: str, shapes: list[tuple[int, ...]], vocab: int) -> int | None:
    """How Meta cuts this tensor; None if every file holds all of it."""
    if len(shapes[0]) < 2:
        return None
    if name.endswith((".attention.wo.weight", ".feed_forward.w2.weight")):
        return 1
    if name == "tok_embeddings.weight":
        if shapes[0][0] * len(shapes) == vocab:
            return 0  # Llama 3 cuts the tokens,
        return 1 if shapes[0][0] == vocab else 0  # Llama 1 and 2 the columns
    return 0


def _join(name: str, parts: list[SourceTensor], vocab: int) -> SourceTensor:
    first = parts[0]
    shapes = [tensor.shape for tensor in parts]
    axis = _axis(name, shapes, vocab)
    for number, tensor in enumerate(parts):
        shape = tensor.shape
        if axis is None:
            fits = shape == first.shape
        else:
            fits = len(shape) == len(first.shape) == 2 and shape[1 - axis] == first.shape[1 - axis]
        if tensor.dtype != first.dtype or not fits:
            raise TensorError(
                f"{printable(name)}: {tensor.dtype} {list(shape)} in consolidated.{number:02d} does not fit"
                f" {first.dtype} {list(first.shape)} in consolidated.00"
            )
    if axis is None:
        return first
    whole = list(first.shape)
    whole[axis] = sum(shape[axis] for shape in shapes)
    return SourceTensor(name, first.dtype, tuple(whole), tuple(tensor.pieces[0] for tensor in parts), axis)
