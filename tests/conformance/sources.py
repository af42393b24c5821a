"""What each quant starts from: float weights, weights that another tool quantized, activation ranges."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from streamconv.families import Family
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.conformance.recipes import GROUP, LINEAR, Key, Recipe, Tensors, ignored, names, values, write

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SHARED = ("q", "k", "v", "gate", "up")


@dataclass(frozen=True)
class Run:
    """A way to use a quant.

    Attributes:
        source: "float", "gptq", "awq", "modelopt" or "fbgemm": how the linear layers of the source are stored.
        options: beside sizes and paths.
        ranges: it needs activation ranges.
        everywhere: families differ in it, so that each goes through it, and not only through the first.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str = "float"
    bits: int = 4
    ranges: bool = False
    everywhere: bool = False


_SMOOTH = [dict(per_channel=channel, per_token=token) for channel in (False, True) for token in (False, True)]
_WEIGHT_ONLY = (
    Run("sm90", {"target_sm": 90, "dtype": "bfloat16"}),
    Run("sm90-for-0.16", {"target_sm": 90, "target_version": "0.16"}),
    Run("raw", {"encoding": "raw"}),
)
RUNS: dict[str, tuple[Run, ...]] = {
    "none": (
        Run("plain"),
        Run("for-0.16", {"target_version": "0.16"}, everywhere=True),
        Run("kv-fp8", {"kv_cache": "fp8", "dtype": "bfloat16"}, ranges=True),
        Run("kv-int8", {"kv_cache": "int8"}, ranges=True),
        Run("parallel-embedding", {"use_parallel_embedding": True, "embedding_sharding_dim": 1}),
    ),
    "int8": (Run("sm80", {"target_sm": 80}), *_WEIGHT_ONLY),
    "int4": (Run("sm80", {"target_sm": 80}), *_WEIGHT_ONLY),
    "smoothquant": tuple(Run(f"{sum(o.values())}{o['per_token']:d}", {**o, "dtype": "float16"}, ranges=True) for o in _SMOOTH),
    "fp8": (Run("kv", {"kv_cache": "fp8"}, ranges=True),),
    "fp8_rowwise": (Run("all"), Run("recipe", {"use_meta_fp8_rowwise_recipe": True}), Run("fbgemm", source="fbgemm")),
    "int4_gptq": (
        Run("gptq", {"target_sm": 80, "group_size": GROUP, "dtype": "float16"}, "gptq"),
        Run("awq", {"target_sm": 90, "group_size": GROUP, "dtype": "bfloat16"}, "awq"),
    ),
    "int8_gptq": (Run("gptq", {"target_sm": 80, "group_size": GROUP, "dtype": "float16"}, "gptq", 8),),
    "int4_awq": (
        Run("modelopt", {"group_size": GROUP, "dtype": "float16"}, "modelopt"),
        Run("rtn", {"group_size": GROUP, "dtype": "bfloat16"}),
    ),
}
"""quant -> how it is used here; a quant that is listed must be in it."""


@dataclass
class Source:
    """A model that was written.

    Attributes:
        folder: where it is; `ranges` the file of its activation ranges.
        held: what the source holds for each key: floats, or signed integers where another tool quantized.
        scales: float32 [N, groups * k] of the quantized ones: scales, then zeros where there are any.
        inputs: pre_quant_scale [K].
        unread: names that no byte of is needed.
    """

    recipe: Recipe
    family: Family
    folder: Path
    ranges: Path
    held: dict[Key, torch.Tensor]
    scales: dict[Key, torch.Tensor]
    inputs: dict[Key, torch.Tensor]
    unread: set[str]

    def options(self, quant: str, run: Run, **more: Any) -> TensorRTLLM:
        ranges = {"activation_ranges": str(self.ranges)} if run.ranges else {}
        return TensorRTLLM(quant=quant, **(run.options | ranges | more))


