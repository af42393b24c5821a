"""Tiny random model checkpoints, always the same bytes for the same spec.

    python -m tests.golden.generate OUT [NAME ...]

`models.json` describes the models; one folder per model is written under OUT. The numbers come from numpy's frozen
`RandomState` integer stream, seeded per tensor name, so nothing depends on a library's initialiser or its version.
`digest` over all tensors is compared with the one in the spec: a generator that drifts is found here, and not as a
hundred wrong golden hashes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.golden.hf_config import hf_config
from tests.golden.packed import awq_tensors, gptq_tensors
from tests.golden.random_numbers import Spec, Tensors
from tests.golden.tensors import hf_tensors, meta_tensors

MODELS = Path(__file__).with_name("models.json")


def load_specs() -> list[Spec]:
    """All model specs, in the order of the file."""
    models: list[Spec] = json.loads(MODELS.read_text())["models"]
    return models


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors."""
    state = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        state.update(key.encode())
        state.update(str(value.dtype).encode())
        state.update(str(tuple(value.shape)).encode())
        state.update(value.view(torch.uint8).numpy().tobytes() if value.dim() else b"")
    return state.hexdigest()


def write_hf(spec: Spec, out: Path, tensors: Tensors) -> None:
    """A Hugging Face folder: config.json, one file or several with their index."""
    (out / "config.json").write_text(json.dumps(hf_config(spec), indent=2) + "\n")
    shards = spec.get("shards", 1)
    if spec.get("gptq") or shards == 1:
        name = "gptq_model.safetensors" if spec.get("gptq") else "model.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        return
    keys = list(tensors)
    if spec.get("scatter"):  # neighbours land in different files
        groups = [keys[i::shards] for i in range(shards)]
    else:
        per_shard = -(-len(keys) // shards)
        groups = [keys[i * per_shard : (i + 1) * per_shard] for i in range(shards)]
    weight_map: dict[str, str] = {}
    total = 0
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({key: tensors[key] for key in group}, out / name, metadata={"format": "pt"})
        for key in group:
            weight_map[key] = name
            total += tensors[key].numel() * tensors[key].element_size()
    index = {"metadata": {"total_size": total}, "weight_map": {key: weight_map[key] for key in sorted(weight_map)}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_meta(spec: Spec, out: Path, tensors: Tensors) -> None:
    """A Meta folder: params.json and one consolidated file per model-parallel rank."""
    params = {
        "dim": spec["hidden"],
        "n_layers": spec["layers"],
        "n_heads": spec["heads"],
        "norm_eps": spec.get("eps", 1e-05),
        "vocab_size": spec["vocab"],
        "multiple_of": spec.get("multiple_of", 64),
    }
    if spec["kv"] != spec["heads"] or spec.get("write_kv"):
        params["n_kv_heads"] = spec["kv"]
    for key in ("ffn_dim_multiplier", "rope_theta", "use_scaled_rope"):
        if key in spec:
            params[key] = spec[key]
    (out / "params.json").write_text(json.dumps(params))
    shards = spec.get("shards", 1)
    for rank in range(shards):
        part: Tensors = {}
        for key, value in tensors.items():
            if "norm" in key:
                part[key] = value.clone()
                continue
            axis = 1 if any(name in key for name in ("wo.", "w2.")) else 0
            if "tok_embeddings" in key:
                axis = spec.get("tok_dim", 0)
            part[key] = torch.chunk(value, shards, axis)[rank].clone()
        # As a string: torch.save takes the name inside the zip from it.
        torch.save(part, str(out / f"consolidated.{rank:02d}.pth"))


def generate(spec: Spec, out: Path) -> None:
    """Write the model of `spec` into `out/<name>` and check its digest."""
    folder = out / spec["name"]
    folder.mkdir(parents=True)
    if spec["arch"] == "meta":
        tensors = meta_tensors(spec)
        write_meta(spec, folder, tensors)
    else:
        made = gptq_tensors if spec.get("gptq") else awq_tensors if spec.get("awq") else hf_tensors
        tensors = made(spec)
        write_hf(spec, folder, tensors)
    found = digest(tensors)
    if found != spec["tensor_digest"]:
        raise ValueError(f"{spec['name']}: generated digest {found}, expected {spec['tensor_digest']}")


def main(arguments: list[str]) -> int:
    """Write the named models, or all."""
    out, names = Path(arguments[0]), set(arguments[1:])
    for spec in load_specs():
        if not names or spec["name"] in names:
            generate(spec, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
