"""Read one hostile thing in a process of its own, and say what came of it, what it took, and whether torch was needed.

    python -m tests.fuzz.child KIND PATH     KIND: header, index, config, torch, or a command of the CLI (inspect, plan)

Prints a JSON line. Seconds are of the CPU, after the imports; the peak is the process's whole.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path

from streamconv import errors, memory

_ENTRIES = {"header": ("header", "read_header"), "index": ("weight_files", "read_weight_map"), "torch": ("torch_zip", "read_torch")}


def main(kind: str, path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a fault must not take the machine down
    if kind in _ENTRIES:
        module, name = _ENTRIES[kind]
        call = getattr(importlib.import_module(f"streamconv.checkpoint.{module}"), name)
        source = importlib.import_module("streamconv.checkpoint.shard").Shard(path) if kind == "torch" else path
        run = lambda: call(source)  # noqa: E731
    elif kind == "config":
        index, config = (importlib.import_module(f"streamconv.checkpoint.{name}") for name in ("index", "model_config"))
        run = lambda: config.from_hf(index.read_json(path, index.MAX_CONFIG))  # noqa: E731
    else:
        command = importlib.import_module("streamconv.cli.main").main
        run = lambda: command([kind, str(path)])  # noqa: E731
    began = time.process_time()
    told: dict[str, object] = {"error": None, "message": ""}
    try:
        result = run()
        told["status"] = result if isinstance(result, int) else 0
    except errors.StreamconvError as error:
        told = {"error": type(error).__name__, "message": str(error)}
    told |= {"seconds": time.process_time() - began, "peak": memory.peak_resident(), "torch": "torch" in sys.modules}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
