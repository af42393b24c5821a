"""The first run of a format, which compiles its kernels, beside a second one: seconds and peak resident memory of each.

    python -m benchmarks.first_run [--flags '--quant int8 --target-sm 90'] [--runs 3]

Each pair converts a model of a few MB with an empty cache of its own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(words: list[str], cache: Path) -> tuple[float, float]:
    """Seconds and MB resident of a command whose compiled code is kept in `cache`."""
    began = time.perf_counter()
    process = subprocess.Popen(words, env={**os.environ, "XDG_CACHE_HOME": str(cache)})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{shlex.join(words)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", default="--quant int8 --target-sm 90")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    figures: dict[str, list[tuple[float, float]]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as name:
        model = Path(name, "model")
        size = "--hidden 256 --layers 2 --intermediate 512 --heads 4 --kv-heads 2 --vocab 1000 --shards 1"
        maker = Path(__file__).with_name("make_model.py")
        subprocess.run([sys.executable, maker, "--out", model, *size.split()], check=True, stdout=subprocess.DEVNULL)
        for number in range(asked.runs):
            for which, found in figures.items():
                out = Path(name, f"{which}{number}")
                convert = [sys.executable, "-m", "streamconv", "convert", str(model), str(out), *shlex.split(asked.flags), "--quiet"]
                found.append(run(convert, Path(name, f"cache{number}")))
    for which, found in figures.items():
        seconds, memory = zip(*found, strict=True)
        print(f"{which} run: {statistics.median(seconds):.1f} s, {max(memory):.0f} MB (medians of {asked.runs}, largest)")


if __name__ == "__main__":
    main()
