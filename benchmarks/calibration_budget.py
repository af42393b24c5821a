"""The smallest --memory-budget that calibration accepts, in a memory cgroup of just that: is it enough, and how much of it is used?

    python -m benchmarks.calibration_budget --work FOLDER [--model FOLDER] [--only NAME ...] [--out results.json]

Without --model it is a random one of 0.5 GB (three layers of hidden size 1536, a tokenizer of words). Each way of calibrating is asked
with 1 MiB, which it refuses; then it runs in a group of the budget that the hint names, page cache and all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import calibration
from benchmarks.cgroup import run_limited
from benchmarks.make_model import Shape
from streamconv.memory import MIB

SHAPE = Shape(hidden=1536, layers=3, intermediate=6144, heads=24, kv_heads=8, vocab=49152, head_dim=64, dtype="bf16")
_HF = ["convert", "{model}", "{out}", "--to", "hf", "--quant"]
_INT4 = [*_HF, "w4a16", "--group-size", "64", "--method"]
WAYS = {
    "ranges": ["calibrate", "{model}", "-o", "{out}.safetensors"],
    "ranges, batches of 4": ["calibrate", "{model}", "-o", "{out}.safetensors", "--batch-size", "4", "--dtype", "float32"],
    "smoothquant": ["convert", "{model}", "{out}", "--quant", "smoothquant", "--per-channel", "--per-token"],
    "fp8_static": [*_HF, "fp8_static"],
    "clip": [*_INT4, "clip"],
    "awq": [*_INT4, "awq"],
    "gptq": [*_INT4, "gptq"],
    "int4_awq": ["convert", "{model}", "{out}", "--quant", "int4_awq", "--group-size", "64", "--method", "awq"],
}


def measure(way: list[str], model: Path, text: Path, place: Path, samples: int, length: int) -> dict[str, Any]:
    """What one way asks for, and what it then takes."""
    place.mkdir(parents=True)
    words = [word.format(model=model, out=place / "out") for word in way]
    command = [sys.executable, "-m", "streamconv", *words, "--text", str(text), "--samples", str(samples), "--max-length", str(length)]
    command += ["--device", "cpu", "--json", "--memory-budget"]
    asked, refusals = 1, 0
    while True:
        group = max(asked, 600) if refusals == 0 else asked  # the refusal itself loads what a run loads
        done = run_limited([*command, f"{asked}MiB"], group * MIB)
        hint = re.search(r"([0-9]+) ?MiB", json.loads(done.stdout or "{}").get("hint") or "") if done.status == 5 else None
        if hint is None or refusals == 4:
            break
        asked, refusals = int(hint[1]), refusals + 1
    shutil.rmtree(place)
    told = {"budget": asked, "refusals": refusals, "status": done.status, "oom_kills": done.oom_kills, "seconds": done.seconds}
    told |= {"peak_rss": done.peak_rss // MIB, "peak_of_group": (done.cgroup_peak or 0) // MIB}
    return told | ({"error": (done.stdout + done.stderr)[-400:]} if done.status else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only", nargs="*", default=[*WAYS])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, text = args.model or args.work / "model", args.work / "text.txt"
    calibration.make(args.work / "model", text, args.samples, args.length, dataclasses.replace(SHAPE, layers=args.layers))
    found = {}
    for name in args.only:
        found[name] = measure(WAYS[name], model, text, args.work / "place", args.samples, args.length)
        print(f"{name:22} {json.dumps(found[name])}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(each["status"] or each["oom_kills"] for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
