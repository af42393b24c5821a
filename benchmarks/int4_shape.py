"""What the search for INT4 codes of a Llama shape takes: seconds, device memory and host memory, by method.

    python -m benchmarks.int4_shape --work FOLDER [--shape 8b] [--methods clip,awq,gptq] [--device cuda] [--out results.json]
    python -m benchmarks.int4_shape --work FOLDER --shape 1b --samples 8 --length 256 --device cpu --limit 2GiB

Weights are random, written layer by layer; the text is random words. Each method runs in a process of its own, with --limit in a memory
cgroup of its own (as root). On a CPU it also tells the seconds of each layer, and how many went into sums of inputs and into the search. On
a machine without a GPU, `--shape tiny --samples 4 --length 64 --group-size 64 --device cpu` shows within a minute that the command works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cgroup import run_limited
from streamconv.calibration.run import find_codes
from streamconv.memory import parse_size, peak_resident, show_size

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}
SHAPES["8b-8layers"] = SHAPES["8b"] | {"num_hidden_layers": 8}
VOCAB = 4096
LARGE_VOCAB = 32768
"""Of the shape 1b, 2.2 GB with it."""
_SIGMA = 0.02


def make(folder: Path, shape: dict[str, int], vocab: int) -> None:
    """The model in bfloat16, a shard for each layer, and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    hidden, inter = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    sizes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden)}
    sizes |= {"mlp.down_proj": (hidden, inter)}
    norms = ("input_layernorm", "post_attention_layernorm")
    noise, listed = np.random.default_rng(0), dict[str, str]()
    for layer in range(shape["num_hidden_layers"]):
        tensors: dict[str, tuple[int, ...]] = {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
        tensors |= {f"model.layers.{layer}.{name}.weight": (hidden,) for name in norms}
        listed |= _write(folder, f"layer-{layer:03}.safetensors", tensors, noise)
    ends: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    listed |= _write(folder, "ends.safetensors", ends | {"lm_head.weight": (vocab, hidden)}, noise)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16"} | shape
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    words = {"<unk>": 0, "</s>": 1} | {f"w{number}": number + 2 for number in range(VOCAB - 2)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def _write(folder: Path, name: str, tensors: dict[str, tuple[int, ...]], noise: np.random.Generator) -> dict[str, str]:
    """A shard of random matrices and norms of ones; gives its entries of the index."""
    import torch
    from safetensors.torch import save_file

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        made = np.ones(shape, np.float32) if len(shape) == 1 else noise.standard_normal(shape, np.float32) * np.float32(_SIGMA)
        return torch.from_numpy(made).to(torch.bfloat16)

    save_file({tensor: values(shape) for tensor, shape in tensors.items()}, folder / name, {"format": "pt"})
    return dict.fromkeys(tensors, name)


class _Enough(Exception):
    """The layers that were asked for are done."""


def timed(kind: type, name: str, spent: dict[str, float]) -> None:
    """Add the seconds of every call of a method to `spent`."""
    plain: Any = getattr(kind, name)

    def run(*args: Any, **more: Any) -> Any:
        began = time.monotonic()
        try:
            return plain(*args, **more)
        finally:
            spent[name] = spent.get(name, 0.0) + time.monotonic() - began

    setattr(kind, name, run)


def measure(args: argparse.Namespace) -> None:
    """One method in this process; prints JSON."""
    import torch

    from streamconv.calibration.codes import CodesWork
    from streamconv.calibration.gram import Gram
    from streamconv.calibration.layers import OneLayer

    spent, ends = dict[str, float](), list[float]()
    if args.device == "cpu":  # elsewhere a call only begins something
        timed(Gram, "add", spent)
        timed(CodesWork, "_quantize", spent)
        timed(OneLayer, "load", spent)
    out, began = args.work / f"{args.one}.safetensors", time.monotonic()

    def layer_done(done: int, layers: int, left: float) -> None:
        ends.append(time.monotonic())
        print(f"layer {done} of {layers}, {show_size(peak_resident())}", file=sys.stderr, flush=True)
        if done == args.layers:
            raise _Enough

    told: dict[str, Any] = {"device": args.device, "tokens": args.samples * args.length, "notes": [f"stopped after {args.layers} layers"]}
    with contextlib.suppress(_Enough):
        told = find_codes(
            args.work / "model", out, str(args.work / "text.txt"), method=args.one, group=args.group_size, scale="source",
            samples=args.samples, max_length=args.length, batch_size=args.batch_size, device=args.device, progress=layer_done,
        )  # fmt: skip
    row: dict[str, Any] = {"method": args.one, "device": told["device"], "tokens": told["tokens"], "seconds": time.monotonic() - began}
    row["host_peak"], row["layer_seconds"], row["layers"] = peak_resident(), (ends[-1] - began) / len(ends), len(ends)
    row["spent"] = {{"add": "sums of inputs", "_quantize": "search", "load": "weights"}[name]: each for name, each in spent.items()}
    if told["device"] != "cpu":
        row |= {"device_tensors": torch.cuda.max_memory_allocated(), "device_reserved": torch.cuda.max_memory_reserved()}
        row["device_name"] = torch.cuda.get_device_name(told["device"])
    out.unlink(missing_ok=True)
    for left in args.work.glob(".*.streamconv-calibrate"):
        shutil.rmtree(left)
    print(json.dumps(row | {"notes": told["notes"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that the model is made in; it is removed at the end")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--methods", default="clip,awq,gptq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--layers", type=int, default=0, help="stop after so many; memory is that of all but for the losses")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=parse_size, help="memory cgroup of each method: 2GiB, or bytes")
    parser.add_argument("--keep", action="store_true", help="leave the model there, and use one that is there")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args)
        return
    model, rows = args.work / "model", list[dict[str, Any]]()
    if not (args.keep and (model / "tokenizer_config.json").exists()):
        make(model, SHAPES[args.shape], LARGE_VOCAB if args.shape == "1b" else VOCAB)
    pick = random.Random(0)
    lines = (" ".join(f"w{pick.randrange(VOCAB - 2)}" for _ in range(args.length)) for _ in range(args.samples))
    (args.work / "text.txt").write_text("\n\n".join(lines))
    try:
        for method in args.methods.split(","):
            command = [sys.executable, "-m", "benchmarks.int4_shape", *sys.argv[1:], "--one", method]
            if args.limit:
                held = run_limited(command, args.limit)
                if held.status:
                    raise SystemExit(f"{held.stderr[-2000:]}\n{method} ended with {held.status}, {held.oom_kills} OOM kills")
                row = json.loads(held.stdout.splitlines()[-1]) | {"limit": args.limit, "oom_kills": held.oom_kills}
            else:
                row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            rows.append(row)
            told = " on the CPU"
            if row["spent"]:
                told += f", {row['layer_seconds']:.1f} s a layer; in all " + ", ".join(f"{of} {s:.0f} s" for of, s in row["spent"].items())
            if "device_tensors" in row:
                tensors, reserved = show_size(row["device_tensors"]), show_size(row["device_reserved"])
                told = f" on {row['device_name']}, tensors {tensors}, reserved {reserved}"
            limit = f" of {show_size(args.limit)}, {row['oom_kills']} OOM kills" if args.limit else ""
            print(f"{method}: {row['seconds']:.1f} s{told}, host {show_size(row['host_peak'])}{limit}; {row['notes'][0]}", flush=True)
    finally:
        if not args.keep:
            shutil.rmtree(model)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
