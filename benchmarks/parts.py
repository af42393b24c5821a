"""Two workers of one core each against one run of two: how much of its speed they reach together. Rounds are paired, in turns.

    python -m benchmarks.parts MODEL --out FOLDER --quant int8
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))[:2]


def _command(model: Path, out: Path, quant: str, more: list[str]) -> list[str]:
    words = ["convert", str(model), str(out), "--quant", quant, "--target-sm", "80"]
    return [sys.executable, "-m", "streamconv", *words, "--memory-budget", "1GiB", "--device", "cpu", "--quiet", *more]


def _timed(out: Path, commands: list[tuple[list[int], list[str]]]) -> float:
    """Seconds until all processes, each on its cores, have ended."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    started = []
    for cores, command in commands:
        os.sched_setaffinity(0, cores)
        started.append(subprocess.Popen(command))
    os.sched_setaffinity(0, CORES)
    if any(process.wait() for process in started):
        raise SystemExit("a run failed")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    out = given.out / "out"
    one = [(CORES, _command(given.model, out, given.quant, ["--workers", "2"]))]
    two = [([core], _command(given.model, out, given.quant, ["--workers", "1", "--parts", str(given.parts)])) for core in CORES]
    _timed(out, one)  # the kernels' cache, and the page cache
    shares = []
    for _ in range(given.rounds):
        alone, together = _timed(out, one), _timed(out, two)
        shares.append(alone / together)
        print(f"one run {alone:.2f} s, two workers {together:.2f} s: {shares[-1]:.3f}", flush=True)
    shutil.rmtree(out)
    print(f"median {statistics.median(shares):.3f} of the speed of one run; {given.parts} parts, {given.quant}")


if __name__ == "__main__":
    main()
