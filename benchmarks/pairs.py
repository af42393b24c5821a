"""Commands in turn, each round once: seconds until the data is on the disk, processor time and memory, and the ratios to the first one.

    python -m benchmarks.pairs --rounds 7 \\
        'streamconv convert MODEL {out} --quant int8 --target-sm 90' \\
        'streamconv convert MODEL {out} --quant int8 --target-sm 90 --verify inline' 'cp -r MODEL {out}'
    python -m benchmarks.pairs --rounds 21 'streamconv --help' 'streamconv-convert-checkpoint --help'

{out} is a fresh name in --work for each run. --cold MODEL drops that folder's pages before each run, --warm MODEL reads them.
An older checkout takes part as 'OLD/.venv/bin/streamconv ...'. The command that starts a round changes from round to round.

--limit SIZE runs all of them in one memory cgroup (as root), and keeps outputs for three runs: the page cache of a run is made of pages
that the run before it used. Without it a virtual machine whose host takes free memory back decides: on one of them 2 GB of zeros took
0.6 s to write into pages just freed, and 14 s into pages that the host had taken.
"""

from __future__ import annotations

import argparse
import contextlib
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

from benchmarks.cgroup import JOIN, memory_group
from streamconv.memory import parse_size


def pages(folder: Path | None, cold: bool) -> None:
    """Drop the pages of a folder's files from the page cache, or read them into it."""
    for path in folder.iterdir() if folder is not None else ():
        with path.resolve().open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def run(words: Sequence[str]) -> tuple[float, float, float]:
    """Seconds until what a command wrote is on the disk, its CPU seconds, and MiB resident."""
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
    parser.add_argument("--limit", type=parse_size, help="of a memory cgroup for all runs, page cache included: 900MiB")
    asked = parser.parse_args()
    found: list[list[tuple[float, float, float]]] = [[] for _ in asked.commands]
    numbers = range(len(asked.commands))
    with tempfile.TemporaryDirectory(dir=asked.work) as folder, contextlib.ExitStack() as stack:
        group = stack.enter_context(memory_group(asked.limit))[1] if asked.limit else None
        join = ["/bin/sh", "-c", JOIN, str(group)] if group else []
        for turn in range(-1 if group else 0, asked.rounds):  # the first one in a cgroup fills it, and does not count
            for number in (*numbers[max(turn, 0) % len(numbers) :], *numbers[: max(turn, 0) % len(numbers)]):
                pages(asked.cold or asked.warm, asked.cold is not None)
                out = Path(tempfile.mkdtemp(dir=folder)) / "out"
                figures = run([*join, *shlex.split(asked.commands[number].replace("{out}", str(out)))])
                if turn >= 0:
                    found[number].append(figures)
                for old in sorted(Path(folder).iterdir(), key=os.path.getmtime)[: -3 if group else None]:
                    shutil.rmtree(old)
    for command, runs in zip(asked.commands, found, strict=True):
        seconds, cpu, memory = zip(*runs, strict=True)
        print(f"{command}\n  {told(seconds)} s, {told(cpu)} s of CPU, {max(memory):.0f} MiB")
        for name, at in (("seconds", 0), ("CPU", 1)) if runs is not found[0] else ():
            print(f"  {name} against the first: {told([mine[at] / first[at] for mine, first in zip(runs, found[0], strict=True)])}")


if __name__ == "__main__":
    main()
