"""What `convert` ends with 0, `verify` accepts: random small models of every family, by any config.json, converted in any way.

By hand: python -m tests.fuzz.accepted --count 2000 --seed 7
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from streamconv import api
from streamconv.errors import StreamconvError
from streamconv.families import Family, all_families
from streamconv.options import Resources
from streamconv.run import manifest
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import all_quants
from streamconv.verification.check import verify

Tensors = dict[str, torch.Tensor]
_QUANTS = [key for key in all_quants() if "gptq" not in key and "awq" not in key]
_DTYPES = ("float16", "bfloat16", "float32")
_ROPE: tuple[Any, ...] = (
    None, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}, {"type": "default"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
)  # fmt: skip
_LINEAR = ("q", "k", "v", "qkv", "qkv_grouped", "o", "gate", "up", "gate_up", "down")
_BIASES = ("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv: int
    size: int
    hidden: int
    width: int
    expert_width: int
    vocab: int
    layers: int
    experts: int

    def shape(self, role: str) -> tuple[int, ...]:
        q, kv, h, w, x = self.heads * self.size, self.kv * self.size, self.hidden, self.width, self.expert_width
        return {
            "embedding": (self.vocab, h), "lm_head": (self.vocab, h), "q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q),
            "q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "q_norm": (self.size,), "k_norm": (self.size,),
            "qkv": (q + 2 * kv, h), "qkv_grouped": (q + 2 * kv, h), "gate": (w, h), "up": (w, h), "down": (h, w), "gate_up": (2 * w, h),
            "gate_bias": (w,), "up_bias": (w,), "router": (self.experts, h), "expert_gate": (x, h), "expert_up": (x, h),
            "expert_down": (h, x), "experts_gate_up": (self.experts, 2 * x, h), "experts_down": (self.experts, h, x),
        }.get(role, (h,))  # fmt: skip


def sizes_of(random: Random, family: Family) -> Sizes:
    heads, size = random.choice((2, 4, 4, 8)), random.choice((16, 32, 32, 64))
    kv = random.choice([n for n in (1, 2, 4, 8) if heads % n == 0])
    hidden = heads * size if random.random() < 0.7 else random.choice((64, 128, 192))
    width, expert = random.choice((128, 128, 256, 256, 100)), random.choice((64, 128))
    experts = random.choice((2, 4)) if "router" in family.tensors else 0
    return Sizes(heads, kv, size, hidden, width, expert, random.choice((16, 37, 64, 65)), random.choice((1, 2, 3)), experts)


def _config(random: Random, family: Family, sizes: Sizes) -> dict[str, Any]:
    """config.json, right in its sizes and odd in everything else."""
    told: dict[str, Any] = {
        "architectures": [random.choice(family.architectures)], "model_type": family.name, "hidden_size": sizes.hidden,
        "intermediate_size": sizes.width, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv, "vocab_size": sizes.vocab, "max_position_embeddings": random.choice((32, 64)),
        "hidden_act": random.choice(("silu", "silu", "gelu", "gelu_pytorch_tanh", "swiglu")), "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "torch_dtype": random.choice(_DTYPES), "tie_word_embeddings": random.random() < 0.4,
    }  # fmt: skip
    if sizes.heads * sizes.size != sizes.hidden or random.random() < 0.5:
        told["head_dim"] = sizes.size
    if sizes.experts:
        told[random.choice(("num_local_experts", "num_experts"))] = sizes.experts
        told["num_experts_per_tok"] = random.choice((1, 2))
        if sizes.expert_width != sizes.width or random.random() < 0.5:
            told["moe_intermediate_size"] = sizes.expert_width
    for key in ("bias", "attention_bias", "mlp_bias"):
        if random.random() < 0.2:
            told[key] = random.random() < 0.6
    if random.random() < 0.3:
        told["rope_scaling"] = random.choice(_ROPE)
    if random.random() < 0.4:
        told["model_type"] = random.choice(("llama", "mixtral", "qwen2", "qwen3", "gemma", "", None, "anything"))
    strays: tuple[tuple[str, Any], ...] = (
        ("rotary_pct", 0.5), ("num_local_experts", 0), ("num_experts", 0), ("moe_intermediate_size", 0), ("kv_channels", sizes.size),
        ("parallel_attn_mlp_res", True), ("attention_multiplier", 0.5), ("logits_scaling", 8.0), ("sliding_window", 16), ("seq_length", 99),
        ("num_experts_per_tok", 2), ("partial_rotary_factor", 0.5), ("query_pre_attn_scalar", 64), ("hidden_activation", "silu"),
    )  # fmt: skip
    for key, value in random.sample(strays, random.choice((0, 0, 1, 2))):
        told[key] = value
    absent = ("model_type", "tie_word_embeddings", "torch_dtype", "hidden_act", "rope_theta", "rms_norm_eps", "max_position_embeddings")
    for key in random.sample(absent, random.choice((0, 0, 0, 1, 2))):
        told.pop(key)
    if sizes.kv == sizes.heads and random.random() < 0.3:
        told.pop("num_key_value_heads")
    return told


def tensors_of(random: Random, family: Family, sizes: Sizes, told: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """Weights, mostly those that config.json asks for, and ranges."""
    biased = family.qkv_bias == "always" or (family.qkv_bias == "config" and told.get("bias", told.get("attention_bias")))
    have = {"q_bias", "k_bias", "v_bias"} if biased else set()
    have |= {"o_bias"} if family.dense_bias == "config" and told.get("bias", told.get("attention_bias")) else set()
    have |= {"gate_bias", "up_bias", "down_bias"} if told.get("mlp_bias") else set()
    if random.random() < 0.05:
        have ^= {random.choice(_BIASES)}
    stacked = random.random() < 0.3
    skip = {role for role in _BIASES if role not in have}
    skip |= {"expert_gate", "expert_up", "expert_down"} if stacked else {"experts_gate_up", "experts_down"}
    if random.random() < (0.7 if told.get("tie_word_embeddings", "gemma" in family.name) else 0.05):
        skip.add("lm_head")
    dtype = getattr(torch, str(told.get("torch_dtype", "float16")))
    made, ranges = Tensors(), Tensors()
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    for role, patterns in family.tensors.items():
        if role in skip:
            continue
        pattern = random.choice(patterns) if "expert" not in role else patterns[0]
        for layer in range(sizes.layers) if "{layer}" in pattern else (0,):
            for expert in range(sizes.experts) if "{expert}" in pattern else (0,):
                name = pattern.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                made[name] = (torch.randn(sizes.shape(role), generator=generator) * 0.05).to(dtype)
                if role in _LINEAR:
                    module, shape = name.removesuffix(".weight"), sizes.shape(role)
                    ranges[module + ".x"], ranges[module + ".y"] = torch.full((shape[1],), 3.0), torch.full((shape[0],), 5.0)
    return made, ranges


def _options(random: Random, ranges: Path) -> TensorRTLLM:
    tp = random.choice((1, 1, 1, 2, 2, 4))
    quant = random.choice(("none", "none", "none", *_QUANTS))
    options = TensorRTLLM(
        tp_size=tp,
        pp_size=random.choice((1, 1, 1, 1, 2)),
        cp_size=random.choice((1,) * 15 + (2,)),
        moe_ep_size=random.choice((-1, -1, 1, 2)),
        dtype=random.choice(("auto", "auto", *_DTYPES)),
        quant=quant,
        kv_cache=random.choice((None, None, None, "fp8", "int8")),
        target_sm=random.choice((70, 80, 80, 90, 90, 100)),
        target_version=random.choice(("0.16", "1.2", "1.2")),
        encoding=random.choice(("processed", "processed", "raw")),
        use_parallel_embedding=random.random() < 0.3,
        embedding_sharding_dim=random.choice((0, 1)),
        use_embedding_sharing=random.random() < 0.1,
        remove_duplicated_kv_heads=random.random() < 0.02,
        use_meta_fp8_rowwise_recipe=random.random() < 0.3,
        per_channel=random.random() < 0.5,
        per_token=random.random() < 0.5,
        rope_tables=random.random() < 0.2,
        max_position_embeddings=random.choice((None, None, None, 48)),
    )
    asked = options.needs_ranges() is not None or (options.kv_cache == "fp8" and random.random() < 0.5)
    return TensorRTLLM(**(options.to_json() | {"activation_ranges": str(ranges) if asked else None}))  # type: ignore[arg-type]


def one(random: Random, folder: Path) -> tuple[str, str | None]:
    """One model, converted.

    Returns:
        (family, or "refused"; what is wrong, None if nothing is).
    """
    family = random.choice([family for family in all_families() if family.architectures])
    sizes = sizes_of(random, family)
    told = _config(random, family, sizes)
    made, ranges = tensors_of(random, family, sizes, told)
    model, out = folder / "model", folder / "out"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(told))
    save_file(made, model / "model.safetensors")
    save_file(ranges, folder / "ranges.safetensors") if ranges else None
    options = _options(random, folder / "ranges.safetensors")
    wrong = f"{json.dumps(told)} {options}"
    try:
        api.convert(model, out, options, Resources(workers=1))
    except StreamconvError:
        return "refused", None
    except Exception as error:
        return family.name, f"{type(error).__name__}: {error}: {wrong}"
    for source in (None, model if random.random() < 0.3 else None):
        problems = verify(out, source, resources=Resources(workers=1)).problems
        if problems:
            return family.name, f"{problems[:3]}: {wrong}"
    (out / manifest.NAME).unlink()
    problems = verify(out).problems
    return family.name, f"without a manifest: {problems[:3]}: {wrong}" if problems else None


def run(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """`count` models; the same seed gives the same ones.

    Returns:
        conversions of each family, with those refused, and what is wrong.
    """
    seen, wrong = Counter[str](), []
    for number in range(count):
        folder = Path(tempfile.mkdtemp(prefix="accepted-"))
        try:
            kind, problem = one(Random(f"{seed} {number}"), folder)
        finally:
            shutil.rmtree(folder)
        seen[kind] += 1
        if problem:
            wrong.append(f"seed {seed} number {number}: {problem}")
    return seen, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    seen, wrong = run(asked.count, asked.seed)
    print(dict(seen))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
