"""TensorRT-LLM's own reader over every rank of a checkpoint, where it is installed.

It builds the model from config.json and gives it the rank's tensors, as `trtllm-build` does; it may need a GPU, and holds one rank in
memory.
"""

from __future__ import annotations

import gc
import importlib
from pathlib import Path
from typing import Any

from streamconv.errors import UsageError, VerifyError, printable

COMMAND = "pip install 'streamconv[tensorrt-llm]'"


def read_ranks(folder: Path) -> tuple[str, int, list[str]]:
    """Let TensorRT-LLM read a checkpoint.

    Returns:
        (its version, ranks that it accepted, a line for each that it did not).

    Raises:
        UsageError: it is not installed.
        VerifyError: it cannot be imported, or is a release without the engine workflow.
    """
    package, models, modeling = _load()
    version = str(getattr(package, "__version__", "of unknown version"))
    try:
        table, configs = models.MODEL_MAP, modeling.PretrainedConfig
    except AttributeError as error:
        raise VerifyError(f"tensorrt_llm {version} cannot read engine checkpoints ({error})", hint=COMMAND) from None
    try:
        config = configs.from_json_file(str(folder / "config.json"))
        architecture, world = config.architecture, int(config.mapping.world_size)
    except Exception as error:
        return version, 0, [f"config.json: {_told(version, error)}"]
    if architecture not in table:
        return version, 0, [f"config.json: TensorRT-LLM {version} does not know {printable(architecture)}"]
    accepted, problems = 0, []
    for rank in range(world):
        try:
            model = table[architecture].from_checkpoint(str(folder), rank=rank)
            del model
            accepted += 1
        except Exception as error:
            problems.append(f"rank {rank}: {_told(version, error)}")
        gc.collect()  # its models hold cycles, and the next rank needs the room
    return version, accepted, problems


def _load() -> tuple[Any, Any, Any]:
    package: Any = None
    try:
        package = importlib.import_module("tensorrt_llm")
        return package, importlib.import_module("tensorrt_llm.models"), importlib.import_module("tensorrt_llm.models.modeling_utils")
    except Exception as error:  # missing CUDA or MPI libraries show in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt_llm":
            raise UsageError("--with-tensorrt-llm: tensorrt_llm is not installed", hint=COMMAND) from None
        message = printable(error)
        if package is not None:
            version = getattr(package, "__version__", "of unknown version")
            raise VerifyError(f"tensorrt_llm {version} cannot read engine checkpoints ({message})", hint=COMMAND) from None
        lacking = "it is installed without what it needs" if isinstance(error, ModuleNotFoundError) else "it needs CUDA and MPI libraries"
        raise VerifyError(f"tensorrt_llm cannot be imported: {message}", hint=lacking) from None


def _told(version: str, error: Exception) -> str:
    text = printable(" ".join(str(error).split()), 500)
    return f"TensorRT-LLM {version} refuses it: {type(error).__name__}{': ' * bool(text)}{text}"
