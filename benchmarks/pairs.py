"""Commands in turn, each round once: seconds until the data is on the disk, processor time and memory, and the ratios to the first one.

    python -m benchmarks.pairs --rounds 7 \\
        'streamconv convert MODEL {out} --quant int8 --target-sm 90' \\
        'streamconv convert MODEL {out} --quant int8 --target-sm 90 --verify inline' 'cp -r MODEL {out}'
    python -m benchmarks.pairs --rounds 21 'streamconv --help' 'streamconv-convert-checkpoint --help'

{out} is a fresh name in --work for each run. --cold MODEL drops that folder's pages before each run, --warm MODEL reads them.
An older checkout takes part as 'OLD/.venv/bin/streamconv ...'.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def pages(folder: Path | None, cold: bool) -> None:
    """Drop the pages of a folder's files from the page cache, or read them into it."""
    for path in folder.iterdir() if folder is not None else ():
        with path.resolve().open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def run(words: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and MiB resident of a command; what it wrote is on the disk, and then gone."""
    os.sync()
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - began
    if status:
        sys.exit(f"{shlex.join(words)}: {told.decode(errors='replace')[-500:]}")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def told(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(), help="where outputs lie")
    parser.add_argument("--cold", type=Path, metavar="MODEL")
    parser.add_argument("--warm", type=Path, metavar="MODEL")
    asked = parser.parse_args()
    found: list[list[tuple[float, float, float]]] = [[] for _ in asked.commands]
    with tempfile.TemporaryDirectory(dir=asked.work) as folder:
        for _ in range(asked.rounds):
            for runs, command in zip(found, asked.commands, strict=True):
                pages(asked.cold or asked.warm, asked.cold is not None)
                runs.append(run(shlex.split(command.replace("{out}", f"{folder}/out")), Path(folder)))
    for command, runs in zip(asked.commands, found, strict=True):
        seconds, cpu, memory = zip(*runs, strict=True)
        print(f"{command}\n  {told(seconds)} s, {told(cpu)} s of CPU, {max(memory):.0f} MiB")
        for name, at in (("seconds", 0), ("CPU", 1)) if runs is not found[0] else ():
            print(f"  {name} against the first: {told([mine[at] / first[at] for mine, first in zip(runs, found[0], strict=True)])}")


if __name__ == "__main__":
    main()
