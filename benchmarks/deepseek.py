"""DeepSeek-V3 as it is published, FP8 tiles in 163 files: planned from headers alone, and one cut down decoded in 512 MiB.

    python -m benchmarks.deepseek [--work FOLDER] [--runs 5] [--only plan|decode] [--limit 512MiB] [--out benchmarks/results/deepseek.json]

The whole model is headers over holes: 671 billion parameters take no room. The cut-down one has the same tensors of fewer layers and
experts with random codes, and is decoded inside a memory cgroup (needs root). Both are removed at the end.
"""

from __future__ import annotations

import argparse
import compileall
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cgroup import run_limited
from streamconv.memory import parse_size

ROOT = Path(__file__).parent.parent
BLOCK = 128
SIZES = {"F8_E4M3": 1, "F32": 4, "BF16": 2}
Entry = tuple[str, str, tuple[int, ...]]


def linear(name: str, rows: int, cols: int) -> Iterator[Entry]:
    """An FP8 weight and the scales of its tiles."""
    yield f"{name}.weight", "F8_E4M3", (rows, cols)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-cols // BLOCK))


def mlp(name: str, hidden: int, inner: int) -> Iterator[Entry]:
    yield from linear(f"{name}.gate_proj", inner, hidden)
    yield from linear(f"{name}.up_proj", inner, hidden)
    yield from linear(f"{name}.down_proj", hidden, inner)


def tensors(config: dict[str, Any]) -> Iterator[Entry]:
    """Every tensor of the main model, in the order of its files."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value, query = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
    yield "model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield from linear(f"{at}.self_attn.q_a_proj", query, hidden)
        yield from linear(f"{at}.self_attn.q_b_proj", heads * (nope + rope), query)
        yield from linear(f"{at}.self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
        yield from linear(f"{at}.self_attn.kv_b_proj", heads * (nope + value), latent)
        yield from linear(f"{at}.self_attn.o_proj", hidden, heads * value)
        yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", (query,)
        yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (latent,)
        yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        if layer < config["first_k_dense_replace"]:
            yield from mlp(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
        yield f"{at}.mlp.gate.weight", "BF16", (experts, hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from mlp(f"{at}.mlp.shared_experts", hidden, inner * config["n_shared_experts"])
        for expert in range(experts):
            yield from mlp(f"{at}.mlp.experts.{expert}", hidden, inner)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (config["vocab_size"], hidden)


def config_of(layers: int = 61, experts: int = 256, vocab: int = 129280) -> dict[str, Any]:
    """config.json of DeepSeek-V3, or of one with fewer layers, experts and tokens."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "first_k_dense_replace": min(3, layers - 1),
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(8, experts),
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "num_hidden_layers": layers,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        },
    }


def write(out: Path, config: dict[str, Any], files: int, sparse: bool) -> dict[str, int]:
    """Write the model in `files` files of about one size; gives the number of its parameters and of its bytes."""
    out.mkdir(parents=True)
    listed = list(tensors(config))
    total = sum(math.prod(shape) * SIZES[dtype] for _, dtype, shape in listed)
    groups: list[list[Entry]] = [[] for _ in range(files)]
    done = 0
    for entry in listed:
        groups[min(files - 1, done * files // total)].append(entry)
        done += math.prod(entry[2]) * SIZES[entry[1]]
    noise = np.random.default_rng(0)
    codes = noise.integers(0, 0x7E, 1 << 24, np.uint8) | (noise.integers(0, 2, 1 << 24, np.uint8) << np.uint8(7))
    where = {}
    for number, group in enumerate(groups, 1):
        path = out / f"model-{number:05d}-of-{files:06d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, dtype, shape in group:
            size = math.prod(shape) * SIZES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
            where[name] = path.name
        text = json.dumps(header, separators=(",", ":")).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                file.truncate(8 + len(text) + at)
                continue
            for _, dtype, shape in group:
                for first in range(0, math.prod(shape), codes.size):
                    count = min(codes.size, math.prod(shape) - first)
                    file.write(_values(dtype, count, codes, noise))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    held = sum(math.prod(shape) for name, _, shape in listed if not name.endswith("_scale_inv"))
    return {"parameters": held, "bytes": total, "tensors": len(listed)}


def _values(dtype: str, count: int, codes: np.ndarray[Any, Any], noise: np.random.Generator) -> bytes:
    """Random codes, and scales and plain weights of a plausible size."""
    if dtype == "F8_E4M3":
        return codes[:count].tobytes()
    plain = noise.uniform(1e-4, 3e-4, count).astype(np.float32)
    return plain.tobytes() if dtype == "F32" else (plain.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()


def planned(work: Path, runs: int) -> dict[str, Any]:
    """Seconds of `streamconv plan` on the whole model, the interpreter's start too."""
    model = work / "deepseek-v3"
    told = write(model, config_of(), 163, sparse=True)
    compileall.compile_dir(ROOT / "streamconv", quiet=1)  # as an installer does
    each = {quant: [str(work / "out"), "--to", "hf", "--quant", quant] for quant in ("none", "fp8_dynamic", "w4a16", "nvfp4a16")}
    each["fp8_dynamic and nvfp4a16"] = [f"--output=hf:{work / quant}:quant={quant}" for quant in ("fp8_dynamic", "nvfp4a16")]
    print(f"plan: {told['parameters'] / 1e9:.0f}B parameters, {told['tensors']} tensors", flush=True)
    found = dict[str, Any]()
    for name, flags in each.items():
        seconds, cpu = list[float](), list[float]()
        for _ in range(runs):
            began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "streamconv", "plan", str(model), *flags], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(round(time.monotonic() - began, 3))
            cpu.append(round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3))
        found[name] = {"seconds": seconds, "median seconds": statistics.median(seconds), "CPU": cpu, "median CPU": statistics.median(cpu)}
        print(f"{name}: {statistics.median(seconds):.2f} s, {statistics.median(cpu):.2f} s of CPU", flush=True)
    shutil.rmtree(model)
    return told | {"files": 163, "plans": found}


def decoded(work: Path, limit: str) -> dict[str, Any]:
    """A model of two layers and four experts, decoded to bfloat16 in a memory cgroup."""
    model, out = work / "deepseek-cut", work / "out"
    shutil.rmtree(out, ignore_errors=True)
    told = write(model, config_of(2, 4, 4096), 4, sparse=False)
    command = [sys.executable, "-m", "streamconv", "convert", str(model), str(out), "--to", "hf", "--quant", "none", "--json"]
    result = run_limited([*command, "--device", "cpu", "--memory-budget", limit], parse_size(limit))
    if result.status:
        raise SystemExit(f"the conversion failed: {result.stdout[-1000:]} {result.stderr[-1000:]}")
    shutil.rmtree(model)
    shutil.rmtree(out)
    told |= {"limit": parse_size(limit), "peak resident": result.peak_rss, "oom kills": result.oom_kills}
    print(
        f"decoded: {told['bytes'] / 1e9:.2f} GB in a cgroup of {limit}: {result.seconds:.1f} s, peak {result.peak_rss >> 20} MiB,"
        f" {result.oom_kills} OOM kills",
        flush=True,
    )
    return told | {"seconds": result.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=("plan", "decode"), help="keep the other one's figures")
    parser.add_argument("--limit", default="512MiB")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "deepseek.json")
    args = parser.parse_args()
    work = args.work / "deepseek"
    shutil.rmtree(work, ignore_errors=True)
    results = json.loads(args.out.read_text()) if args.only else {}
    if args.only != "decode":
        results["plan"] = planned(work, args.runs)
    if args.only != "plan":
        results["decode"] = decoded(work, args.limit)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
