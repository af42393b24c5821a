"""Timing two commands against each other: alternating runs, a cold or a warm page cache, memory sampled over time.

Every figure is a ratio of two runs next to each other, because machines are noisy.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Command:
    """What is timed: the arguments, with OUT where the output folder goes, and what the environment gets."""

    name: str
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def streamconv(name: str, model: Path, flags: Sequence[str], budget: str = "512MiB") -> Command:
    """One of our conversions."""
    always = [sys.executable, "-m", "streamconv", "convert", str(model), "OUT", "--json", "--device", "cpu"]
    return Command(name, [*always, "--memory-budget", budget, *flags])


def copy(model: Path) -> Command:
    """`cp -r` and `sync`: what moving the bytes costs."""
    return Command("cp -r and sync", ["sh", "-c", f"cp -r '{model}' 'OUT' && sync"])


def drop_caches() -> None:
    """Empty the page cache; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def warm_up(model: Path) -> None:
    """Bring all files of a folder into the page cache."""
    for path in sorted(model.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident(pid: int) -> int:
    """Resident bytes of a process and its children, 0 once it is gone."""
    import psutil

    try:
        root = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])
    except psutil.Error:
        return 0


def once(command: Command, model: Path, out: Path, cold: bool) -> dict[str, Any]:
    """Run a command: seconds until its data is on the disk, memory over time, and what it printed as JSON.

    Raises:
        SystemExit: it failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    if cold:
        drop_caches()
    else:
        os.sync()
        warm_up(model)
    curve: list[tuple[float, int]] = []
    arguments = [argument.replace("OUT", str(out)) for argument in command.arguments]
    began = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | command.environment)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            curve.append((round(time.monotonic() - began, 3), resident(process.pid)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    printed, errors = process.communicate()
    done.set()
    os.sync()
    seconds = time.monotonic() - began
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command.name} failed:\n{printed[-2000:]}\n{errors[-2000:]}")
    told = json.loads(printed) if "--json" in command.arguments else {}
    shutil.rmtree(out, ignore_errors=True)
    return {"seconds": seconds, "peak": max((size for _, size in curve), default=0), "curve": curve, "told": told}


def pairs(ours: Command, other: Command, model: Path, work: Path, runs: int, cold: bool = True) -> dict[str, Any]:
    """`runs` pairs, who goes first alternating, after one pair that is not counted (it compiles kernels and fills caches)."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "other": []}
    for number in range(runs + 1):
        for who in ("ours", "other") if number % 2 else ("other", "ours"):
            run = once(ours if who == "ours" else other, model, work / who, cold)
            if number:
                found[who].append(run)
    seconds = {who: [run["seconds"] for run in found[who]] for who in found}
    ratios = [mine / theirs for mine, theirs in zip(seconds["ours"], seconds["other"], strict=True)]
    middle = sorted(found["ours"], key=lambda run: run["seconds"])[runs // 2]
    told = [run["told"] for run in found["ours"]]
    return {
        "job": ours.name,
        "against": other.name,
        "cache": "cold" if cold else "warm",
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": seconds["ours"],
        "other seconds": seconds["other"],
        "peak bytes": max(run["peak"] for run in found["ours"]),
        "other peak bytes": max(run["peak"] for run in found["other"]),
        "source GB/s": size_of(model) / 1e9 / statistics.median(seconds["ours"]),
        "source GB/s without start": statistics.median(
            t["bytes_read"] / (t["profile"]["tiles"] + t["profile"]["sync"]) / 1e9 for t in told
        ),
        "bytes read": told[0]["bytes_read"],
        "bytes written": told[0]["bytes_written"],
        "profile of the median run": middle["told"]["profile"],
        "memory curve": middle["curve"],
        "other memory curve": sorted(found["other"], key=lambda run: run["seconds"])[runs // 2]["curve"],
    }