def make(recipe: Recipe, family: Family, run: Run, folder: Path) -> Source:
    """Write the model as `run` needs it; no tool quantizes Meta's layout, so that is always float."""
    run = run if family.architectures else dataclasses.replace(run, source="float")
    named, held = names(recipe, family), values(recipe, family)
    made = Source(recipe, family, folder, folder.with_name("ranges.safetensors"), held, {}, {}, set(ignored(family)))
    if recipe.tied and ("lm_head", -1, -1) in named:
        made.unread.add(named["lm_head", -1, -1])  # a copy of the embedding, which takes its place
    tensors = ignored(family) | {named[key]: tensor for key, tensor in held.items() if run.source == "float" or key[0] not in LINEAR}
    for number, key in enumerate(key for key in held if run.source != "float" and key[0] in LINEAR):
        tensors |= _quantized(made, key, named[key].removesuffix("weight"), run, number)
    stated: dict[str, Any] | None = {"quant_method": "gptq", "bits": run.bits, "group_size": GROUP, "desc_act": False}
    if run.source == "awq":
        stated = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    if run.source == "fbgemm":
        stated = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    write(recipe, family, folder, tensors, stated if run.source in ("gptq", "awq", "fbgemm") else None)
    if run.source == "modelopt":
        told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ", "group_size": GROUP}}
        (folder / "hf_quant_config.json").write_text(json.dumps(told))
    if run.ranges:
        save_file(_ranges(named, held), made.ranges)
    return made


def _words(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., 32/bits] -> int32 [...], the first value in the lowest bits."""
    shifted = rows.long() << (torch.arange(32 // bits) * bits)
    return (shifted.sum(-1) & 0xFFFFFFFF).to(torch.int64).where(shifted.sum(-1) < 1 << 31, shifted.sum(-1) - (1 << 32)).to(torch.int32)


def _quantized(made: Source, key: Key, path: str, run: Run, seed: int) -> Tensors:
    """A linear layer as the tool stores it; notes in `made` what it means."""
    n, k = made.held[key].shape
    random = torch.Generator().manual_seed(seed)
    if run.source == "fbgemm":
        weight = torch.randn((n, k), generator=random).to(torch.float8_e4m3fn)
        scale = torch.rand((n, 1), generator=random) + 0.01
        made.held[key], made.scales[key] = weight, scale
        made.unread.add(path + "input_scale_ub")
        return {path + "weight": weight, path + "weight_scale": scale, path + "input_scale_ub": torch.tensor([1200.0])}
    bits, middle = run.bits, 1 << (run.bits - 1)
    u = torch.randint(0, 1 << bits, (n, k), generator=random)
    scale = (torch.rand((n, k // GROUP), generator=random) * 0.02 + 0.001).half()
    made.held[key] = u - middle
    if run.source == "modelopt":
        made.held[key] = q = torch.where(u < 8, u, u - 16)
        shared = torch.Generator().manual_seed(99 if key[0] in _SHARED else seed)
        made.inputs[key] = inputs = (torch.rand(k, generator=shared) + 0.5).half()
        made.scales[key] = scale.float()
        if key[0] in ("k", "v"):  # the same as q's, which planning makes sure of
            made.unread.add(path + "pre_quant_scale")
        packed = ((q[0::2] & 15) | ((q[1::2] & 15) << 4)).to(torch.uint8)
        return {path + "weight": packed, path + "weight_scale": scale.float(), path + "pre_quant_scale": inputs}
    z = torch.randint(1, 1 << bits, (n, k // GROUP), generator=random)
    made.scales[key] = torch.stack([scale.float(), (middle - z) * scale.float()], 2)
    per = 32 // bits
    if run.source == "awq":
        order = list(_AWQ_ORDER)
        qweight = _words(u.T.reshape(k, n // 8, 8)[:, :, order], 4)
        qzeros = _words(z.T.reshape(-1, n // 8, 8)[:, :, order], 4)
        return {path + "qweight": qweight, path + "qzeros": qzeros, path + "scales": scale.T}
    made.unread.add(path + "g_idx")
    return {
        path + "qweight": _words(u.T.reshape(k // per, per, n).transpose(1, 2), bits),
        path + "qzeros": _words((z - 1).T.reshape(-1, n // per, per), bits),
        path + "g_idx": torch.arange(k, dtype=torch.int32) // GROUP,
        path + "scales": scale.T,
    }


def _ranges(named: dict[Key, str], held: dict[Key, torch.Tensor]) -> Tensors:
    """Random ranges; layers that see the same input have the same."""
    found: Tensors = {}
    for number, (key, tensor) in enumerate(held.items()):
        if key[0] in LINEAR:
            module = named[key].removesuffix(".weight")
            group = "qkv" if key[0] in "qkv" else "gu" if key[0] in ("gate", "up") else str(number)
            shared = torch.Generator().manual_seed(hash((len(group), key[1])) % 1000)
            found[module + ".x"] = torch.rand(tensor.shape[1], generator=shared) * 9 + 0.01
            found[module + ".y"] = torch.rand(tensor.shape[0], generator=shared) * 30 + 0.01
    return found
