"""Calibrate and convert a 2.2 GB model to SmoothQuant inside a 1 GiB memory cgroup, beside hooks on the whole model.

    python -m benchmarks.calibration --work FOLDER [--limit 1GiB] [--samples 32] [--length 256] [--out results.json]

The model is make_model.py's with a word tokenizer beside it. `--whole` runs the other way: the model loaded as NVIDIA's loop loads
it, hooks on every linear layer; it writes the same ranges file, and both must be equal.

    python -m benchmarks.calibration --work FOLDER --forward cuda:0 [--samples 512] [--length 512] [--out results.json]

measures the calibration, and the command that does it, against the pure forward time on a device: the same samples one by one through
the loaded model without hooks, everything warm. Rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cgroup import run_limited
from benchmarks.make_model import Shape, write_model
from streamconv.memory import parse_size, peak_resident, show_size

SHAPE = Shape(hidden=2048, layers=16, intermediate=8192, heads=32, kv_heads=8, vocab=32768, head_dim=64, dtype="bf16")


def make(folder: Path, text: Path, samples: int, length: int, shape: Shape = SHAPE) -> None:
    """The model, a tokenizer of made-up words, and random text in them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    if not (folder / "config.json").exists():
        write_model(folder, shape)
    words = [f"w{number}" for number in range(shape.vocab - 2)]
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {w: n + 2 for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    pick = random.Random(0)
    text.write_text("\n\n".join(" ".join(pick.choices(words, k=length)) for _ in range(samples)))


def whole(model_folder: Path, text: Path, length: int, out: Path) -> None:
    """Hooks on the whole model; prints seconds and peak memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = time.monotonic()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_folder))  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_folder), dtype=torch.float16)  # type: ignore[no-untyped-call]
    model.eval()
    found: dict[str, torch.Tensor] = {}

    def keep(key: str, values: torch.Tensor) -> None:
        top = values.reshape(-1, values.shape[-1]).abs().max(dim=0)[0].float()
        found[key] = torch.maximum(found[key], top) if key in found else top

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":

            def hook(_: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
                keep(f"{name}.x", inputs[0])
                keep(f"{name}.y", output)

            module.register_forward_hook(hook)
    with torch.no_grad():
        for block in text.read_text().split("\n\n"):
            ids = tokenizer((block + " TL;DR: ").strip().replace(" n't", "n't"), truncation=True, max_length=length)["input_ids"]
            model(torch.tensor([ids]))
    save_file(found, out)
    print(json.dumps({"seconds": time.monotonic() - began, "peak_memory": peak_resident()}))


def forward_seconds(model_folder: Path, text: Path, length: int, device: str, passes: int) -> list[float]:
    """Seconds of each pass of all samples through the loaded model, after one that does not count."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_folder))  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_folder), dtype=torch.float16)  # type: ignore[no-untyped-call]
    model = model.to(device).eval()
    model.config.use_cache = False
    blocks = [(block + " TL;DR: ").strip() for block in text.read_text().split("\n\n")]
    samples = [torch.tensor([tokenizer(block, truncation=True, max_length=length)["input_ids"]]) for block in blocks]
    taken = []
    with torch.no_grad():
        for _ in range(passes + 1):
            began = time.perf_counter()
            for sample in samples:
                last = model(sample.to(device))
            last.logits[0, -1, 0].item()  # all is done
            taken.append(time.perf_counter() - began)
    return taken[1:]


def against_forward(work: Path, device: str, samples: int, length: int, rounds: int = 3) -> dict[str, Any]:
    """Calibration over pure forward time; medians of the rounds."""
    import os
    import subprocess

    from streamconv.calibration.run import calibrate

    model, text, out = work / "model", work / "text.txt", work / "ranges.safetensors"
    work.mkdir(parents=True, exist_ok=True)
    make(model, text, samples, length)
    pure, ours, whole_command = [], [], []
    command = [sys.executable, "-m", "streamconv", "calibrate", str(model), "-o", str(out), "--text", str(text), "--quiet"]
    command += ["--device", device, "--samples", str(samples), "--max-length", str(length)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    for _ in range(rounds):
        pure += forward_seconds(model, text, length, device, 1)
        out.unlink(missing_ok=True)
        ours.append(calibrate(model, out, str(text), samples=samples, max_length=length, device=device)["seconds"])
        out.unlink()
        began = time.perf_counter()
        subprocess.run(command, check=True, env=env, timeout=300)
        whole_command.append(time.perf_counter() - began)
    middle = [sorted(times)[rounds // 2] for times in (pure, ours, whole_command)]
    told = {"device": device, "samples": samples, "max_length": length, "forward seconds": pure, "calibration seconds": ours}
    return told | {"command seconds": whole_command, "calibration over forward": middle[1] / middle[0]}


def equal(ours: Path, theirs: Path) -> bool:
    """Whether every range of the whole model is ours, bit for bit."""
    import torch
    from safetensors.torch import load_file

    a, b = load_file(ours), load_file(theirs)
    return set(b) == {name for name in a if not name.endswith(".w")} and all(torch.equal(a[name], b[name]) for name in b)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", default="1GiB")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--forward", metavar="DEVICE")
    args = parser.parse_args()
    args.samples, args.length = args.samples or (512 if args.forward else 32), args.length or (512 if args.forward else 256)
    if args.forward:
        told = against_forward(args.work, args.forward, args.samples, args.length)
        print(json.dumps(told))
        if args.out:
            args.out.write_text(json.dumps(told, indent=1) + "\n")
        return 0
    model, text, theirs = args.work / "model", args.work / "text.txt", args.work / "whole.safetensors"
    if args.whole:
        whole(model, text, args.length, theirs)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    make(model, text, args.samples, args.length)
    out = args.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    ranges = args.work / "out.ranges.safetensors"
    ranges.unlink(missing_ok=True)
    sizes = ["--samples", str(args.samples), "--max-length", str(args.length)]
    command = [sys.executable, "-m", "streamconv", "convert", str(model), str(out), "--text", str(text), *sizes, "--device", "cpu"]
    command += ["--quant", "smoothquant", "--per-channel", "--per-token", "--kv-cache", "int8"]
    began = time.time()
    ours = run_limited(command, parse_size(args.limit))
    print(ours.stderr[-3000:], ours.stdout, file=sys.stderr)
    lines: dict[str, Any] = {
        "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "samples": args.samples,
        "max_length": args.length,
        "streamed": {
            "limit": ours.limit,
            "status": ours.status,
            "oom_kills": ours.oom_kills,
            "peak_rss": ours.peak_rss,
            "seconds": ours.seconds,
            "calibration_seconds": ranges.stat().st_mtime - began if ranges.exists() else None,
        },
    }
    if ours.status == 0:
        whole_model = [sys.executable, "-m", "benchmarks.calibration", "--work", str(args.work), "--length", str(args.length), "--whole"]
        other = run_limited(whole_model, 1 << 40)
        print(other.stderr[-500:], file=sys.stderr)
        lines["whole_model"] = json.loads(other.stdout.splitlines()[-1]) if other.status == 0 else {"status": other.status}
        lines["ranges_equal"] = other.status == 0 and equal(ranges, theirs)
        streamed = lines["streamed"]
        print(f"streamed: {show_size(streamed['peak_rss'])} of {show_size(ours.limit)}, {streamed['seconds']:.0f} s with the conversion")
        print(f"whole model: {show_size(lines['whole_model'].get('peak_memory', 0))}, equal ranges: {lines['ranges_equal']}")
    if args.out:
        args.out.write_text(json.dumps(lines, indent=1) + "\n")
    return ours.status


if __name__ == "__main__":
    sys.exit(main())
