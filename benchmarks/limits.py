"""CPU seconds and peak memory of the worst input known: hostile files, and sources of 200,000 tensors.

    python benchmarks/limits.py [PART OF A NAME]

Each in a process of its own; the seconds are those after the imports, but of `streamconv plan` all.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from streamconv.checkpoint.dtypes import F16  # noqa: E402
from streamconv.checkpoint.index import nearest  # noqa: E402
from tests.fuzz import hostile  # noqa: E402
from tests.headers import build_header  # noqa: E402
from tests.unit.test_plan_scale import TENSORS, write_many  # noqa: E402

MANY = 200_000


def show(name: str, seconds: float, peak: int | None = None) -> None:
    print(f"{name:<70} {seconds:7.2f} s {'' if peak is None else f'{peak >> 20:6} MiB'}", flush=True)


def read(name: str, kind: str, path: Path) -> None:
    """Through tests/fuzz/child.py."""
    command = [sys.executable, "-m", "tests.fuzz.child", kind, str(path)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout.splitlines()[-1])
    show(name, told["seconds"], told["peak"])


def header(folder: Path) -> None:
    entries = [(f"model.layers.{n // 3000}.mlp.experts.{n // 3}.{n % 3}_proj.weight", F16, (1, 1)) for n in range(MANY)]
    made, places = build_header(entries)
    path = folder / "x.safetensors"
    path.write_bytes(made)
    with open(path, "r+b") as file:
        file.truncate(max(end for _, end in places.values()))
    read(f"header: {MANY:,} tensors", "header", path)


def plan(folder: Path) -> None:
    model = write_many(folder)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "streamconv", "plan", str(model), "--json", "--device", "cpu", "--memory-budget", "2GiB"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    show(f"streamconv plan: {TENSORS:,} tensors", after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def name_like(_: Path) -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(MANY // 1000) for j in range(1000)]
    began = time.process_time()
    nearest("model.layers.7.mlp.experts.33.up_projj.weight", names)
    show(f"the nearest of {MANY:,} names", time.process_time() - began)


def main(wanted: str) -> None:
    for kind, name, make, _ in hostile.CASES:
        if wanted in f"{kind}: {name}":
            with tempfile.TemporaryDirectory() as folder:
                read(f"{kind}: {name}", kind, hostile.write(Path(folder), kind, make))
    for name, measure in {"header": header, "plan": plan, "nearest": name_like}.items():
        if wanted in name:
            with tempfile.TemporaryDirectory() as folder:
                measure(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
