"""A model large enough to fill tiles, its right answers, and a process that holds device memory."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from streamconv import api
from streamconv.memory import GIB
from streamconv.options import Resources
from streamconv.targets.trtllm.options import TensorRTLLM

INT8 = TensorRTLLM(quant="int8", target_sm=80, tp_size=2)

HOLDER = """
import sys, time, torch
free = torch.cuda.mem_get_info()[0]
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def wide(folder: Path, hidden: int = 2048, inter: int = 4096) -> Path:
    """Two layers of 84 MB in all."""
    from tests import tiny

    random = np.random.default_rng(3)
    shapes = {}
    for name, value in tiny.tensors().items():
        shape = tuple({tiny.HIDDEN: hidden, tiny.INTER: inter, tiny.KV * 32: hidden // 2}.get(size, size) for size in value.shape)
        shapes[name] = shape
    made = {name: random.standard_normal(shape, np.float32).astype(np.float16) / 32 for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    import json

    (folder / "config.json").write_text(json.dumps(tiny.config(hidden_size=hidden, intermediate_size=inter)))
    return folder


def convert(model: Path, out: Path, device: str, options: TensorRTLLM = INT8, **more: object) -> api.Report:
    return api.convert(model, out, options, Resources(memory_budget=3 * GIB, device=device, **more))  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != "streamconv.json"}


@contextlib.contextmanager
def somebody(leaves: int) -> Iterator[None]:
    """Another process that holds all but `leaves` bytes of the device's free memory."""
    command = [sys.executable, "-c", HOLDER, str(leaves)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield
        finally:
            process.stdin.close()
            process.wait(60)
