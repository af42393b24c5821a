"""What a checkpoint must hold, said once more without the planner: modules from roles, ranks from modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from streamconv.targets.trtllm.options import TensorRTLLM
from tests.conformance.recipes import EXPERTS, HEADS, LAYERS, SIZE, Key, Recipe

Array = torch.Tensor
Get = Callable[[str, int, int], Array | None]
ADD_ONE = ("gemma", "gemma2")
"""Families whose norms are stored as value + 1."""
ROW_PARALLEL = ("attention.dense", "mlp.proj")

_VECTORS = {
    "input_layernorm": "input_norm", "post_layernorm": "post_norm", "pre_feedforward_layernorm": "pre_ffn_norm",
    "post_feedforward_layernorm": "post_ffn_norm", "attention.q_layernorm": "q_norm", "attention.k_layernorm": "k_norm",
}  # fmt: skip


def modules(recipe: Recipe, held: Mapping[Key, Array], bias: str = "") -> dict[str, Array]:
    """Module path -> the matrix of the whole model [N, ...] (experts first), from what its roles hold.

    Args:
        bias: "_bias" for the biases.
    """

    def get(role: str, layer: int, expert: int = -1) -> Array | None:
        return held.get((role + bias, layer, expert))

    found: dict[str, Array | None] = {}
    experts = recipe.experts if held and not bias and ("router", 0, -1) in held else 0
    for layer in range(LAYERS):
        at = f"transformer.layers.{layer}."
        found[at + "attention.qkv"] = _qkv(recipe, get, layer)
        found[at + "attention.dense"] = get("o", layer)
        found[at + "mlp.proj"] = get("down", layer)
        fused = get("gate_up", layer)
        if fused is not None:
            gate, up = fused.chunk(2)
            found[at + "mlp.fc"] = torch.cat([up, gate])
        else:
            found[at + "mlp.fc"], found[at + "mlp.gate"] = get("gate", layer), get("up", layer)
        if experts:
            found[at + "mlp.router"] = get("router", layer)
            found[at + "mlp.fc"], found[at + "mlp.proj"] = _experts(get, layer)
    return {name: array for name, array in found.items() if array is not None}


def _qkv(recipe: Recipe, get: Get, layer: int) -> Array | None:
    whole, grouped = get("qkv", layer, -1), get("qkv_grouped", layer, -1)
    if whole is not None:
        return whole
    if grouped is not None:
        groups = grouped.reshape(recipe.kv, HEADS // recipe.kv + 2, SIZE, -1)
        parts = [groups[:, :-2], groups[:, -2], groups[:, -1]]
        return torch.cat([part.reshape(-1, *grouped.shape[1:]) for part in parts])
    sides = {role: get(role, layer, -1) for role in "qkv"}
    if recipe.family == "llama-meta":
        for role in "qk":  # pairs (2i, 2i + 1) of a head become (i, i + half)
            side = sides[role]
            if side is None:
                continue
            sides[role] = side.reshape(-1, SIZE // 2, 2, side.shape[1]).transpose(1, 2).reshape(side.shape)
    present = [side for side in sides.values() if side is not None]
    return torch.cat(present) if present else None


def _experts(get: Get, layer: int) -> tuple[Array, Array]:
    gate_up, down = get("experts_gate_up", layer, -1), get("experts_down", layer, -1)
    if gate_up is not None and down is not None:
        gate, up = gate_up.chunk(2, 1)
        return torch.cat([up, gate], 1), down
    one: dict[str, list[Array]] = {"gate": [], "up": [], "down": []}
    for expert in range(EXPERTS):
        for role, taken in one.items():
            tensor = get("expert_" + role, layer, expert)
            assert tensor is not None
            taken.append(tensor)
    gate, up, down = (torch.stack(taken) for taken in one.values())
    return torch.cat([up, gate], 1), down


def plain(recipe: Recipe, held: Mapping[Key, Array]) -> dict[str, Array]:
    """Module path -> tensor, for what is no linear layer."""
    found = {"transformer.vocab_embedding": held["embedding", -1, -1], "transformer.ln_f": held["final_norm", -1, -1]}
    found["lm_head"] = held["embedding" if recipe.tied else "lm_head", -1, -1]
    for layer in range(LAYERS):
        for module, role in _VECTORS.items():
            if (role, layer, -1) in held:
                found[f"transformer.layers.{layer}.{module}"] = held[role, layer, -1]
    return found


def shared(recipe: Recipe, options: TensorRTLLM) -> bool:
    """Whether 0.16 finds lm_head in the embedding, so that it is not stored."""
    if options.target_version != "0.16" or options.pp_size > 1 or not recipe.tied:
        return False
    return recipe.family in ADD_ONE or (recipe.family == "qwen2" and options.tp_size == 1)


def inputs(held: Mapping[Key, Array]) -> dict[str, Array]:
    """Module path -> what there is for each of its input channels; weights that share a module share it."""
    first = {"q": "attention.qkv", "qkv": "attention.qkv", "qkv_grouped": "attention.qkv", "o": "attention.dense"}
    first |= {"gate": "mlp.fc", "gate_up": "mlp.fc", "up": "mlp.gate", "down": "mlp.proj"}
    return {f"transformer.layers.{key[1]}.{first[key[0]]}": value for key, value in held.items() if key[0] in first}


def uses(recipe: Recipe, role: str, tp: int, *, split_embedding: bool, once: bool) -> int:
    """How often each element of a role is stored over all ranks of `tp`.

    Args:
        once: the bias of a row-parallel layer is on the first rank only.
    """
    if role == "embedding":
        return (1 if split_embedding else tp) + recipe.tied
    if role == "lm_head" and recipe.tied:
        return 0
    if role in ("k", "v", "k_bias", "v_bias"):
        return max(1, tp // recipe.kv)
    if role in ("o_bias", "down_bias"):
        return 1 if once else tp
    return tp if role == "router" or role.endswith("norm") else 1


def copied_rows(recipe: Recipe, role: str) -> list[bool]:
    """Of each row of a tensor that holds q, k and v: whether it is of a KV head, which ranks may share."""
    if role == "qkv":
        return [False] * (HEADS * SIZE) + [True] * (2 * recipe.kv * SIZE)
    return ([False] * (HEADS // recipe.kv * SIZE) + [True] * (2 * SIZE)) * recipe.kv


def join(recipe: Recipe, name: str, parts: list[Array], *, moe_ep: int, split_embedding: int | None) -> Array:
    """The tensor of all ranks of a stage from those of each, matrices with output channels first.

    Args:
        name: e.g. "transformer.layers.0.attention.qkv.weight".
        split_embedding: dimension over which it is cut, None if it is not.

    Raises:
        AssertionError: replicas differ, or nobody has said how this tensor is split.
    """
    module, suffix = name.rsplit(".", 1)
    short = re.sub(r"^transformer\.(layers\.\d+\.)?", "", module)
    if len(parts) == 1:
        return parts[0]
    if suffix in ("weights_scaling_factor", "weight", "zero", "bias", "per_channel_scale") and parts[0].shape != (1, 1):
        if short == "attention.qkv":
            return _join_qkv(recipe, parts)
        if short == "lm_head":
            return torch.cat(parts)[: recipe.vocab]
        if short == "vocab_embedding" and split_embedding is not None:
            joined = torch.cat(parts, split_embedding)
            return joined[: recipe.vocab]
        if recipe.experts and short in ("mlp.fc", "mlp.proj"):
            return _join_experts(short, suffix, parts, moe_ep)
        if short in ("mlp.fc", "mlp.gate"):
            halves = [part.chunk(2) for part in parts] if recipe.family == "phi3" else [(part,) for part in parts]
            return torch.cat([torch.cat(same) for same in zip(*halves, strict=True)])
        if short in ROW_PARALLEL and suffix in ("weight", "weights_scaling_factor"):
            return torch.cat(parts, 1)
    elif short in ROW_PARALLEL and suffix in ("smoother", "prequant_scaling_factor"):
        return torch.cat(parts, 0 if suffix == "prequant_scaling_factor" else 1)
    for part in parts[1:]:
        assert torch.equal(part, parts[0]), f"{name}: ranks that must hold the same differ"
    return parts[0]


def _join_qkv(recipe: Recipe, parts: list[Array]) -> Array:
    tp = len(parts)
    heads, kv = HEADS // tp, max(1, recipe.kv // tp)
    sides = [part.split([heads * SIZE, kv * SIZE, kv * SIZE]) for part in parts]
    copies = max(1, tp // recipe.kv)
    for number, side in enumerate(sides):
        first = sides[number // copies * copies]
        assert torch.equal(side[1], first[1]) and torch.equal(side[2], first[2]), "copies of a KV head differ"
    q, k, v = zip(*sides, strict=True)
    return torch.cat([*q, *k[::copies], *v[::copies]])


def _join_experts(short: str, suffix: str, parts: list[Array], moe_ep: int) -> Array:
    """Rank r is place r // ep of the experts' tensor parallel group and place r % ep of the expert parallel one."""
    local = EXPERTS // moe_ep
    by_expert = []
    for place in range(moe_ep):
        group = [part.reshape(local, -1, part.shape[-1]) for part in parts[place::moe_ep]]
        if short == "mlp.proj":
            by_expert.append(torch.cat(group, 2) if suffix == "weight" else group[0])
        else:
            halves = [part.chunk(2, 1) for part in group]
            by_expert.append(torch.cat([torch.cat(same, 1) for same in zip(*halves, strict=True)], 1))
    whole = torch.cat(by_expert)
    return whole.reshape(-1, whole.shape[-1])
