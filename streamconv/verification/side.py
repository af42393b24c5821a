"""One of two checkpoints that are compared: its tensors by name, with the values of quantized weights where their codes can be decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamconv import targets
from streamconv.checkpoint.derived_rows import RotaryRows
from streamconv.checkpoint.dtypes import F32
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.meta import output_rows
from streamconv.checkpoint.model_config import from_meta
from streamconv.checkpoint.rows import SourceTensor
from streamconv.checkpoint.source_tensors import SourceTensors
from streamconv.errors import CheckpointError, RefusedError
from streamconv.families.llama import LLAMA
from streamconv.families.matching import example, match
from streamconv.families.meta import META
from streamconv.families.naming import settle
from streamconv.hub import open_stored
from streamconv.quants.decoded_rows import DecodedAffine, DecodedTensor
from streamconv.targets.hf.sources import Weight
from streamconv.targets.hf.stored import stored_weights

_CODES = {"e4m3": "F8_E4M3", "int8": "INT8", "uint8": "INT8", "e2m1": "FP4", "uint4": "INT4"}


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint.

    Attributes:
        weights: name -> where its values come from; quantized weights under the name of the float weight.
        beside: tensors that belong to quantized weights: scales and zero points, as they are stored.
        note: why quantized weights are compared as they are stored, "" if they are not.
    """

    index: Index
    weights: Mapping[str, Weight]
    beside: Mapping[str, SourceTensor]
    note: str = ""

    def form(self, name: str) -> tuple[object, ...] | None:
        """How a quantized weight is stored; None for a plain tensor, or for none."""
        weight = self.weights.get(name)
        return None if weight is None or isinstance(weight, SourceTensor) else (kind_of(weight), type(weight), _in_words(weight))


def kind_of(weight: Weight) -> str:
    """The dtype that is stored: that of safetensors, or of the codes."""
    if isinstance(weight, SourceTensor):
        return weight.dtype.name
    if isinstance(weight, DecodedTensor):
        return f"INT{weight.bits}" if _in_words(weight) else _CODES[weight.code]
    return f"INT{weight.codes.bits}" if isinstance(weight, DecodedAffine) else "MXFP4"


def _in_words(weight: Weight) -> bool:
    """GPTQ's or AutoAWQ's."""
    return isinstance(weight, DecodedTensor) and weight.bits is not None and weight.zeros is not None


def open_sides(a: str, b: str) -> tuple[Side, Side]:
    """Open two checkpoints of any kind; reads headers alone. Of rank files that were cut alike each is compared with the other's.

    Raises:
        CheckpointError, HubError: one cannot be opened. RefusedError: rank files in a format that is not read back, on one side alone.
    """
    refused: RefusedError | None = None
    try:
        sides = open_stored(a, tensors_only=True), open_stored(b, tensors_only=True)
        if sides[0].origin is None or sides[0].origin != sides[1].origin:
            return _side(sides[0]), _side(sides[1])
    except RefusedError as error:
        refused = error
    first, second = (targets.opened(Path(folder), as_stored=True) for folder in (a, b))
    if refused is not None and (first is None or second is None):
        raise refused
    assert first is not None and second is not None  # outputs alone have an origin
    return Side(first, SourceTensors(first), {}), Side(second, SourceTensors(second), {})


def settled(side: Side) -> Side:
    """The same under the names of Hugging Face: without the prefixes of wrappers, if there are some that can be taken off."""
    if side.index.assembled is not None:
        return _of_meta(side.index, side.index.assembled)
    with contextlib.suppress(CheckpointError):
        return _side(settle(side.index))
    return side


def _side(index: Index) -> Side:
    tensors = SourceTensors(index)
    try:
        stored = stored_weights(index, F32)
    except CheckpointError as error:
        return Side(index, tensors, {}, error.message)
    return Side(index, stored.weights, {name: tensors[name] for name in stored.dropped})


def _of_meta(index: Index, assembled: Mapping[str, SourceTensor]) -> Side:
    """A checkpoint in Meta's layout, with the names of Hugging Face and its order of the rows of queries and keys."""
    model, tensors = from_meta(index.config, output_rows(assembled)), SourceTensors(index)
    roles, others = match(META, tensors)
    weights: dict[str, Weight] = {name: tensors[name] for name in others}
    for (role, layer, expert), name in roles.items():
        tensor = tensors[name]
        if role in ("q", "k") and not (model.head_size % 2 or tensor.rows % model.head_size):
            tensor = RotaryRows(name, tensor.dtype, tensor.shape, tensor.pieces, tensor.axis, model.head_size)
        weights[example(LLAMA, role, layer, expert)] = tensor
    return Side(index, weights, {})
