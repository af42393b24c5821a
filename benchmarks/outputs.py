"""Five outputs of one model from one read, against five runs one after the other; then killed at random and resumed.

    python -m benchmarks.outputs --work FOLDER [--layers 16] [--kills 5] [--only-kills] [--warm]

Every command runs in a memory cgroup of --budget, with that budget (needs root). The source is cold: its pages are dropped before each
command. Prints a JSON line for each step. Takes 13 GB of disk for the 2.2 GB model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.cgroup import Result, run_limited
from benchmarks.make_model import Shape, write_model
from streamconv.bench.run import size_of, warm_up
from streamconv.memory import parse_size

OUTPUTS = {
    "int8": ["--to", "trtllm", "--tp-size", "2", "--quant", "int8", "--target-sm", "90"],
    "int4": ["--to", "trtllm", "--tp-size", "2", "--quant", "int4", "--target-sm", "90"],
    "fp8_rowwise": ["--to", "trtllm", "--tp-size", "2", "--quant", "fp8_rowwise"],
    "fp8_dynamic": ["--to", "hf", "--quant", "fp8_dynamic"],
    "w4a16": ["--to", "hf", "--quant", "w4a16"],
}


def text_of(name: str, place: Path) -> str:
    """An output as `--output` takes it."""
    to, *flags = OUTPUTS[name][1:]
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return f"{to}:{place / name}:" + ",".join(f"{flag[2:].replace('-', '_')}={value}" for flag, value in pairs)


def model_of(work: Path, layers: int) -> Path:
    """The shape of `bench --shape llama-1b`, with so many layers and three shards."""
    folder = work / f"llama-{layers}"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_model(folder, Shape(2048, layers, 8192, 32, 8, 32768, 64, "bf16"))
    return folder


class Bench:
    """One model, and where its outputs go."""

    def __init__(self, work: Path, model: Path, budget: str, warm: bool) -> None:
        self.model, self.budget, self.warm = model, budget, warm
        self.apart, self.together = work / "apart", work / "together"

    def run(self, arguments: list[str], seconds: float | None = None) -> Result:
        """A conversion; killed after `seconds`."""
        for path in self.model.iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if self.warm:
            warm_up(self.model)
        always = ["--memory-budget", self.budget, "--device", "cpu", "--json"]
        command = [sys.executable, "-m", "streamconv", "convert", str(self.model), *arguments, *always]
        return run_limited(command, parse_size(self.budget), timeout=seconds)

    def step(self, name: str, arguments: list[str]) -> dict[str, Any]:
        """A conversion that must succeed, and what it took."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = self.run(arguments)
        if done.status:
            raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
        told, after = json.loads(done.stdout), resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)
        line = {"step": name, "seconds": done.seconds, "cpu_seconds": cpu, "bytes_read": told["bytes_read"]}
        line |= {"bytes_written": told["bytes_written"], "resumed": told["resumed"]}
        line |= {"peak_resident": done.peak_rss, "oom_kills": done.oom_kills}
        print(json.dumps(line), flush=True)
        return line

    def all_at_once(self) -> list[str]:
        return [word for name in OUTPUTS for word in ("--output", text_of(name, self.together))]

    def differences(self) -> list[str]:
        """Files that are not the same in both folders."""
        pairs = [(path, self.together / path.relative_to(self.apart)) for path in self.apart.rglob("*") if path.is_file()]
        return [str(two) for one, two in pairs if not two.is_file() or subprocess.run(["cmp", "-s", one, two]).returncode]


def main() -> None:
    parser = argparse.ArgumentParser(description="Several outputs from one read.")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--layers", type=int, default=16, help="16 are 2.2 GB")
    parser.add_argument("--budget", default="512MiB")
    parser.add_argument("--kills", type=int, default=5, help="rounds of the second part, each killed several times")
    parser.add_argument("--warm", action="store_true", help="the source is in the page cache")
    parser.add_argument("--only-kills", action="store_true", help="without the runs one after the other")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bench = Bench(args.work, model_of(args.work, args.layers), args.budget, args.warm)
    for folder in (bench.apart, bench.together):
        shutil.rmtree(folder, ignore_errors=True)
    bench.step("warm up kernels", [str(bench.apart / "int4"), *OUTPUTS["int4"]])
    shutil.rmtree(bench.apart)
    seconds = alone(bench) if args.only_kills else timed(bench)
    chance = random.Random(args.seed)
    for number in range(args.kills):
        shutil.rmtree(bench.together)
        killed = 0
        for _ in range(4):
            try:
                bench.run(bench.all_at_once(), chance.uniform(0.1, 0.6) * seconds)
            except subprocess.TimeoutExpired:
                killed += 1
        last = bench.step("last", bench.all_at_once())
        print(json.dumps({"round": number, "killed": killed, "resumed": last["resumed"], "differences": bench.differences()}), flush=True)


def alone(bench: Bench) -> float:
    """An uninterrupted run, which the others are compared with; its seconds."""
    line = bench.step("together", bench.all_at_once())
    shutil.copytree(bench.together, bench.apart)
    return float(line["seconds"])


def timed(bench: Bench) -> float:
    """Five runs, and one in their place; its seconds."""
    single = [bench.step(name, [str(bench.apart / name), *flags]) for name, flags in OUTPUTS.items()]
    os.sync()
    together = bench.step("together", bench.all_at_once())
    seconds = sum(line["seconds"] for line in single)
    print(json.dumps({
        "source": size_of(bench.model),
        "bytes_read_apart": sum(line["bytes_read"] for line in single),
        "bytes_read_together": together["bytes_read"],
        "seconds_apart": round(seconds, 2),
        "seconds_together": together["seconds"],
        "ratio": round(together["seconds"] / seconds, 3),
        "cpu_ratio": round(together["cpu_seconds"] / sum(line["cpu_seconds"] for line in single), 3),
        "peak_apart": max(line["peak_resident"] for line in single),
        "peak_together": together["peak_resident"],
        "budget": parse_size(bench.budget),
        "differences": bench.differences(),
    }), flush=True)  # fmt: skip
    return float(together["seconds"])


if __name__ == "__main__":
    main()
