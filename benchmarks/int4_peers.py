"""INT4 in groups by other tools, on the model and the text of `benchmarks.int4`: perplexity, seconds, memory.

    python -m benchmarks.int4_peers MODEL --work FOLDER --llm-compressor PYTHON --modelopt PYTHON [--ours] [--out results.json]

Each tool runs in a process and an environment of its own, on the CPU, the model loaded as float32; the seconds are those of the search,
without loading and saving. llm-compressor's directories are decoded by the few lines of `benchmarks.int4`; ModelOpt's model is measured
where it was quantized, with its rounded weights and its pre-scales. --ours runs `streamconv` beside them, whose seconds are of everything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.int4 import from_directory, inputs_of, put
from benchmarks.quality import load, perplexity

ROOT = Path(__file__).parent.parent
COMMON = """
import json, resource, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, out, text, ids, group, method = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
texts = [json.loads(line)["text"] for line in open(text)]
samples = [tokenizer(part, truncation=True, max_length=512)["input_ids"] for part in texts]
net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
def told(began):
    print(json.dumps({"seconds": time.monotonic() - began, "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""
COMPRESSOR = COMMON + """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
scheme = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}
recipe = [GPTQModifier(**scheme)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**scheme)]
data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})
began = time.monotonic()
oneshot(model=net, dataset=data, recipe=recipe, max_seq_length=512, num_calibration_samples=len(samples), shuffle_calibration_samples=False)
told(began)
net.save_pretrained(out, save_compressed=True)
"""
MODELOPT = COMMON + """
import copy
import modelopt.torch.quantization as mtq
from benchmarks.quality import perplexity
config = copy.deepcopy(mtq.INT4_AWQ_CFG)
for entry in config["quant_cfg"]:
    if "block_sizes" in (entry.get("cfg") or {}):
        entry["cfg"]["block_sizes"][-1] = int(group)
def loop(net):
    with torch.no_grad():
        for ids in samples:
            net(torch.tensor([ids]))
began = time.monotonic()
net = mtq.quantize(net.eval(), config, loop)
told(began)
print(perplexity(net, torch.tensor(json.load(open(ids)))))
"""


def run(python: str, script: str, arguments: list[str]) -> list[str]:
    """The lines that a script printed; ends with its last words if it failed."""
    settings = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, "-c", script, *arguments], env=settings, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [line for line in done.stdout.splitlines() if line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--llm-compressor", help="its Python")
    parser.add_argument("--modelopt", help="its Python")
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--methods", default="gptq,awq", help="of llm-compressor and --ours")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    _, ids, text = inputs_of(args.model, args.work, args.tokens, args.samples)
    (args.work / "ids.json").write_text(json.dumps(ids.tolist()))
    base, rows = perplexity(load(args.model, None), ids), list[dict[str, Any]]()
    print(f"source: {base:.3f}", flush=True)

    def show(tool: str, method: str, found: float, told: dict[str, Any]) -> None:
        rows.append({"tool": tool, "method": method, "perplexity": found, "percent": 100 * (found / base - 1)} | told)
        taken = f"{told['seconds']:.0f} s, {told['peak'] / 2**20:.0f} MiB"
        print(f"{tool} {method}: {found:.3f}, {rows[-1]['percent']:+.1f} %, {taken}", flush=True)

    def decoded(out: Path) -> float:
        net = load(args.model, None)
        put(net, from_directory(out / "model.safetensors"))
        return perplexity(net, ids)

    for method in args.methods.split(","):
        out = args.work / f"peer-{method}"
        arguments = [str(args.model), str(out), str(text), str(args.work / "ids.json"), str(args.group_size), method]
        shutil.rmtree(out, ignore_errors=True)
        if args.llm_compressor:
            told = json.loads(next(line for line in run(args.llm_compressor, COMPRESSOR, arguments) if line.startswith('{"seconds"')))
            show("llm-compressor", method, decoded(out), told)
        if args.ours:
            shutil.rmtree(out, ignore_errors=True)
            words = ["convert", str(args.model), str(out), "--to", "hf", "--quant", "w4a16", "--group-size", str(args.group_size)]
            words += ["--method", method, "--text", str(text), "--device", "cpu", "--batch-size", "4", "--quiet"]
            began = time.monotonic()
            process = subprocess.Popen([sys.executable, "-m", "streamconv", *words])
            _, status, used = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"streamconv ended with {status}")
            show("streamconv", method, decoded(out), {"seconds": time.monotonic() - began, "peak": 1024 * used.ru_maxrss})
    if args.modelopt:
        arguments = [str(args.model), "", str(text), str(args.work / "ids.json"), str(args.group_size), "awq"]
        lines = run(args.modelopt, MODELOPT, arguments)
        show("ModelOpt", "awq_lite", float(lines[-1]), json.loads(next(line for line in lines if line.startswith('{"seconds"'))))
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
