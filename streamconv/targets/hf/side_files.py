"""What goes with the weights: tokenizer, chat template, generation config, custom code, licence; and the model card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from streamconv.checkpoint.index import Index
from streamconv.errors import CheckpointError, printable
from streamconv.planning.plan import SideFile

if TYPE_CHECKING:
    from streamconv.targets.hf.target import HuggingFace

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".npz", ".tflite", ".index.json",
)  # fmt: skip
_LEFT = ("config.json", "hf_quant_config.json", "quantization_config.json", "quantize_config.json", "quant_config.json", "streamconv.json")
_MOST_FILES, _MOST_BYTES = 2000, 1 << 30


def side_files(index: Index, target: HuggingFace, quantized: int) -> list[SideFile]:
    """Copies of everything beside the weights, in order of their paths.

    Weights of other formats, statements of an older quantization and hidden files are not copied.
    """
    folder = index.root if index.root.is_dir() else index.root.parent
    found = []
    for path in _listed(folder):
        name = path.relative_to(folder).as_posix()
        if name in _LEFT or name.endswith(_WEIGHTS):
            continue
        found.append(SideFile(name, path.stat().st_size, None, path))
    if len(found) > _MOST_FILES or sum(file.size for file in found) > _MOST_BYTES:
        raise CheckpointError(
            f"{printable(str(folder))} holds {len(found)} files beside its weights, {sum(file.size for file in found)} bytes",
            hint="put the model into a folder of its own",
        )
    return found


def _listed(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        found += [Path(place) / name for name in sorted(names) if not name.startswith(".")]
        if len(found) > 10 * _MOST_FILES:
            break
    return [path for path in found if path.is_file()]
