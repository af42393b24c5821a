"""What a search for INT4 codes keeps of the inputs of a layer, and the room that takes. Needs no torch: `plan` reads it.

    full    C = mean of x xᵀ [K, K]: GPTQ's Hessian, and the loss of any change of a weight over all tokens
    block   the blocks of C on its diagonal, one for each group [K/g, g, g]: the loss inside the groups
    sample  evenly spread tokens themselves [T, K]: where C is too large
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeVar

from streamconv.checkpoint.model_config import ModelConfig
from streamconv.memory import MIB

Tier = Literal["full", "block", "sample"]
SAMPLE = 2048
"""Tokens of a sample."""
SITES = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "mlp", "up": "mlp", "expert_gate": "mlp", "expert_up": "mlp"}
"""Role -> what shares an input with it; every other role of a linear layer is on its own."""
LINEAR = frozenset({*SITES, "qkv", "qkv_grouped", "o", "gate_up", "down", "expert_down"})
SMALLER = ", or --method clip or awq"
"""How a search takes less memory; the end of a hint."""
MOST = 2048 * MIB
"""Bytes of Grams that are summed in one pass; more passes take the time of more forwards."""
_SAMPLED = 16384
"""Above so many channels AWQ looks at tokens, not at a Gram."""
DOUBLE = 4096
"""Up to so many channels GPTQ factorizes in float64 on the CPU."""
_VALUES, _DEVICE_VALUES = 8 << 20, 64 << 20
"""Numbers of the rows that a search works on at once."""
_COPIES, _HEAP = 8, 1
"""Of these rows, in float32 (measured: at most 7), and what the heap of the CPU keeps beside them (measured: most of one)."""

_Site = TypeVar("_Site")


def tier_of(method: str, size: int) -> Tier:
    """What a method keeps of a site of `size` channels."""
    if method == "clip":
        return "block"
    return "sample" if method == "awq" and size > _SAMPLED else "full"


def gram_bytes(tier: Tier, size: int, group: int) -> int:
    """Bytes of a Gram of `size` channels."""
    return 4 * size * ({"full": size, "block": group, "sample": SAMPLE}[tier] + 2)


def losses_bytes(rows: int, cols: int) -> int:
    """Bytes that the losses of one linear layer take until the end: a small tensor, whatever its size."""
    return 1 << 10


def rows_at_once(size: int, device: str) -> int:
    """Rows of K = `size` that a search takes at once on a kind of device."""
    return max(64, (_DEVICE_VALUES if device == "cuda" else _VALUES) // size)


def search_bytes(method: str, group: int, facts: ModelConfig, device: str) -> int:
    """Bytes that the search for the codes of one site takes beside the layer: its Gram, GPTQ's factors of it, some rows, the codes.

    Args:
        device: "cpu", or another.
    """
    width, kind = facts.moe_intermediate_size or facts.intermediate_size, device.partition(":")[0]
    # codes and scales of the two weights of a site, and those of one of them once more while its rows are put together; with AWQ those of
    # a multiplier that did harm; on the CPU, which computes in float32, the weights in the type of their scales
    spare = round((5 if method == "awq" else 3) * width * facts.hidden_size * (1 + 4 / group))
    spare += 4 * width * facts.hidden_size if kind == "cpu" else 0

    def taken(size: int) -> int:
        gram = gram_bytes(tier_of(method, size), size, group)
        rows = 4 * (_COPIES + (_HEAP if kind == "cpu" else 0)) * size * min(rows_at_once(size, kind), max(width, facts.hidden_size)) + spare
        if method != "gptq":
            return gram + rows
        return max((5 if kind == "cpu" and size <= DOUBLE else 3) * gram, 2 * gram + rows)  # while it factorizes; and then

    return max(map(taken, _inputs(facts)))


def largest_gram(method: str, group: int, facts: ModelConfig) -> int:
    """Bytes of the largest Gram of a model."""
    return max(gram_bytes(tier_of(method, size), size, group) for size in _inputs(facts))


def _inputs(facts: ModelConfig) -> tuple[int, ...]:
    """Input channels of the linear layers."""
    width = facts.moe_intermediate_size or facts.intermediate_size
    return facts.hidden_size, width, facts.num_attention_heads * facts.head_size


def gram_room(free: int | None, need: int, largest: int) -> int:
    """Bytes that the Grams of a pass may take together: `largest`, which is counted, and what is left.

    Args:
        free: memory of what they lie in; None if nobody knows.
        need: what the search takes of it.
    """
    return MOST if free is None else min(max(MOST, largest), largest + max(0, free - need))


def passes_of(sites: Iterable[tuple[_Site, int]], room: int) -> list[list[_Site]]:
    """Sites, each with the bytes of its Gram, by passes over all samples: as many together as there is room for, in their order."""
    groups, total = list[list[_Site]](), 0
    for site, size in sites:
        if groups and total + size <= room:
            groups[-1].append(site)
            total += size
        else:
            groups.append([site])
            total = size
    return groups
