"""Whether a source is the whole model that its config describes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.quantized import source_quantization, stated_in
from streamconv.checkpoint.unknown_statements import overrides
from streamconv.errors import CheckpointError, printable
from streamconv.targets.hf.check_scales import SCALES, check_tensors, codes_of
from streamconv.targets.hf.layers import Model, differences, in_order
from streamconv.targets.hf.stated import group_size, read_statement, stated_bits
from streamconv.targets.hf.units import Entry, Kind, Tensors

_OF = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.safetensors$")
_FP8 = ("F8_E4M3", "F8_E5M2")
_SHOWN = 10


def check_complete(index: Index, units: Sequence[Kind[Entry]]) -> list[str]:
    """Compare the source with its own names and its config; gives what may be wrong.

    Raises:
        CheckpointError: a shard, a layer, a module or the scale of codes is missing, or a size is not what config.json says.
    """
    tensors = index.tensors.told()
    some = {name: entry for kind in units for name, entry in kind.one().items()}
    quantization, bits = source_quantization(index), None
    problems = list(_shards(index))
    if quantization is not None:
        config = stated_in(index.config) or {}
        bits = None if overrides(config) else quantization.bits or stated_bits(config) or 4
        problems += _statement(group_size(index.root) | config, tensors, some) if config else []
    wrong, odd = differences(Model(index.config, units, bits))
    problems += in_order(wrong)
    if any(_bare_codes(index.config, some)):
        problems += _bare_codes(index.config, tensors)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError("; ".join(problems[:_SHOWN]) + more, hint="is the download complete, and config.json this model's?")
    return odd


def _statement(config: Mapping[str, Any], tensors: Tensors, some: Tensors) -> list[str]:
    """What of a statement nobody can read, and codes that are not what it says.

    Args:
        some: the tensors of one unit of each kind.
    """
    statement = read_statement(config, some)
    if statement.alike and not check_tensors(codes_of(some), some, statement)[0]:
        return statement.problems
    return statement.problems + check_tensors(codes_of(tensors), tensors, statement)[0]


def _shards(index: Index) -> Iterator[str]:
    shards: dict[tuple[str, int], set[int]] = defaultdict(set)
    for shard in index.shards:
        if match := _OF.match(shard.path.name):
            shards[match[1], int(match[3])].add(int(match[2]))
    for (stem, count), present in shards.items():
        for number in range(1, min(count, 100_000) + 1):
            if number not in present:
                yield f"{printable(stem)}-{number:05d}-of-{count:05d}.safetensors is missing"


def _bare_codes(config: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """FP8 weights of a quantized model say nothing without their scales."""
    if not stated_in(config):
        return
    for name, (dtype, _) in tensors.items():
        if dtype in _FP8 and name.endswith(".weight") and not any(f"{name[:-6]}{scale}" in tensors for scale in SCALES):
            yield f"{printable(name[:-7])} has codes and no scales"
