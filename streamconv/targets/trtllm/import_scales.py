"""Sources quantized already: which tensors belong together, and where their scales go.

A packed weight takes part in a plan under the name `<module>.weight`, so that the family tables serve it; its scales
follow afterwards: wherever rows and columns of a weight went, the scales of those rows and columns go too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import BF16, F8_E4M3, F16, F32, I8, I32, U8, DType
from streamconv.checkpoint.quantized import SourceQuantization
from streamconv.checkpoint.rows import PackedTensor, SourceTensor, content, gptq_or_awq
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.source_tensors import Changed
from streamconv.errors import RefusedError, printable
from streamconv.families import Family
from streamconv.families.matching import match
from streamconv.lazy import np
from streamconv.targets.trtllm.lookup import LINEAR, SCALE, ZERO
from streamconv.targets.trtllm.recipes.gptq import EXPERTS

if TYPE_CHECKING:
    from streamconv.checkpoint.codes_file import Codes

_KV = re.compile(r"\.([0-9]{1,9})\.[^0-9]*\.[kv]_scale$")
_SCALES = (F16, BF16, F32)
_GAP = 1 << 16
"""Bytes between two of them that are read rather than skipped: for a model of the Hub each read is a request."""
_PREQUANT = (".pre_quant_scale", ".input_quantizer._pre_quant_scale")


@dataclass(frozen=True, slots=True)
class Scales:
    """What belongs to one stored weight.

    Attributes:
        scales: float [K/g, N] (GPTQ, AutoAWQ), [N, K/g] (ModelOpt) or [N, 1] (fbgemm).
        zeros: qzeros, int32 [K/g, N*bits/32]; None for symmetric formats.
        inputs: multiplier of each input channel [K] (ModelOpt), None for ones.
        group: input channels that share a scale, 0 for all of them.
    """

    scales: SourceTensor
    zeros: SourceTensor | None
    inputs: SourceTensor | None
    group: int


@dataclass(slots=True)
class Stored:
    """The tensors of a source, with packed weights put together.

    Attributes:
        tensors: name -> tensor; a packed weight stands under "<module>.weight".
        scales: weight name -> what belongs to it.
        v1: GPTQ zeros are stored less one.
        problems: what does not fit together, one line each.
        fp8: weight name -> (its scale, that of its input), of a ModelOpt FP8 export.
        kv: layer -> scale of its FP8 KV cache there, the larger of both.
    """

    tensors: MutableMapping[str, SourceTensor]
    scales: dict[str, Scales] = field(default_factory=dict)
    v1: bool = True
    problems: list[str] = field(default_factory=list)
    fp8: dict[str, tuple[float, float]] = field(default_factory=dict)
    kv: dict[int, float] = field(default_factory=dict)

    def take(self, name: str, shape_of: str, dtypes: Sequence[DType]) -> SourceTensor | None:
        """Remove and return a tensor that `shape_of` needs."""
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            self.problems.append(f"missing tensor {printable(name)}, which {printable(shape_of)} needs")
        elif tensor.dtype not in dtypes or len(tensor.shape) > 2:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            self.problems.append(f"{printable(name)}: {tensor.dtype} {list(tensor.shape)} is not a {expected} matrix")
            return None
        return tensor


def assemble(tensors: Mapping[str, SourceTensor], quantization: SourceQuantization | None, bits: int, shards: Sequence[Shard]) -> Stored:
    """Put the packed weights of a source together.

    Args:
        bits: 4 or 8, bits of a weight where the source states none.
        shards: for g_idx, the only content that is read.
    """
    stored = Stored(Changed(tensors), v1=quantization is None or quantization.format != "gptq_v2")
    for name in tensors:
        if name.endswith(".qweight"):
            _grouped(stored, name, quantization, bits, shards)
    if quantization is not None and quantization.brings_scales:
        read_fp8(stored, shards)
        return stored
    for name in tensors:
        if name.endswith(".weight") and name[:-7] + ".weight_scale" in tensors:
            tensor = tensors[name]
            if tensor.dtype == F8_E4M3:
                _fbgemm(stored, name)
            elif tensor.dtype in (U8, I8):
                _modelopt(stored, name)
    return stored


def _grouped(stored: Stored, name: str, quantization: SourceQuantization | None, bits: int, shards: Sequence[Shard]) -> None:
    """GPTQ and AutoAWQ; the shapes tell which."""
    from streamconv.quants.decoded_rows import in_order

    module = name[: -len(".qweight")]
    weight = stored.take(name, name, (I32,))
    zeros = stored.take(module + ".qzeros", name, (I32,))
    scales = stored.take(module + ".scales", name, _SCALES)
    order = stored.tensors.pop(module + ".g_idx", None)
    if weight is None or zeros is None or scales is None:
        return
    bits = quantization.bits if quantization is not None and quantization.bits else bits
    if bits not in (4, 8):
        stored.problems.append(f"{printable(name)}: {bits}-bit weights have no place in TensorRT-LLM; 4 or 8 have")
        return
    groups, n = scales.rows, scales.cols
    packing, k, fits = gptq_or_awq(weight, zeros, scales, bits)
    method, form = (quantization.method, quantization.format) if quantization is not None else ("", None)
    problem = ""
    if not fits:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (weight, zeros, scales))
        problem = f"qweight, qzeros, scales {shapes} do not fit together at {bits} bits"
    elif quantization is not None and method in ("gptq", "awq") and method != packing:
        problem = f"{quantization.stated_in} says {method}, the shapes say {packing}"
    elif packing == "awq" and form not in (None, "gemm"):
        problem = f"AWQ version {form!r} is not supported, only GEMM is"
    elif packing == "gptq" and form not in (None, "gptq", "gptq_v2"):
        # zero points mean one thing in "gptq" and another in "gptq_v2"; of others nothing is known
        problem = f"GPTQ checkpoint_format {form!r} is not supported, gptq and gptq_v2 are"
    if problem:
        stored.problems.append(f"{printable(name if fits else module)}: {problem}")
        return
    ordered = quantization is None or not quantization.act_order
    if order is not None and (order.dtype != I32 or order.shape != (k,)):
        stored.problems.append(f"{printable(order.name)}: {order.dtype} {list(order.shape)} is not I32 [{k}]")
    elif not (ordered if order is None else in_order(order, shards, k // groups)):
        why = "act-order (desc_act) weights have no place in TensorRT-LLM; use a checkpoint made with desc_act false"
        stored.problems.append(f"{printable(module)}.g_idx: {why}")
    _add(stored, module, weight, (n, k), bits, packing, Scales(scales, zeros, None, k // groups))


def _modelopt(stored: Stored, name: str) -> None:
    """ModelOpt AWQ: two channels in a byte, F32 scales [N, K/g]."""
    module = name[: -len(".weight")]
    weight = stored.take(name, name, (U8, I8))
    scales = stored.take(module + ".weight_scale", name, _SCALES)
    prequant = [stored.tensors.pop(module + suffix) for suffix in _PREQUANT if module + suffix in stored.tensors]
    if weight is None or scales is None:
        return
    n, k, groups = 2 * weight.rows, weight.cols, scales.cols
    inputs = prequant[0] if prequant else None
    if scales.rows != n or k % groups or len(scales.shape) != 2 or (inputs is not None and inputs.shape != (k,)):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (weight, scales, *prequant))
        stored.problems.append(f"{printable(module)}: weight, weight_scale, pre_quant_scale {shapes} are not ModelOpt AWQ's")
        return
    _add(stored, module, weight, (n, k), 4, "modelopt", Scales(scales, None, inputs, k // groups))


def _fbgemm(stored: Stored, name: str) -> None:
    """FP8 weight with one scale for each output channel."""
    module = name[: -len(".weight")]
    weight = stored.tensors[name]
    scales = stored.take(module + ".weight_scale", name, (F32,))
    stored.tensors.pop(module + ".input_scale_ub", None)
    if scales is None:
        return
    if scales.shape not in ((weight.rows, 1), (weight.rows,)):
        stored.problems.append(f"{printable(scales.name)}: {list(scales.shape)} is not one scale for each output channel")
        return
    stored.scales[name] = Scales(scales, None, None, 0)


def read_fp8(stored: Stored, shards: Sequence[Shard]) -> None:
    """ModelOpt FP8: a scale for each weight and for its input, and of the KV cache."""
    owners: dict[str, list[SourceTensor]] = {}
    for name in [name for name, tensor in stored.tensors.items() if name.endswith(".weight") and tensor.dtype == F8_E4M3]:
        module = name.removesuffix(".weight")
        taken = [stored.take(module + suffix, name, _SCALES) for suffix in (".weight_scale", ".input_scale")]
        owners[name] = [tensor for tensor in taken if tensor is not None]
    layers = {name: int(cache[1]) for name in stored.tensors if (cache := _KV.search(name))}
    caches = [stored.tensors.pop(name) for name in layers]
    values = read_scalars([tensor for owned in (*owners.values(), caches) for tensor in owned], shards)
    for name, value in values.items():
        if not is_scale(value):
            shown = "more than one number" if value is None else f"{value:g}"
            stored.problems.append(f"{printable(name)} is {shown}, not the scale of a whole matrix")
    if stored.problems:
        return
    stored.fp8 = {name: (values[weight.name] or 0.0, values[fed.name] or 0.0) for name, (weight, fed) in owners.items()}
    for name, layer in layers.items():
        stored.kv[layer] = max(stored.kv.get(layer, 0.0), values[name] or 0.0)


def _add(stored: Stored, module: str, weight: SourceTensor, shape: tuple[int, int], bits: int, packing: str, scales: Scales) -> None:
    name = module + ".weight"
    if name in stored.tensors:
        stored.problems.append(f"{printable(name)} is there next to {printable(weight.name)}")
        return
    stored.tensors[name] = PackedTensor(weight.name, I8, shape, weight.pieces, 0, bits, packing, module)
    stored.scales[weight.name] = scales


def take_stored(tensors: Mapping[str, SourceTensor]) -> Stored:
    """The tensors of a checkpoint, the scales of codes apart."""
    stored = Stored(Changed(tensors))
    for name in tensors:
        if name.endswith(".weight" + SCALE):
            weight, scales = name.removesuffix(SCALE), stored.tensors.pop(name)
            zeros = stored.tensors.pop(weight + ZERO, None)
            group = tensors[weight].cols // scales.rows if zeros is not None else 0
            stored.scales[weight] = Scales(scales, zeros, None, group)
    return stored


def take_codes(stored: Stored, family: Family, codes: Codes) -> None:
    """Put the codes that a search found in the place of the linear layers' weights."""
    for (role, _, _), name in match(family, stored.tensors)[0].items():
        if role.startswith("expert"):
            raise RefusedError([EXPERTS])
        if role in LINEAR:
            codes_of = codes.found(name.removesuffix(".weight"), stored.tensors[name].shape, name)
            stored.tensors[name] = codes_of.codes
            stored.scales[name] = Scales(codes_of.scales, None, codes_of.multiplier, codes_of.group)


