"""What quantization costs on a real model: perplexity and an answer, from weights decoded out of the converted files.

    python benchmarks/quality.py MODEL --work FOLDER [--formats int8,int4] [--tokens 8192] [--out results.json]

Every tensor is decoded from the rank files by the decoder that `streamconv verify` uses and put into a transformers model.
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

from streamconv import api, manifest
from streamconv.checkpoint.shard import Shard
from streamconv.options import Options, Resources
from streamconv.plan import SourceTensor
from streamconv.verify import decoded

PROMPT = "The capital of France is"


def decode(out: Path, source: Path) -> dict[str, torch.Tensor]:
    """Source tensor name -> float32 values as the converted checkpoint holds them (tp 1)."""
    told = manifest.load(out)
    assert told is not None
    index, plan = api.open_and_plan(source, told.options)
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
            logits = model(part[None, :-1]).logits[0]
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


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--formats", default="int8,int4")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(args.model))  # type: ignore[no-untyped-call]
    ids = torch.tensor(tokenizer(plain_text())["input_ids"][: args.tokens])
    results = []
    base = 0.0
    for name in ["source", *args.formats.split(",")]:
        weights = None
        if name != "source":
            out = args.work / name
            api.convert(args.model, out, Options(quant=name, target_sm=80), Resources(), force=True)
            weights = decode(out, args.model)
        model = load(args.model, weights)
        value = perplexity(model, ids)
        base = base or value
        line = {"weights": name, "perplexity": value, "against_source": value / base - 1, "answer": answer(model, tokenizer)}
        results.append(line)
        print(f"{name:8s} perplexity {value:8.3f} ({100 * (value / base - 1):+.2f} %)  {line['answer']!r}", flush=True)
        del model, weights
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"tokens": int(ids.numel()), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
