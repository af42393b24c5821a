"""llm-compressor's conversion without a forward pass, as a peer of `streamconv bench`:

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    streamconv bench --shape llama-1b --flags "--to hf" --quant fp8_dynamic --warm \
        --against 'PEER/bin/python benchmarks/peers/model_free.py {model} {out} FP8_DYNAMIC'
"""

from __future__ import annotations

import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(model: str, out: str, scheme: str) -> None:
    """Convert on the CPU with two workers; output head and embedding stay as they are, as with streamconv."""
    from llmcompressor import model_free_ptq

    model_free_ptq(model, out, scheme, ignore=["lm_head", "model.embed_tokens"], max_workers=2, device="cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
