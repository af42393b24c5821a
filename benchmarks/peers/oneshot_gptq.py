"""llm-compressor's GPTQ of a model: seconds, device memory and host memory.

    python benchmarks/peers/oneshot_gptq.py MODEL --text FILE [--samples 128] [--length 512] [--group-size 128]

Nothing is saved: the seconds of `oneshot` are those of its search, beside those of loading. Paragraphs of the text are the samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    began = time.monotonic()
    net = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parts = args.text.read_text().split("\n\n")[: args.samples]
    samples = [tokenizer(part, truncation=True, max_length=args.length)["input_ids"] for part in parts]
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": args.group_size}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    loaded = time.monotonic()
    facts = {"max_seq_length": args.length, "num_calibration_samples": len(samples), "shuffle_calibration_samples": False}
    oneshot(model=net, dataset=data, recipe=[recipe], **facts)
    torch.cuda.synchronize()
    told = {"layers": net.config.num_hidden_layers, "tokens": sum(map(len, samples)), "load_seconds": loaded - began}
    told |= {"seconds": time.monotonic() - loaded, "device_tensors": torch.cuda.max_memory_allocated()}
    told |= {"device_reserved": torch.cuda.max_memory_reserved(), "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
