"""What goes with the weights: tokenizer, chat template, generation config, custom code, licence."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamconv.checkpoint.index import Beside, Index
from streamconv.errors import CheckpointError, few, printable
from streamconv.planning.plan import SideFile

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".npz", ".tflite", ".index.json",
)  # fmt: skip
_MADE = ("config.json", "streamconv.json")
"""What the output has of its own."""
OLD = ("hf_quant_config.json", "quantization_config.json", "quantize_config.json", "quant_config.json")
"""Statements of how the source is quantized."""
NO_FILE = -1
_MOST_FILES, _MOST_BYTES, _LARGEST = 2000, 1 << 30, 256 << 20
_SHOWN = 5
_ELSEWHERE = f"in folders, larger than {_LARGEST >> 20} MiB, links out of the model, or names that are not UTF-8"
_HIDDEN = "hidden"
_ODD = "no regular files: links that lead nowhere, pipes, sockets, devices"


def side_files(index: Index, keep: Sequence[str] = ()) -> tuple[list[SideFile], list[str]]:
    """Copies of everything at the top of the source beside the weights, by name; and warnings of what is left out.

    Weights of other formats and statements of an older quantization are not copied, and neither is what git keeps for itself.

    Args:
        keep: of OLD, those that stay true.

    Raises:
        CheckpointError: there are so many files that this is no model's folder.
    """
    taken, left = list[Beside](), dict[str, list[str]]()
    left_out = {*_MADE, *OLD} - {*keep}
    for file in _listed(index):
        if file.name in left_out or file.name.endswith(_WEIGHTS) or file.name.startswith(".git"):
            continue
        why = _left(file, index.root)
        if why:
            left.setdefault(why, []).append(file.name)
        else:
            taken.append(file)
    total = sum(file.size for file in taken)
    if len(taken) > _MOST_FILES or total > _MOST_BYTES:
        raise CheckpointError(
            f"{printable(index.root)} holds {len(taken)} files beside its weights, {total} bytes",
            hint="put the model into a folder of its own",
        )
    copies = [SideFile(file.name, file.size, None, file.path, file.fetch) for file in sorted(taken, key=lambda file: file.name)]
    lists = {why: few([printable(name) for name in sorted(left[why])], _SHOWN) for why in (_ELSEWHERE, _HIDDEN, _ODD) if why in left}
    return copies, [f"not copied ({why}): {names}" for why, names in lists.items()]


def _left(file: Beside, root: Path) -> str:
    """Why a file is left out, "" if it is copied."""
    if any(part.startswith(".") for part in file.name.split("/")):
        return _HIDDEN
    if file.size == NO_FILE:
        return _ODD
    odd = any("\ud800" <= letter <= "\udfff" for letter in file.name)  # no UTF-8
    return _ELSEWHERE if "/" in file.name or file.size > _LARGEST or odd or _leads_out(file.path, root) else ""


def _leads_out(path: Path, root: Path) -> bool:
    """Whether a link ends outside of the model; the Hub's cache, whose files all are links to its blobs, is the model."""
    if not os.path.islink(path):
        return False
    top, end = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    homes = [top if os.path.isdir(top) else top.parent]
    homes += [home.parent.parent / "blobs" for home in homes if home.parent.name == "snapshots"]
    return not any(end.is_relative_to(home) for home in homes)


def _listed(index: Index) -> Iterator[Beside]:
    """Everything of a source that is no folder; what is no regular file has the size NO_FILE."""
    if index.beside is not None:
        yield from index.beside
        return
    top, seen = index.root if os.path.isdir(index.root) else index.root.parent, 0
    for place, folders, names in os.walk(top):
        # a model or an output in the source's folder is not of the source
        other = place != str(top) and not {*_MADE}.isdisjoint(names)
        folders[:] = [] if other else sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in () if other else sorted(names):
            path = Path(place, name)
            seen += 1  # links count as what they lead to: the Hub's cache is made of them
            yield Beside(path.relative_to(top).as_posix(), path, path.stat().st_size if os.path.isfile(path) else NO_FILE)
        if seen > 10 * _MOST_FILES:
            return