def zero_biases(stored: Stored, unused: Sequence[str], shards: Sequence[Shard]) -> list[str]:
    """Unused biases of packed weights that hold only zeros: early AutoGPTQ writes one for every layer."""
    if not unused:
        return []
    modules = {
        tensor.module + ".bias" for tensor in stored.tensors.values() if isinstance(tensor, PackedTensor) and tensor.packing == "gptq"
    }
    return [name for name in unused if name in modules and not any(content(stored.tensors[name], shards))]


def is_scale(value: float | None) -> bool:
    """Whether a number can be what codes are multiplied with."""
    return value is not None and math.isfinite(value) and value > 0


def read_scalars(tensors: Sequence[SourceTensor], shards: Sequence[Shard]) -> dict[str, float | None]:
    """Name -> value as float32; None for a tensor that has another number of elements than one."""
    from streamconv.checkpoint.stored_codes import as_float

    values: dict[str, float | None] = {tensor.name: None for tensor in tensors}
    ordered = sorted((t for t in tensors if t.rows * t.cols == 1), key=lambda t: (t.pieces[0].shard, t.pieces[0].begin))
    while ordered:
        first = ordered[0].pieces[0]
        near, end = 0, first.begin
        for tensor in ordered:
            piece = tensor.pieces[0]
            if piece.shard != first.shard or piece.begin - end > _GAP:
                break
            near, end = near + 1, piece.begin + tensor.nbytes
        with shards[first.shard].window(first.begin, end) as window:
            for tensor in ordered[:near]:
                at = tensor.pieces[0].begin - first.begin
                stored = np.frombuffer(bytes(window[at : at + tensor.nbytes]), np.uint8)
                values[tensor.name] = float(as_float(stored, tensor.dtype.name)[0])
        ordered = ordered[near:]
    return values
