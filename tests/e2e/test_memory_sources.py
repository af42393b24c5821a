"""PyTorch .bin and Meta sources are streamed too: a model larger than the group's memory passes through it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cgroup import why_not

MIB = 1 << 20


@pytest.mark.parametrize("layout", ["hf-bin", "meta"])
def test_model_larger_than_the_budget(tmp_path: Path, layout: str) -> None:
    reason = why_not()
    if reason:
        pytest.skip(f"no memory cgroup here: {reason}")
    model, out = tmp_path / "model", tmp_path / "out"
    shape = ["--hidden", "1024", "--layers", "1", "--intermediate", "4096", "--vocab", "65536"]
    make = [sys.executable, "benchmarks/make_model.py", "--out", str(model), "--layout", layout, *shape]
    subprocess.run(make, check=True, capture_output=True)
    assert sum(file.stat().st_size for file in model.iterdir()) > 256 * MIB
    convert = [sys.executable, "-m", "streamconv", "convert", str(model), str(out), "--memory-budget", "192MiB", "--quiet"]
    run = [sys.executable, "benchmarks/cgroup.py", "--limit", "192MiB", "--", *convert, "--tp-size", "2"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == 0 and told["oom_kills"] == 0
    assert told["peak_rss"] <= 192 * MIB
