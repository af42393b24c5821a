"""What INT4 in groups costs on a real model, by method and target: perplexity on held-out text, from weights decoded out of the files.

    python -m benchmarks.int4 MODEL --work FOLDER [--methods rtn,clip,awq,gptq] [--targets trtllm,hf] [--out results.json]
    python -m benchmarks.int4 MODEL --work FOLDER --methods none --targets awq

It ends with 1 where a method costs more than it may (`LIMITS`). "none" is the container's own rounding, "awq" AutoAWQ's container.
Calibration and perplexity are on different parts of the standard library's help topics. The files are decoded here by a few lines of their
own, none of the package's, and put into a transformers model in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.quality import answer, load, perplexity, plain_text
from streamconv.cli.main import main as streamconv

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LIMITS = {"rtn": 50.0, "clip": 25.0, "awq": 18.0, "gptq": 11.0}
"""Per cent that the perplexity of SmolLM2-135M may rise by, groups of 64, 16 x 512 tokens of calibration."""
FUSED = {"attention.dense": "self_attn.o_proj", "mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}


def scaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] times their groups' scales [N, K/g]."""
    return (codes.reshape(*scales.shape, -1).float() * scales.float()[..., None]).reshape(codes.shape)


def from_rank(path: Path, heads: int, kv: int, size: int) -> dict[str, torch.Tensor]:
    """Linear weights of a W4A16_AWQ rank file, under Hugging Face names; the pre-scales are multiplied in."""
    held, found = load_file(path), dict[str, torch.Tensor]()
    for name, stored in held.items():
        if not name.endswith(".weight") or stored.dtype != torch.int8:
            continue
        module = name.removesuffix(".weight")
        packed = stored.view(torch.uint8).to(torch.int16)
        nibbles = torch.stack([packed & 15, packed >> 4], 1).reshape(-1, stored.shape[1])
        weight = scaled(torch.where(nibbles > 7, nibbles - 16, nibbles), held[f"{module}.weights_scaling_factor"])
        weight = weight * held[f"{module}.prequant_scaling_factor"].float()
        layer, kind = module.removeprefix("transformer.layers.").split(".", 1)
        if kind == "attention.qkv":
            parts = torch.split(weight, [heads * size, kv * size, kv * size])
            found |= {f"model.layers.{layer}.{p}.weight": part for p, part in zip(PROJECTIONS, parts, strict=True)}
        else:
            found[f"model.layers.{layer}.{FUSED[kind]}.weight"] = weight
    return found


def from_directory(path: Path) -> dict[str, torch.Tensor]:
    """Linear weights and norms of a pack-quantized directory of one file."""
    held = load_file(path)
    found = {name: values for name, values in held.items() if name.endswith("norm.weight")}
    for name, words in held.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            codes = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], 2).reshape(len(words), -1) - 8
            found[f"{module}.weight"] = scaled(codes, held[f"{module}.weight_scale"])
    return found


def from_autoawq(path: Path) -> dict[str, torch.Tensor]:
    """Linear weights and norms of a directory of AutoAWQ's."""
    held = load_file(path)
    found = {name: values for name, values in held.items() if name.endswith("norm.weight")}
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of each channel
    for name in [name for name in held if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        words = [held[f"{module}.{leaf}"] for leaf in ("qweight", "qzeros")]
        both = [torch.stack([(each >> (4 * place)) & 15 for place in order], 2).flatten(1) for each in words]
        scales = held[f"{module}.scales"].float()
        group = len(both[0]) // len(scales)
        found[f"{module}.weight"] = ((both[0] - both[1].repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).T
    return found


def inputs_of(model: Path, work: Path, tokens: int, samples: int) -> tuple[Any, torch.Tensor, Path]:
    """The tokenizer, the tokens that are measured, and a file of the text that is calibrated on."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    every = tokenizer(plain_text())["input_ids"]
    parts = [tokenizer.decode(every[at : at + 512]) for at in range(40_000, 40_000 + 512 * samples, 512)]
    text = work / "text.jsonl"
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return tokenizer, torch.tensor(every[:tokens]), text


def put(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Into a transformers model."""
    with torch.no_grad():
        state = model.state_dict()
        for name, values in weights.items():
            state[name].copy_(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", default="rtn,clip,awq,gptq")
    parser.add_argument("--targets", default="trtllm,hf")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096, help="measured, from the start of the text")
    parser.add_argument("--samples", type=int, default=16, help="of 512 tokens, from token 40,000 on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer, ids, text = inputs_of(args.model, args.work, args.tokens, args.samples)
    config = json.loads((args.model / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    base = perplexity(load(args.model, None), ids)
    print(f"source: {base:.3f}", flush=True)
    rows: list[dict[str, Any]] = [{"method": "source", "perplexity": base}]
    for method in args.methods.split(","):
        for target in args.targets.split(","):
            out = args.work / f"{target}-{method}"
            shutil.rmtree(out, ignore_errors=True)
            quant = ["--quant", "int4_awq"] if target == "trtllm" else ["--to", "hf", "--quant", "w4a16"]
            quant += ["--format", "awq"] if target == "awq" else []
            words = ["convert", str(args.model), str(out), *quant, "--group-size", str(args.group_size)]
            words += ["--method", method] if method != "none" else []
            known = args.work / f"trtllm-{method}.int4.safetensors"  # both targets hold the same codes, but for folded pre-scales
            if method in ("clip", "gptq") and target != "trtllm" and known.exists():
                words += ["--codes", str(known)]
            elif method not in ("rtn", "none"):
                words += ["--text", str(text), "--device", args.device, "--batch-size", "4"]
            began = time.monotonic()
            status = streamconv([*words, "--quiet"])
            if status:
                raise SystemExit(status)
            seconds = time.monotonic() - began
            if target == "trtllm":
                weights = from_rank(out / "rank0.safetensors", heads, kv, config["hidden_size"] // heads)
            else:
                weights = (from_autoawq if target == "awq" else from_directory)(out / "model.safetensors")
            model = load(args.model, None)
            put(model, weights)
            found = perplexity(model, ids)
            row = {"method": method, "target": target, "perplexity": found, "percent": 100 * (found / base - 1), "seconds": seconds}
            rows.append(row | {"answer": answer(model, tokenizer)})
            print(f"{target} {method}: {found:.3f}, {row['percent']:+.1f} %, {seconds:.0f} s: {rows[-1]['answer']!r}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    over = [row for row in rows if row.get("percent", 0.0) > LIMITS.get(row["method"], float("inf"))]
    if over:
        raise SystemExit("\n".join(f"{row['target']} {row['method']}: more than {LIMITS[row['method']]:+.0f} %" for row in over))


if __name__ == "__main__":
    main()
