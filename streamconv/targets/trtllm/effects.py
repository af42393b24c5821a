"""Options of a TensorRT-LLM checkpoint that change nothing in a call, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from streamconv.checkpoint.quantized import source_quantization
from streamconv.targets.base import flag
from streamconv.targets.trtllm.import_rules import import_prequantized
from streamconv.targets.trtllm.inherited import inherited, origin_of
from streamconv.targets.trtllm.recipes import all_quants, quant_of
from streamconv.targets.trtllm.target import model_of

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.targets.trtllm.options import TensorRTLLM

_MOE = ("moe_tp_size", "moe_ep_size")
_SAID_ELSEWHERE = ("--activation-ranges",)
"""Planning refuses these by itself: a KV cache uses them too."""
_STATED = ("--target-sm",)
"""A fact about the GPU, which the manifest keeps and verify reads, whatever the format."""


def without_effect(options: TensorRTLLM, given: Collection[str], source: Callable[[], Index]) -> Iterator[str]:
    """A line for each of the options `given` that change nothing; the source is opened only if one depends on it.

    Raises:
        StreamconvError: the source cannot be opened; no such format.
    """
    if "embedding_sharding_dim" in given and not options.use_parallel_embedding:
        yield "--embedding-sharding-dim has no effect without --use-parallel-embedding"
    users = _users()
    formats = [each for each in sorted(users) if each[2:].replace("-", "_") in given]
    experts = [name for name in _MOE if name in given]
    if not formats and not experts:
        return
    quant, dense = _of_model(options, source, bool(experts))
    for each in formats:
        if quant not in users[each]:
            yield f"{each} has no effect with --quant {quant}, it is for {', '.join(users[each])}"
    if dense:
        yield from (f"{flag(name)} has no effect, this model has no experts" for name in experts)


def _users() -> dict[str, list[str]]:
    """Flags that only some formats use -> those formats, as each format says of itself."""
    users: dict[str, list[str]] = {}
    quants = all_quants()
    for_all = {*quants["none"].info.flags, *_SAID_ELSEWHERE, *_STATED}
    for quant in quants.values():
        for each in quant.info.flags:
            if each not in for_all:
                users.setdefault(each, []).append(quant.info.key)
    return users


def _of_model(options: TensorRTLLM, source: Callable[[], Index], experts: bool) -> tuple[str, bool]:
    """(the format that the conversion will have, whether the model is dense); reads the source if that is needed to know.

    Args:
        experts: the second is asked for.
    """
    key = quant_of(options.quant).info.key  # an unknown one is told as such
    if key != "none" and not experts:
        return key, False
    with contextlib.closing(source()) as index:
        key = import_prequantized(inherited(options, origin_of(index)), source_quantization(index)).quant
        return key, experts and not model_of(index)[0].num_experts
