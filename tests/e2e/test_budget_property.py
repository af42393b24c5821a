"""What `plan` accepts, `convert` does within its budget: the smallest budget that is accepted, over shapes, ranks and formats.

Each conversion runs in a process of its own with just that budget, and in a memory cgroup of just that size where one can be made.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cgroup import why_not
from tests import tiny

MIB = 1 << 20
STREAMCONV = [sys.executable, "-m", "streamconv"]
INT8 = ["--quant", "int8", "--target-sm", "80"]


def told(*command: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([*STREAMCONV, *command, "--json"], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def smallest(model: Path, flags: list[str], first: int = 30) -> int:
    """MiB of the smallest budget that `plan` accepts: the one that its hint names, which must then be accepted."""
    status, answer = told("plan", str(model), "--memory-budget", f"{first}MiB", *flags)
    if status == 0:
        return first
    assert status == 5, answer
    hinted = int(re.findall(r"([0-9]+)MiB", answer["hint"])[0])
    status, answer = told("plan", str(model), "--memory-budget", f"{hinted}MiB", *flags)
    assert status == 0, f"{hinted} MiB were hinted, and then: {answer}"
    return hinted


def sparse(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: str = "F16", size: int = 2) -> Path:
    """A model whose weights are holes, in one file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder


def llama(folder: Path, layers: int, hidden: int, inter: int, heads: int, vocab: int = 256, dtype: str = "F16", size: int = 2) -> Path:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {at + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {at + f"mlp.{name}_proj.weight": (inter, hidden) for name in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (hidden, inter)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inter, "vocab_size": vocab}
    return sparse(folder, tiny.config(**sizes, num_attention_heads=heads, num_key_value_heads=heads), shapes, dtype, size)


GRID: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "tiny": (lambda at: llama(at, 2, 128, 256, 4), []),
    "tiny, int8, tp 4": (lambda at: llama(at, 2, 256, 512, 4), [*INT8, "--tp-size", "4"]),
    "many tensors": (lambda at: llama(at, 1500, 64, 64, 4), []),
    "many tensors, tp 4": (lambda at: llama(at, 300, 64, 64, 4), ["--tp-size", "4"]),
    "tp 64": (lambda at: llama(at, 8, 1024, 1024, 64), ["--tp-size", "64"]),
    "many tensors, fp8": (lambda at: llama(at, 300, 64, 64, 4), ["--quant", "fp8_rowwise"]),
    "rows of 6 million columns, cast": (lambda at: llama(at, 1, 4, 6_000_000, 1), ["--dtype", "bfloat16"]),
    "rows of 6 million columns, float32": (lambda at: llama(at, 1, 4, 6_000_000, 1, dtype="F32", size=4), []),
    "rows of half a million columns, int8": (lambda at: llama(at, 1, 64, 500_032, 1), INT8),
}


QUICK = ("tiny, int8, tp 4", "rows of half a million columns, int8")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in GRID])
def test_the_smallest_budget_that_plan_accepts_is_kept(name: str, tmp_path: Path) -> None:
    make, flags = GRID[name]
    model, out = make(tmp_path / "model"), tmp_path / "out"
    budget = smallest(model, flags)
    status, answer = told("convert", str(model), str(out), "--memory-budget", f"{budget}MiB", *flags)
    assert status == 0, answer
    assert answer["peak_memory"] <= budget * MIB
    shutil.rmtree(out)
    if why_not():
        return
    convert = [*STREAMCONV, "convert", str(model), str(out), "--memory-budget", f"{budget}MiB", "--quiet", *flags]
    run = [sys.executable, "benchmarks/cgroup.py", "--limit", f"{budget}MiB", "--", *convert]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["status"] == 0 and seen["oom_kills"] == 0 and seen["peak_rss"] <= budget * MIB


def test_planning_a_huge_header_stops_before_it_breaks_the_budget(tmp_path: Path) -> None:
    """In a group of just the budget: exit 5 and not a kill; the budget that the hint names is enough."""
    model = llama(tmp_path / "model", 14_000, 64, 64, 4)
    status, answer = told("plan", str(model), "--memory-budget", "60MiB")
    assert status == 5 and "cannot work" in answer["message"]
    assert smallest(model, [], 60) > 60
    if why_not():
        pytest.skip(f"no memory cgroup here: {why_not()}")
    plan = [*STREAMCONV, "plan", str(model), "--memory-budget", "60MiB"]
    done = subprocess.run([sys.executable, "benchmarks/cgroup.py", "--limit", "60MiB", "--", *plan], capture_output=True, text=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["status"] == 5 and seen["oom_kills"] == 0
