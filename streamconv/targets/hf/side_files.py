"""What goes with the weights: tokenizer, chat template, generation config, custom code, licence."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamconv.checkpoint.index import Beside, Index
from streamconv.errors import CheckpointError, printable
from streamconv.planning.plan import SideFile

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".npz", ".tflite", ".index.json",
)  # fmt: skip
_MADE = ("config.json", "streamconv.json")
"""What the output has of its own."""
OLD = ("hf_quant_config.json", "quantization_config.json", "quantize_config.json", "quant_config.json")
"""Statements of how the source is quantized."""
_MOST_FILES, _MOST_BYTES, _LARGEST = 2000, 1 << 30, 256 << 20
_SHOWN = 5


def side_files(index: Index, keep: Sequence[str] = ()) -> tuple[list[SideFile], list[str]]:
    """Copies of everything at the top of the source beside the weights, by name; and warnings of what is left out.

    Weights of other formats, statements of an older quantization and hidden files are not copied.

    Args:
        keep: of OLD, those that stay true.

    Raises:
        CheckpointError: there are so many files that this is no model's folder.
    """
    found, left = list[Beside](), list[str]()
    left_out = {*_MADE, *OLD} - {*keep}
    for file in _listed(index):
        if file.name in left_out or file.name.endswith(_WEIGHTS) or any(part.startswith(".") for part in file.name.split("/")):
            continue
        if "/" in file.name or file.size > _LARGEST or not _utf8(file.name) or _leads_out(file.path, index.root):
            left.append(file.name)
        else:
            found.append(file)
    total = sum(file.size for file in found)
    if len(found) > _MOST_FILES or total > _MOST_BYTES:
        raise CheckpointError(
            f"{printable(str(index.root))} holds {len(found)} files beside its weights, {total} bytes",
            hint="put the model into a folder of its own",
        )
    copies = [SideFile(file.name, file.size, None, file.path, file.fetch) for file in sorted(found, key=lambda file: file.name)]
    if not left:
        return copies, []
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    names = ", ".join(printable(name) for name in sorted(left)[:_SHOWN])
    why = f"in folders, larger than {_LARGEST >> 20} MiB, links out of the model, or names that are not UTF-8"
    return copies, [f"not copied ({why}): {names}{more}"]


def _utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _leads_out(path: Path, root: Path) -> bool:
    """Whether a link ends outside of the model; the Hub's cache, whose files all are links to its blobs, is the model."""
    if not path.is_symlink():
        return False
    top, end = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    homes = [top if top.is_dir() else top.parent]
    homes += [home.parent.parent / "blobs" for home in homes if home.parent.name == "snapshots"]
    return not any(end.is_relative_to(home) for home in homes)


def _listed(index: Index) -> Iterator[Beside]:
    """Every file of a source."""
    if index.beside is not None:
        yield from index.beside
        return
    top, seen = index.root if index.root.is_dir() else index.root.parent, 0
    for place, folders, names in os.walk(top):
        # a model or an output in the source's folder is not of the source
        other = place != str(top) and not {*_MADE}.isdisjoint(names)
        folders[:] = [] if other else sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in () if other else sorted(names):
            path = Path(place, name)
            if path.is_file():  # also through a link, as in the Hub's cache
                seen += 1
                yield Beside(path.relative_to(top).as_posix(), path, path.stat().st_size)
        if seen > 10 * _MOST_FILES:
            return
