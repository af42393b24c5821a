"""Time streamconv against `cp -r SRC DST && sync`, alternating, cold and warm, and sample memory over time.

    python benchmarks/paired.py MODEL --work FOLDER [--jobs int8,int4,...] [--runs 5] [--out results.json]

Every figure is a ratio of two runs next to each other, because machines are noisy; the median of the ratios is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

JOBS: dict[str, list[str]] = {
    "int8 tp1": ["--quant", "int8", "--target-sm", "80"],
    "int4 tp1": ["--quant", "int4", "--target-sm", "80"],
    "int8 tp4": ["--quant", "int8", "--target-sm", "80", "--tp-size", "4"],
    "unquantized tp1": [],
    "unquantized tp4": ["--tp-size", "4"],
    "bf16 to fp16": ["--dtype", "float16"],
}
GOALS = {"int8 tp1": 1.0, "int4 tp1": 1.0, "int8 tp4": 1.1, "unquantized tp1": 1.15, "unquantized tp4": 1.15, "bf16 to fp16": 1.2}


def drop_caches() -> None:
    """Empty the page cache; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def resident(pid: int) -> int:
    """Resident bytes of a process and its children, 0 once it is gone."""
    import psutil

    try:
        root = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])
    except psutil.Error:
        return 0


def timed(command: list[str], sample: bool = True) -> dict[str, Any]:
    """Run a command: seconds until its data is on the disk, exit status, memory over time."""
    curve: list[tuple[float, int]] = []
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            curve.append((round(time.monotonic() - began, 3), resident(process.pid)))

    watcher = threading.Thread(target=watch, daemon=True)
    if sample:
        watcher.start()
    out, err = process.communicate()
    done.set()
    os.sync()
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{out}\n{err}")
    return {"seconds": seconds, "peak": max((size for _, size in curve), default=0), "curve": curve, "out": out}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--budget", default="512MiB")
    parser.add_argument("--warm", action="store_true", help="leave the page cache alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    ours, theirs = args.work / "ours", args.work / "copy"
    source = size_of(args.model)
    results = []
    for job in args.jobs.split(","):
        ratios, seconds, copies, peaks = [], [], [], []
        for run in range(args.runs + 1):
            for folder in (ours, theirs):
                shutil.rmtree(folder, ignore_errors=True)
            pair = {}
            for who in ("ours", "copy") if run % 2 else ("copy", "ours"):
                if not args.warm:
                    drop_caches()
                command = [sys.executable, "-m", "streamconv", "convert", str(args.model), str(ours), "--json"]
                command += [*JOBS[job], "--memory-budget", args.budget, "--force"]
                if who == "copy":
                    command = ["sh", "-c", f"cp -r '{args.model}' '{theirs}' && sync"]
                pair[who] = timed(command)
            if run == 0:
                continue  # the first pair compiles kernels and is not counted
            ratios.append(pair["ours"]["seconds"] / pair["copy"]["seconds"])
            seconds.append(pair["ours"]["seconds"])
            copies.append(pair["copy"]["seconds"])
            peaks.append(pair["ours"]["peak"])
        line = {
            "job": job,
            "cache": "warm" if args.warm else "cold",
            "budget": args.budget,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "seconds": seconds,
            "copy_seconds": copies,
            "gb_per_s": source / 1e9 / statistics.median(seconds),
            "peak_bytes": max(peaks),
            "goal": GOALS.get(job),
        }
        results.append(line)
        print(
            f"{job:18s} {line['cache']} {statistics.median(seconds):6.2f} s  cp {statistics.median(copies):6.2f} s  "
            f"ratio {line['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f}; goal {line['goal']})  "
            f"{line['gb_per_s']:.2f} GB/s of source  peak {max(peaks) / 2**20:.0f} MiB",
            flush=True,
        )
    for folder in (ours, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    if args.out:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)), "kernel": platform.release()}
        args.out.write_text(json.dumps({"machine": machine, "source_bytes": source, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
