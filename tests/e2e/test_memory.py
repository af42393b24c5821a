"""The memory budget is a ceiling: in a real memory cgroup, with a tensor larger than the whole budget."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cgroup import why_not

MIB = 1 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model whose embedding is 512 MiB."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shape = ["--hidden", "2048", "--layers", "1", "--intermediate", "4096", "--vocab", "131072", "--sparse"]
    subprocess.run([sys.executable, "benchmarks/make_model.py", "--out", str(folder), *shape], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("flags", [[], ["--quant", "int8", "--target-sm", "80", "--tp-size", "4"]], ids=["plain", "int8 tp4"])
def test_tensor_larger_than_the_budget_in_a_cgroup(wide: Path, tmp_path: Path, flags: list[str]) -> None:
    reason = why_not()
    if reason:
        pytest.skip(f"no memory cgroup here: {reason}")
    out = tmp_path / "out"
    convert = [sys.executable, "-m", "streamconv", "convert", str(wide), str(out), "--memory-budget", "256MiB", "--quiet", *flags]
    run = [sys.executable, "benchmarks/cgroup.py", "--limit", "256MiB", "--", *convert]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == 0 and told["oom_kills"] == 0
    assert told["peak_rss"] <= 256 * MIB
    shutil.rmtree(out)


def test_budget_too_small_names_the_smallest_that_works(wide: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamconv", "convert", str(wide), str(tmp_path / "out"), "--json", "--memory-budget", "20MiB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5
    hint = json.loads(done.stdout)["hint"]
    smallest = hint.split()[-1]
    done = subprocess.run([*command[:-1], smallest], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_memory"] <= int(smallest.removesuffix("MiB")) * MIB
    shutil.rmtree(tmp_path / "out")
