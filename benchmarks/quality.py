"""What quantization costs on a real model: perplexity and an answer, from weights decoded out of the converted files.

    python -m benchmarks.quality MODEL --work FOLDER [--tokens 8192] [--out results.json] [--plot quality.svg]

Weight-only formats: every tensor is decoded from the rank files by the decoder that `streamconv verify` uses and put into a
transformers model.
SmoothQuant: the integers and scales of the files are run as an engine runs them (smooth_run.py), on ranges measured on other text.
The text is the standard library's help topics (`pydoc_data.topics`), which the model was not made for: only the ratio to the
source's perplexity counts.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from streamconv import api
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.options import Resources
from streamconv.run import manifest
from streamconv.targets import target_from_json
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.measured import decoded

PROMPT = "The capital of France is"


def decode(out: Path, source: Path) -> dict[str, torch.Tensor]:
    """Source tensor name -> float32 values as the converted checkpoint holds them (tp 1)."""
    told = manifest.load(out)
    assert told is not None
    index, plan = api.open_and_plan(source, target_from_json(told.target, told.asked))
    files = [Shard(out / file.name) for file in plan.files]
    found: dict[str, torch.Tensor] = {}
    for span in plan.spans:
        tensor = span.source
        assert isinstance(tensor, SourceTensor)
        rows = span.stop - span.start
        values = decoded(plan, span.dests[0], 0, rows, files)
        if tensor.name not in found:
            found[tensor.name] = torch.empty(tensor.rows, tensor.cols)
        found[tensor.name][span.start : span.stop] = values
        if rows == tensor.rows:
            found[tensor.name] = found[tensor.name].reshape(tensor.shape)
    for file in files:
        file.close()
    index.close()
    return found


def load(source: Path, weights: dict[str, torch.Tensor] | None) -> Any:
    """The transformers model in float32, with its own or with decoded weights."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)  # type: ignore[no-untyped-call]
    if weights is not None:
        state = model.state_dict()
        missing = [name for name in state if name not in weights and name != "lm_head.weight"]
        assert not missing, missing
        with torch.no_grad():
            for name, values in weights.items():
                if name in state:
                    state[name].copy_(values.reshape(state[name].shape))
    return model.eval()


def perplexity(model: Any, ids: torch.Tensor, window: int = 512) -> float:
    """exp of the mean negative log-likelihood over windows of `window` tokens."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, ids.numel() - 1, window):
            part = ids[start : start + window + 1]
            if part.numel() < 2:
                break
            logits = model(part[None, :-1]).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
            count += part.numel() - 1
    return math.exp(total / count)


def answer(model: Any, tokenizer: Any) -> str:
    """Greedy continuation of the prompt."""
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def plain_text() -> str:
    """Plain English without a download."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def variants(alpha: float, all_four: bool) -> dict[str, dict[str, Any]]:
    """Name -> options of the SmoothQuant variants; the two extremes where not all four."""
    found = {}
    for channel in (False, True):
        for token in (False, True):
            if all_four or channel == token:
                name = f"smoothquant {alpha:g}, {'channel' if channel else 'tensor'} weights, {'token' if token else 'tensor'} activations"
                found[name] = {"quant": "smoothquant", "smoothquant": alpha, "per_channel": channel, "per_token": token}
    return found


def ranges_of(model: Path, tokenizer: Any, ids: list[int], work: Path, samples: int, length: int) -> Path:
    """Ranges measured on the text that comes after the tokens that are measured."""
    from streamconv.calibration.run import calibrate

    texts = [tokenizer.decode(ids[at : at + length]) for at in range(0, min(len(ids), samples * length), length)]
    work.mkdir(parents=True, exist_ok=True)
    (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = work / "ranges.safetensors"
    calibrate(model, out, str(work / "text.jsonl"), samples=samples, max_length=length, reuse=True)
    return out


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Perplexity of the two extreme variants over alpha, with source, W8A16 and W4A16 as lines."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "quality", "svg.fonttype": "none"}
    figure, axes = plt.subplots(figsize=(7, 4))
    for per in ("tensor", "channel"):
        rows = [r for r in results if r.get("options", {}).get("per_channel") == (per == "channel") == r["options"]["per_token"]]
        rows.sort(key=lambda row: row["options"]["smoothquant"])
        label = "W8A8, static per tensor" if per == "tensor" else "W8A8, per channel and per token"
        axes.plot([r["options"]["smoothquant"] for r in rows], [r["perplexity"] for r in rows], "o-", label=label)
    for name, style, label in (("source", "k-", "source"), ("int8", "g--", "W8A16"), ("int4", "r:", "W4A16")):
        for row in results:
            if row["weights"] == name:
                axes.axhline(row["perplexity"], color=style[0], linestyle=style[1:], linewidth=1, label=label)
    axes.set(xlabel="SmoothQuant alpha", ylabel="perplexity (lower is better)", yscale="log")
    axes.set_title("SmolLM2-135M-Instruct, 8,192 held-out tokens")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    from transformers import AutoTokenizer

    from benchmarks.smooth_run import install

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--formats", default="int8,int4")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--alphas", default="0.5,0.3,0.4,0.6,0.7,0.8", help="the first is measured in all four variants; empty: none")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration sample")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(args.model))  # type: ignore[no-untyped-call]
    every = tokenizer(plain_text())["input_ids"]
    ids = torch.tensor(every[: args.tokens])
    asked: dict[str, dict[str, Any]] = {"source": {}}
    asked |= {name: {"quant": name, "target_sm": 80} for name in args.formats.split(",")}
    for number, alpha in enumerate(float(text) for text in args.alphas.split(",") if text):
        asked |= variants(alpha, not number)
    ranges = ranges_of(args.model, tokenizer, every[args.tokens :], args.work, args.samples, args.length) if args.alphas else None
    results: list[dict[str, Any]] = []
    base = 0.0
    for name, settings in asked.items():
        smooth = settings.get("quant") == "smoothquant"
        if settings:
            out = args.work / "converted"
            options = TensorRTLLM(**settings, activation_ranges=str(ranges) if smooth else None)
            api.convert(args.model, out, options, Resources(), force=True)
        model = load(args.model, None if smooth or not settings else decode(out, args.model))
        if smooth:
            model = install(model, out)
        value = perplexity(model, ids)
        base = base or value
        line = {"weights": name, "perplexity": value, "against_source": value / base - 1, "answer": answer(model, tokenizer)}
        results.append(line | ({"options": settings} if smooth else {}))
        print(f"{name:60s} perplexity {value:8.3f} ({100 * (value / base - 1):+.2f} %)  {line['answer']!r}", flush=True)
        del model
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        calibration = {"samples": args.samples, "max_length": args.length, "text": "the topics after the measured tokens"}
        told = {"tokens": int(ids.numel()), "calibration": calibration, "results": results}
        args.out.write_text(json.dumps(told, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
