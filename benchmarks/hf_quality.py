"""What the formats of `--to hf` cost on a real model: perplexity of the directories as transformers loads and runs them.

    python -m benchmarks.hf_quality MODEL --work FOLDER [--tokens 8192] [--peer PYTHON] [--out benchmarks/results/hf_quality.json]

Needs compressed-tensors and accelerate. MODEL is first cast to bfloat16, as F16 and F32 weights of some formats do not run in
transformers. With --peer, the Python of an environment that has llm-compressor, the same schemes by its `model_free_ptq` stand beside
ours. The text is that of `quality`; activations are quantized as the config says, weights are decoded at load.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import perplexity, plain_text
from streamconv import api
from streamconv.targets.hf.target import HuggingFace

ROOT = Path(__file__).parent.parent
PEER = ROOT / "benchmarks" / "peers" / "model_free.py"
SCHEMES = {
    "fp8_dynamic": "FP8_DYNAMIC",
    "fp8_block": "FP8_BLOCK",
    "int8_dynamic": "W8A8",
    "w4a16": "W4A16",
    "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
}
"""--quant -> scheme of llm-compressor."""


def measured(folder: Path, ids: torch.Tensor) -> float:
    """Perplexity of a directory, run in its own dtype: transformers casts no quantized model."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
    return perplexity(model.eval(), ids)


def directories(source: Path, work: Path, quants: list[str], group: int, peer: str | None) -> Iterator[tuple[str, str, Path | str]]:
    """(format, who made it, the directory or why there is none)."""
    yield "source, bfloat16", "", source
    for quant in quants:
        ours, theirs = work / "ours", work / "theirs"
        shutil.rmtree(ours, ignore_errors=True)
        api.convert(source, ours, HuggingFace(quant=quant, format="compressed-tensors", group_size=group))
        yield quant, "streamconv", ours
        if peer is None:
            continue
        shutil.rmtree(theirs, ignore_errors=True)
        done = subprocess.run([peer, str(PEER), str(source), str(theirs), SCHEMES[quant]], capture_output=True, text=True, check=False)
        yield quant, "llm-compressor", theirs if not done.returncode else done.stderr.strip().splitlines()[-1][:200]


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--group-size", type=int, default=64, help="of w4a16 and w8a16: 576 input features are no multiple of 128")
    parser.add_argument("--quants", default=",".join(SCHEMES))
    parser.add_argument("--peer")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "hf_quality.json")
    args = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(args.model))
    ids = torch.tensor(tokenizer(plain_text())["input_ids"][: args.tokens])
    source = args.work / "source"
    shutil.rmtree(source, ignore_errors=True)
    api.convert(args.model, source, HuggingFace(dtype="bfloat16"))
    results: list[dict[str, Any]] = []
    for quant, maker, made in directories(source, args.work, args.quants.split(","), args.group_size, args.peer):
        line: dict[str, Any] = {"format": quant, "by": maker}
        if isinstance(made, Path):
            line["perplexity"] = measured(made, ids)
            line["against source"] = line["perplexity"] / results[0]["perplexity"] - 1 if results else 0.0
        else:
            line["failed"] = made
        results.append(line)
        told = f"{line['perplexity']:8.3f} ({100 * line['against source']:+.2f} %)" if "perplexity" in line else line["failed"]
        print(f"{quant:18s} {maker:15s} {told}", flush=True)
        content = {"tokens": int(ids.numel()), "group size": args.group_size, "results": results}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
