"""INT4 in groups by other tools, on the model and the text of `benchmarks.int4`: perplexity, seconds, memory.

    python -m benchmarks.int4_peers MODEL --work FOLDER --llm-compressor PYTHON --modelopt PYTHON [--out results.json]

Each tool runs as a command in an environment of its own, on the CPU, the model loaded as float32. Seconds, processor seconds and memory
(the largest sum of the resident sets of its processes) are those of the whole command, from its start until its files are on the disk, for
`streamconv` too, which takes its turn before each tool. The files are decoded by the few lines of `benchmarks.int4`; of ModelOpt's model,
which is not exported, the rounded weights times their pre-scales are saved.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.int4 import from_directory, inputs_of, put
from benchmarks.quality import load, perplexity
from streamconv.bench.command import Group, measured

ROOT = Path(__file__).parent.parent
COMMON = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, out, text, group, length, method = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
texts = [json.loads(line)["text"] for line in open(text)]
samples = [tokenizer(part, truncation=True, max_length=int(length))["input_ids"] for part in texts]
net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
"""
COMPRESSOR = COMMON + """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
IntermediatesCache.pin_memory = lambda self, *more, **facts: None  # 0.14.0.1 pins for AWQ on machines without an accelerator, too
args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
scheme = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}
recipe = [GPTQModifier(**scheme)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**scheme)]
data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})
facts = {"max_seq_length": int(length), "num_calibration_samples": len(samples), "shuffle_calibration_samples": False}
oneshot(model=net, dataset=data, recipe=recipe, **facts)
net.save_pretrained(out, save_compressed=True)
"""
MODELOPT = COMMON + """
import copy
from pathlib import Path
import modelopt.torch.quantization as mtq
from safetensors.torch import save_file
config = copy.deepcopy(mtq.INT4_AWQ_CFG)
for entry in config["quant_cfg"]:
    if "block_sizes" in (entry.get("cfg") or {}):
        entry["cfg"]["block_sizes"][-1] = int(group)
def loop(net):
    for ids in samples:
        net(torch.tensor([ids]))
with torch.no_grad():
    net = mtq.quantize(net.eval(), config, loop)
    made = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
            pre = getattr(module.input_quantizer, "pre_quant_scale", None)
            weight = module.weight_quantizer(module.weight)
            made[name + ".weight"] = (weight if pre is None else weight * pre).contiguous()
Path(out).mkdir()
save_file(made, out + "/effective.safetensors")
"""


def run(words: list[str], log: Path) -> dict[str, Any]:
    """Seconds, processor seconds and memory of a command, or the end of what it said when it failed."""
    settings = [f"PYTHONPATH={ROOT}", "HF_HUB_OFFLINE=1", "TOKENIZERS_PARALLELISM=false"]
    done = measured(["env", *settings, *words], log, Group())
    if done.status:
        return {"failed": done.error[-400:]}
    return {"seconds": done.seconds, "cpu": done.cpu, "peak": done.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--llm-compressor", help="its Python")
    parser.add_argument("--modelopt", help="its Python")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--methods", default="gptq,awq", help="of llm-compressor; ModelOpt's is awq_lite")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    _, ids, text = inputs_of(args.model, args.work, args.tokens, args.samples)
    base, rows = perplexity(load(args.model, None), ids), list[dict[str, Any]]()
    print(f"source: {base:.3f}", flush=True)

    def show(tool: str, method: str, words: list[str]) -> None:
        shutil.rmtree(args.work / "made", ignore_errors=True)
        told, net = run(words, args.work / "log"), load(args.model, None)
        if "failed" in told:
            rows.append({"tool": tool, "method": method} | told)
            print(f"{tool} {method}: {told['failed']}", flush=True)
            return
        saved = args.work / "made" / "effective.safetensors"
        put(net, load_file(saved) if saved.exists() else from_directory(args.work / "made" / "model.safetensors"))
        found = perplexity(net, ids)
        rows.append({"tool": tool, "method": method, "perplexity": found, "percent": 100 * (found / base - 1)} | told)
        taken = f"{told['seconds']:.0f} s, {told['cpu']:.0f} s of CPU, {told['peak'] / 2**20:.0f} MiB"
        print(f"{tool} {method}: {found:.3f}, {rows[-1]['percent']:+.1f} %, {taken}", flush=True)

    def ours(method: str) -> None:
        words = [sys.executable, "-m", "streamconv", "convert", str(args.model), str(args.work / "made"), "--to", "hf", "--quant", "w4a16"]
        words += ["--group-size", str(args.group_size), "--method", method, "--text", str(text), "--max-length", str(args.length)]
        show("streamconv", method, [*words, "--device", "cpu", "--batch-size", "4", "--quiet"])
        (args.work / "made.int4.safetensors").unlink(missing_ok=True)

    asked = [str(args.model), str(args.work / "made"), str(text), str(args.group_size), str(args.length)]
    for method in args.methods.split(",") if args.llm_compressor else ():
        ours(method)
        show("llm-compressor", method, [args.llm_compressor, "-c", COMPRESSOR, *asked, method])
    if args.modelopt:
        ours("awq")
        show("ModelOpt", "awq_lite", [args.modelopt, "-c", MODELOPT, *asked, "awq"])
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
