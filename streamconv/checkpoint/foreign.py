"""Folders that hold something else than a model's weights: what it is, and the way to a model that can be read."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from streamconv.checkpoint.limits import MAX_CONFIG
from streamconv.checkpoint.untrusted import read_json
from streamconv.errors import CheckpointError, printable

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.", "adapter_model-", "adapters.")
"""Beginnings of the names of files that hold an adapter alone."""

MERGE = "merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED)"
_FORMATS = {
    (".gguf", ".ggml"): ("a GGUF file of llama.cpp", "convert the model that it was made from; the Hub has most without -GGUF in the name"),
    (".onnx",): ("an ONNX graph", "convert the Hugging Face model that it was exported from"),
    (".h5", ".msgpack"): ("a TensorFlow or Flax file", "save it as safetensors with transformers first"),
    (".nemo",): ("a NeMo archive", "export it to Hugging Face first"),
    (".distcp",): ("a distributed PyTorch checkpoint", "consolidate it first: accelerate merge-weights FOLDER MERGED"),
    (".engine",): ("a TensorRT engine", "engines are built from checkpoints, not the other way round"),
}


def foreign(shown: str, present: Collection[str], folder: Path | None = None) -> CheckpointError | None:
    """What a place without weights holds instead, None if that is not known.

    Args:
        shown: the place, for the message.
        present: names of its files.
        folder: where they are, None if they are not on this machine.
    """
    if ADAPTER_CONFIG in present:
        return CheckpointError(f"{shown} is a LoRA adapter{_base(folder)}, not a model", hint=MERGE)
    if any(name.startswith(ADAPTER_WEIGHTS) for name in present):
        return CheckpointError(f"{shown} holds an adapter's weights alone, not a model's", hint=MERGE)
    for name in sorted(present):
        for ends, (what, way_out) in _FORMATS.items():
            if name.lower().endswith(ends):
                return CheckpointError(f"{printable(name)} in {shown} is {what}, which is not read", hint=way_out)
    return None


def _base(folder: Path | None) -> str:
    """ " for ORG/NAME", if the adapter says so."""
    with contextlib.suppress(CheckpointError):
        if folder is not None:
            base = read_json(folder / ADAPTER_CONFIG, MAX_CONFIG).get("base_model_name_or_path")
            return f" for {printable(base)}" if isinstance(base, str) and base else ""
    return ""


def unmerged(names: Collection[str]) -> str | None:
    """A tensor name that only a model with a LoRA adapter beside its weights has."""
    return next((name for name in names if ".lora_" in name or ".base_layer." in name), None)
