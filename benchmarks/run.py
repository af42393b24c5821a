"""All timings in one run and one results file, with the README's two pictures.

    benchmarks/run [--what copy,warm,peers,peers-warm,hf,hf-warm,hf-copy,scale,budget,workers] [--runs 5] [--work FOLDER]
                   [--out benchmarks/results/run.json]

copy      every job against `cp -r SRC DST && sync`, cold page cache, budget 512 MiB
warm      int8 and int4, source in the page cache
peers     llm-compressor and a transformers re-save beside ours, cold (peers-warm: source in the page cache);
          each is installed in an environment of its own under the work folder
hf        the formats of --to hf beside llm-compressor's model_free_ptq, cold (hf-warm: source in the page cache)
hf-copy   the same against `cp -r SRC DST && sync`, cold
scale     1, 2, 4, 8, 16 GB of the same shape
budget    int8, 256 MiB ... 4 GiB
workers   int8, 1 ... 8

Needs root (it empties the page cache), about 60 GB of disk for `scale`, and a machine that does nothing else. A part that was
measured earlier stays in the results file unless it is run again.
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.make_model import Shape, write_model
from benchmarks.paired import Command, copy, once, pairs, size_of, streamconv

ROOT = Path(__file__).parent.parent
AMPERE = ["--target-sm", "80"]
JOBS: dict[str, tuple[list[str], float]] = {
    "int8, tp 1": (["--quant", "int8", *AMPERE], 1.0),
    "int4, tp 1": (["--quant", "int4", *AMPERE], 1.0),
    "int8, tp 4": (["--quant", "int8", *AMPERE, "--tp-size", "4"], 1.1),
    "unquantized, tp 1": ([], 1.15),
    "unquantized, tp 4": (["--tp-size", "4"], 1.15),
    "bf16 to fp16": (["--dtype", "float16"], 1.2),
}
"""Job -> (flags, goal as a ratio to the copy)."""
LAYER = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)
PEERS = {
    "llmcompressor": ("torch==2.13.0", "llmcompressor==0.14.0.1"),
    "transformers": ("torch==2.13.0", "transformers", "accelerate"),
}
MODEL_FREE = """
import sys
from llmcompressor import model_free_ptq
model, out, scheme = sys.argv[1:]
model_free_ptq(model, out, scheme, ignore=["lm_head", "model.embed_tokens"], max_workers=2, device="cpu")
"""
RESAVE = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, low_cpu_mem_usage=True).save_pretrained(sys.argv[2])
"""


def model_of(work: Path, layers: int = 16) -> Path:
    """The Llama shape of all measurements: hidden 2048, intermediate 8192, 32/8 heads, vocabulary 32768, bf16; 16 layers are 2.2 GB."""
    folder = work / f"llama-{layers}"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_model(folder, Shape(2048, layers, 8192, 32, 8, 32768, 64, "bf16"))
    return folder


def show(line: dict[str, Any]) -> None:
    ratios = line["ratios"]
    print(
        f"{line['job']:24s} {line['cache']} {statistics.median(line['seconds']):6.2f} s, {line['against']}"
        f" {statistics.median(line['other seconds']):6.2f} s, ratio {line['ratio']:.2f} ({min(ratios):.2f} - {max(ratios):.2f}),"
        f" {line['source GB/s']:.2f} GB/s ({line['source GB/s without start']:.2f} without start),"
        f" peak {line['peak bytes'] / 2**20:.0f} against {line['other peak bytes'] / 2**20:.0f} MiB",
        flush=True,
    )


def against_copy(work: Path, runs: int) -> list[dict[str, Any]]:
    model, lines = model_of(work), []
    for job, (flags, goal) in JOBS.items():
        line = pairs(streamconv(job, model, flags), copy(model), model, work, runs) | {"goal": goal}
        show(line)
        lines.append(line)
    return lines


def warm(work: Path, runs: int) -> list[dict[str, Any]]:
    model, lines = model_of(work), []
    for job in ("int8, tp 1", "int4, tp 1"):
        line = pairs(streamconv(job, model, JOBS[job][0]), copy(model), model, work, runs, cold=False)
        show(line)
        lines.append(line)
    return lines


def environment(work: Path, name: str) -> Path:
    """The Python of an environment that holds a peer."""
    home = work / f"env-{name}"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PEERS[name]], check=True)
        (home / "ready").touch()
    return python


def versions_of(python: Path) -> dict[str, str]:
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    wanted = {"torch", "transformers", "llmcompressor", "safetensors", "compressed-tensors"}
    return {entry["name"]: entry["version"] for entry in json.loads(listed) if entry["name"] in wanted}


def peers(work: Path, runs: int, cold: bool = True) -> list[dict[str, Any]]:
    model, lines = model_of(work), []
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    compressor, transformers = environment(work, "llmcompressor"), environment(work, "transformers")
    beside = (
        ("int4, tp 1", JOBS["int4, tp 1"][0], "model_free_ptq W4A16", compressor, [MODEL_FREE, str(model), "OUT", "W4A16"]),
        ("fp8_rowwise, tp 1", ["--quant", "fp8_rowwise"], "model_free_ptq FP8_DYNAMIC", compressor,
         [MODEL_FREE, str(model), "OUT", "FP8_DYNAMIC"]),
        ("unquantized, tp 1", [], "transformers re-save", transformers, [RESAVE, str(model), "OUT"]),
    )  # fmt: skip
    for job, flags, name, python, arguments in beside:
        other = Command(name, [str(python), "-c", *arguments], quiet)
        line = pairs(streamconv(job, model, flags), other, model, work, runs, cold) | {"versions": versions_of(python)}
        show(line)
        lines.append(line)
    return lines


