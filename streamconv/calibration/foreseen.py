"""What a search for INT4 codes will take and hold, from headers alone: for `plan`, which reads no text and starts without torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv import memory
from streamconv.allocation import SPARE
from streamconv.calibration.before import SAMPLES, check_text, takes_codes
from streamconv.calibration.held import Held
from streamconv.calibration.request import Samples
from streamconv.calibration.tiers import (
    LINEAR,
    SAMPLE,
    SITES,
    SMALLER,
    Tier,
    gram_bytes,
    gram_room,
    largest_gram,
    losses_bytes,
    passes_of,
    search_bytes,
    tier_of,
)
from streamconv.calibration.torch_device import free_memory
from streamconv.device import parse, visible
from streamconv.errors import BudgetError, UsageError
from streamconv.memory import show_size
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.checkpoint.model_config import ModelConfig
    from streamconv.families import Family
    from streamconv.planning.plan import Plan
    from streamconv.targets.base import Target

_STACKED = {"experts_gate_up": "expert_gate", "experts_down": "expert_down"}
"""Role of all experts in one tensor [experts, N, K] -> the role of one."""
_SLOW = 100e9
"""Operations a second of a processor core, in float32 (measured); products reach it."""


@dataclass(frozen=True, slots=True)
class Search:
    """Attributes:
    tokens: at most; 0 for all of the text, whose number nothing tells beforehand.
    grams: (channels, what is kept of them, how many in a layer).
    passes: of all samples through a layer, in the layer that takes most.
    host, device_bytes: memory, 0 on a device that is not used.
    codes, states: bytes on the disk: of the file of codes, and of hidden states while it lasts.
    operations: multiplications and additions.
    why: of the method, where the user named none.
    """

    method: str
    device: str
    layers: int
    tokens: int
    grams: tuple[tuple[int, Tier, int], ...]
    passes: int
    host: int
    device_bytes: int
    codes: int
    states: int
    operations: float
    why: str = ""

    def of(self, plan: Plan) -> Plan:
        """The plan of the options that `planned` gave, with this method in its target."""
        target: Any = plan.target
        return dataclasses.replace(plan, target=dataclasses.replace(target, method=self.method))

    def lines(self) -> list[str]:
        """For people."""
        kept = ", ".join(f"{count} x {tier} of {size} channels" for size, tier, count in self.grams)
        passes = f"{self.passes} passes" if self.passes > 1 else "one pass"
        text = f"at most {self.tokens} tokens" if self.tokens else "all of the text"
        place = f", {show_size(self.device_bytes)} of {self.device}" if self.device_bytes else ""
        states = f", and {show_size(self.states)} of hidden states while it lasts" if self.states else ""
        parts = [
            f"search   --method {self.method}{self.why} on {text}: one of {self.layers} decoder layers at a time, {passes} through each",
            f"moments  of the inputs of a layer: {kept}",
            f"holds    about {show_size(self.host)} of memory{place}; on the disk {show_size(self.codes)} of codes{states}",
        ]
        hours = self.operations / _SLOW / 3600
        if not self.device_bytes and hours > 0.5:
            cores = f"about {hours:.1f} hours of a processor core that makes {_SLOW / 1e9:.0f} GFLOP/s"
            parts.append(f"time     {self.operations / 1e12:.0f} TFLOP, {cores}: a GPU (--device cuda) is for this")
        return parts


def foreseen(
    index: Index, facts: ModelConfig, family: Family, method: str | None, group: int, samples: Samples, budget: int | None, device: str
) -> Search:
    """The search of a conversion; without a method the best that fits, as `before.measured` chooses it.

    Args:
        budget: --memory-budget in bytes.

    Raises:
        BudgetError: it does not fit, as the search itself will say.
    """
    on = "cpu" if parse(device) == ("cpu",) or (device == "auto" and not visible()) else device if device != "auto" else "cuda"
    search = functools.partial(_search, index, facts, family, group, samples, budget, on)
    if method is not None:
        return search(method)
    with contextlib.suppress(BudgetError):
        return search("gptq", " (the best that fits)")
    return search("clip", " (gptq does not fit)")


def _search(
    index: Index, facts: ModelConfig, family: Family, group: int, samples: Samples, budget: int | None, device: str, method: str,
    why: str = "",
) -> Search:  # fmt: skip
    beside = 0 if budget is None else memory.resident() + SPARE
    left = memory.available() if budget is None else max(1, budget - beside)
    itemsize = 4 if device == "cpu" else {"float32": 4}.get(facts.dtype or "float16", 2)
    extra = search_bytes(method, group, facts, device)
    layer = Held.of(index, facts, family, samples.batch_size * samples.max_length, itemsize, extra, losses_bytes)
    free = free_memory(device) if visible() else None
    layer.check(left if budget is None else budget, device, SMALLER, free, beside)
    large = largest_gram(method, group, facts)
    room = gram_room(left, layer.host(device), large) if device == "cpu" else gram_room(free, layer.on_device, large)
    layers = _weights(index, family)
    tokens = max(0, SAMPLES["codes"] if samples.samples is None else samples.samples) * samples.max_length
    passes, codes, work, surplus, most = 1, 0, 0.0, 0, Counter[tuple[int, Tier]]()
    for weights in layers.values():
        sites = {key: cols for key, _, cols in weights if not cols % group}
        kept = [(size, tier_of(method, size)) for size in sites.values()]
        groups = passes_of(((grams, grams) for grams in (gram_bytes(tier, size, group) for size, tier in kept)), room)
        surplus = max([surplus, *(sum(grams) - large for grams in groups)])  # the largest is counted
        passes = max(passes, len(groups))
        most |= Counter(kept)
        whole = [(rows, cols) for _, rows, cols in weights if not cols % group]
        codes += sum(rows * cols // 2 + 4 * rows * cols // group for rows, cols in whole)
        work += tokens * len(groups) * sum(2.0 * rows * cols for _, rows, cols in weights)
        work += tokens * sum(2.0 * size * {"full": size, "block": group, "sample": 0}[tier] for size, tier in kept)
        for rows, cols in whole:  # candidates of a pre-scale, or of a group's clip
            wide = {"full": cols, "block": group, "sample": SAMPLE}[tier_of(method, cols)] if method == "awq" else group
            work += 2.0 * 21 * rows * cols * wide
        if method == "gptq":
            work += sum(4 / 3 * size**3 for size, _ in kept) + sum(3.0 * rows * cols * cols for rows, cols in whole)
    return Search(
        method=method,
        device=device,
        layers=len(layers),
        tokens=tokens,
        grams=tuple((size, tier, count) for (size, tier), count in sorted(most.items())),
        passes=passes,
        host=layer.host(device) + (surplus if device == "cpu" else 0),
        device_bytes=0 if device == "cpu" else layer.on_device + surplus,
        codes=codes,
        states=2 * tokens * facts.hidden_size * itemsize,
        operations=work,
        why=why,
    )


def _weights(index: Index, family: Family) -> dict[int, list[tuple[tuple[str, int], int, int]]]:
    """Layer -> (site, N, K) of its linear layers, in the order of the sites."""
    from streamconv.families.matching import match

    groups: dict[int, list[tuple[tuple[str, int], int, int]]] = {}
    for (role, layer, expert), name in match(family, index.tensors)[0].items():
        shape, single = index.tensors[name].shape, _STACKED.get(role, role)
        if single not in LINEAR or layer < 0 or (not name.endswith((".weight", role)) and single == role):
            continue
        experts = range(shape[0]) if single != role else (expert,)
        rows, cols = (prod(shape[1:-1]) if single != role else shape[0]), shape[-1]
        groups.setdefault(layer, []).extend(((SITES.get(single, single), each), rows, cols) for each in experts)
    order = ["qkv", "qkv_grouped", "o", "mlp", "gate_up", "down"]
    for weights in groups.values():
        weights.sort(key=lambda one: (one[0][1], order.index(one[0][0]) if one[0][0] in order else len(order)))
    return groups


def searches_on(options: Target) -> bool:
    """Whether a text beside these options would be searched on for INT4 codes, and for nothing else."""
    if not isinstance(options, TensorRTLLM | HuggingFace) or options.codes is not None or options.activation_ranges is not None:
        return False
    return takes_codes(options) and not options.uses_ranges()


def planned(model: str | Path, options: Target, samples: Samples | None, budget: int | None, device: str) -> tuple[Target, Search | None]:
    """The options whose plan has the sizes of this conversion, and the search that comes before it, if one does.

    Args:
        samples: None if there is no text.

    Raises:
        UsageError: nothing is searched on the text. RefusedError: the model is quantized already. BudgetError: as of `foreseen`.
    """
    if not isinstance(options, TensorRTLLM | HuggingFace):
        return options, None
    if samples is not None:
        check_text(options)
        if not takes_codes(options) or options.uses_ranges():
            message = "plan reads no text: the ranges that --text measures are part of what is planned"
            raise UsageError(message, hint="run `streamconv calibrate`, then plan with --activation-ranges FILE")
    if options.codes is not None or not takes_codes(options) or (samples is None and options.method is None):
        return options, None
    from streamconv.calibration.run import refuse_quantized
    from streamconv.hub import open_source
    from streamconv.targets.trtllm.target import model_of

    asked = samples or Samples("")
    with open_source(model) as index:
        refuse_quantized(index)
        search = foreseen(index, *model_of(index), options.method, options.group_size, asked, budget, device)
    return dataclasses.replace(options, method="rtn"), search  # whose tensors are of the same sizes