HF = {"fp8_dynamic": "FP8_DYNAMIC", "w4a16": "W4A16", "nvfp4a16": "NVFP4A16"}
"""--quant -> scheme of llm-compressor."""


def hf(work: Path, runs: int, cold: bool = True) -> list[dict[str, Any]]:
    model, lines, python = model_of(work), [], environment(work, "llmcompressor")
    for quant, scheme in HF.items():
        arguments = [str(python), "-c", MODEL_FREE, str(model), "OUT", scheme]
        other = Command(f"model_free_ptq {scheme}", arguments, {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        line = pairs(streamconv(quant, model, ["--to", "hf", "--quant", quant]), other, model, work, runs, cold)
        lines.append(line | {"versions": versions_of(python)})
        show(line)
    return lines


def hf_copy(work: Path, runs: int) -> list[dict[str, Any]]:
    model, lines = model_of(work), []
    for quant in HF:
        line = pairs(streamconv(quant, model, ["--to", "hf", "--quant", quant]), copy(model), model, work, runs)
        show(line)
        lines.append(line)
    return lines


def scale(work: Path, runs: int) -> list[dict[str, Any]]:
    lines = []
    for size in (1, 2, 4, 8, 16):
        model = model_of(work, max(1, round((size * 1e9 - 4 * 32768 * 2048) / LAYER)))
        for job in ("int8, tp 1", "unquantized, tp 1"):
            line = pairs(streamconv(job, model, JOBS[job][0]), copy(model), model, work, min(runs, 3)) | {"source bytes": size_of(model)}
            show(line)
            lines.append(line)
        if size != 2:
            shutil.rmtree(model)
    return lines


def varied(work: Path, runs: int, flag: str, values: list[str]) -> list[dict[str, Any]]:
    """int8 with one resource varied; the values alternate, so that a slow minute hits them all."""
    model = model_of(work)
    found: dict[str, list[dict[str, Any]]] = {value: [] for value in values}
    for number in range(runs + 1):
        for value in values if number % 2 else reversed(values):
            flags = [*JOBS["int8, tp 1"][0], flag, value]
            budget = value if flag == "--memory-budget" else "2GiB"
            run = once(streamconv("int8, tp 1", model, flags, budget), model, work / "ours", cold=True)
            if number:
                found[value].append(run)
    lines = []
    for value, each in found.items():
        seconds = [run["seconds"] for run in each]
        line = {flag: value, "seconds": seconds, "median": statistics.median(seconds), "peak bytes": max(run["peak"] for run in each)}
        line["workers"] = each[0]["told"]["workers"]
        lines.append(line)
        print(f"{flag} {value}: {line['median']:.2f} s, peak {line['peak bytes'] / 2**20:.0f} MiB, {line['workers']} workers", flush=True)
    return lines


def machine() -> dict[str, Any]:
    import psutil

    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("streamconv", "numpy", "numba", "torch", "safetensors")},
    }


def draw(results: dict[str, Any], folder: Path) -> None:
    """The two pictures of the README."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "run", "svg.fonttype": "none"}
    if "peers" in results:
        figure, axes = plt.subplots(figsize=(8, 4))
        for line in results["peers"]:
            for name, curve in ((f"streamconv {line['job']}", "memory curve"), (line["against"], "other memory curve")):
                points = line[curve]
                style = "-" if name.startswith("streamconv") else "--"
                axes.plot([t for t, _ in points], [size / 2**20 for _, size in points], style, label=name)
        axes.set(xlabel="seconds", ylabel="resident set, MiB", title="Memory over time, 2.2 GB Llama shape in bf16, cold")
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / "memory.svg", metadata={"Date": None})
    if "scale" in results:
        figure, axes = plt.subplots(figsize=(8, 4))
        for job in dict.fromkeys(line["job"] for line in results["scale"]):
            lines = [line for line in results["scale"] if line["job"] == job]
            sizes = [line["source bytes"] / 1e9 for line in lines]
            axes.plot(sizes, [statistics.median(line["seconds"]) for line in lines], "o-", label=f"streamconv {job}")
        copies = [statistics.median(line["other seconds"]) for line in lines]
        axes.plot(sizes, copies, "x--", label="cp -r and sync")
        axes.set(xlabel="model, GB", ylabel="seconds", title="Time against size, budget 512 MiB, cold")
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / "scale.svg", metadata={"Date": None})


def thin(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 200 points of each memory curve."""
    for line in lines:
        for key in ("memory curve", "other memory curve"):
            if key in line:
                line[key] = line[key][:: max(1, len(line[key]) // 200)]
    return lines


def main() -> None:
    parts: dict[str, Callable[[Path, int], list[dict[str, Any]]]] = {
        "copy": against_copy,
        "warm": warm,
        "peers": peers,
        "peers-warm": lambda work, runs: peers(work, runs, cold=False),
        "hf": hf,
        "hf-warm": lambda work, runs: hf(work, runs, cold=False),
        "hf-copy": hf_copy,
        "scale": scale,
        "budget": lambda work, runs: varied(work, runs, "--memory-budget", ["256MiB", "512MiB", "1GiB", "2GiB", "4GiB"]),
        "workers": lambda work, runs: varied(work, runs, "--workers", ["1", "2", "3", "4", "6", "8"]),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(parts))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "run.json")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures of the results file")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.work.mkdir(parents=True, exist_ok=True)
    for part in [] if args.draw else args.what.split(","):
        lines = thin(parts[part](args.work.resolve(), args.runs))
        results |= {"machine": machine(), part: lines}
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.out.parent)


if __name__ == "__main__":
    main()
