"""--quant keep of a TensorRT-LLM checkpoint: its codes, put together from the ranks, and its scales bit for bit in a container."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from streamconv.checkpoint.derived_rows import turned
from streamconv.checkpoint.dtypes import F8_E4M3, I32
from streamconv.checkpoint.rows import PackedTensor, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import DataError, UsageError, printable
from streamconv.lazy import Bytes, np
from streamconv.quants.decoded_rows import columns_of
from streamconv.quants.given_codes import GivenIntegers, ZeroPoints
from streamconv.quants.plain import Plain
from streamconv.targets.hf import config_json
from streamconv.targets.hf.kept import ZERO_POINTS, Kept, compressed, left
from streamconv.targets.hf.recipes import recipe_of
from streamconv.targets.hf.target import Container

if TYPE_CHECKING:
    from streamconv.checkpoint.dtypes import DType
    from streamconv.checkpoint.index import Index
    from streamconv.planning.draft import Draft

_CODES, _ROWWISE, _STATIC, _AWQ = "integers", "fp8_dynamic", "fp8_static", "w4a16"
"""Forms of a weight; the last three are formats of Hugging Face directories."""
_CONTAINERS: dict[str, tuple[Container, ...]] = {
    _CODES: ("compressed-tensors",),
    _ROWWISE: ("compressed-tensors", "modelopt"),
    _STATIC: ("compressed-tensors", "modelopt"),
    _AWQ: ("modelopt",),
}
_BESIDE = ("weight_scale", "weight_zero", "input_scale", "pre_quant_scale")
"""Last names of what stands beside codes."""
_DECODE = "--quant none decodes the weights"


class _Form(NamedTuple):
    """How a weight is stored.

    Attributes:
        kind: a key of _CONTAINERS.
        bits: of an integer.
        group: inputs that share a scale, 0 for all.
    """

    kind: str
    bits: int
    group: int


def keep_ranks(index: Index, tensors: Mapping[str, SourceTensor], container: Container | None, draft: Draft, into: DType) -> Kept:
    """Plan it.

    Args:
        into: type of what is not quantized.
        tensors: as the rank files are seen: a weight of codes has its scales beside it, under names of its own.

    Raises:
        UsageError: nothing is quantized, or it has no way into this container without new codes.
    """
    weights = [name for name in tensors if name.endswith(".weight") and f"{name}_scale" in tensors]
    if not weights:
        raise UsageError("--quant keep: the source is not quantized", hint="--quant none copies it")
    forms = {name: _form(tensors, name) for name in weights}
    counts = Counter(forms.values())
    form = counts.most_common(1)[0][0]
    if len(counts) > 1 and not all(other.kind == _CODES and other.bits == form.bits for other in counts):
        raise UsageError("--quant keep: the source's layers are stored in different forms", hint=_DECODE)
    there = _CONTAINERS[form.kind]
    if container not in (None, *there):
        message = f"--quant keep: these codes have no place in --format {container} as they are"
        raise UsageError(message, hint=f"--format {' or '.join(there)}")
    kept = Kept(container or there[0], draft, modules=[name.removesuffix(".weight") for name in weights])
    lacking = form.kind == _CODES and not _symmetric(index, tensors, weights)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _BESIDE and f"{module}.weight" in forms:
            continue
        if name not in forms:
            kept.add(name, tensor, Plain(into), tensor.shape)
        elif form.kind == _CODES:
            _pack(kept, module, cast(PackedTensor, tensor), tensors, lacking)
        else:
            _copied(kept, module, tensor, tensors)
    ignore = left(tensors, kept.modules, kept.container)
    if form.kind == _CODES:
        kept.quantization = _packed(forms, counts, not lacking, ignore)
        draft.warnings += [ZERO_POINTS] if lacking else []
        if odd := sorted({other.group for other in counts} - {0, 32, 64, 128}):
            message = f"scales are those of the inputs of a rank: groups of {odd[0]}"
            draft.warnings.append(f"{message}; transformers with compressed-tensors reads them, vLLM has kernels for 32, 64 and 128 alone")
        return kept
    recipe = recipe_of(form.kind, kept.container)
    assert recipe is not None
    if form.kind == _AWQ and not any(name.endswith(".pre_quant_scale") for name in tensors):
        recipe = replace(recipe, extra=recipe.extra | {"pre_quant_scale": False})
    kept.quantization = config_json.quantization_config(recipe, ignore, form.group)
    kept.second = config_json.hf_quant_config(recipe, ignore, form.group) if kept.container == "modelopt" else None
    return kept


def _form(tensors: Mapping[str, SourceTensor], name: str) -> _Form:
    """How a weight is stored.

    Raises:
        UsageError: in a way for which there is no container.
    """
    weight, scale = tensors[name], tensors[f"{name}_scale"]
    if isinstance(weight, PackedTensor) and weight.packing == "modelopt":
        return _Form(_AWQ, 4, weight.cols // scale.cols)
    if f"{name}_zero" in tensors:
        assert isinstance(weight, PackedTensor)
        return _Form(_CODES, weight.bits, weight.cols // scale.rows)
    if isinstance(weight, PackedTensor):
        if weight.cols * weight.bits % 32:
            raise UsageError(f"--quant keep: the {weight.cols} inputs of {printable(name)} fill no whole words", hint=_DECODE)
        return _Form(_CODES, weight.bits, weight.cols // scale.cols if scale.cols > 1 else 0)
    if scale.cols > 1:
        message = f"--quant keep: {printable(name)} has scales of {scale.cols} ranks, each for inputs of its own"
        message += ", which no FP8 container holds"
        raise UsageError(message, hint=_DECODE)
    static = f"{name.removesuffix('.weight')}.input_scale" in tensors
    if static and scale.shape != (1,):
        message = f"--quant keep: {printable(name)} was made of matrices with scales of their own; a container has one for it"
        raise UsageError(message, hint=_DECODE)
    assert weight.dtype == F8_E4M3
    return _Form(_STATIC if static else _ROWWISE, 8, 0)


def _symmetric(index: Index, tensors: Mapping[str, SourceTensor], weights: list[str]) -> bool:
    """Whether the zeros of the first and last group of all weights say that there are no zero points; a run looks at the others."""
    for name in weights:
        zeros = tensors.get(f"{name}_zero")
        if zeros is None:
            continue
        stored = np.empty(zeros.stored_row_bytes, np.uint8)
        for group in {0, zeros.rows - 1}:
            zeros.read_part(index.shards, (group, group + 1), (0, zeros.cols), stored)
            if bool((stored.view(np.uint16) & 0x7FFF).any()):  # zero of either sign is none
                return False
    return True


def _pack(kept: Kept, module: str, codes: PackedTensor, tensors: Mapping[str, SourceTensor], lacking: bool) -> None:
    """Integers as compressed-tensors packs them.

    Args:
        lacking: there are zero points.
    """
    scale, zeros = tensors[f"{module}.weight_scale"], tensors.get(f"{module}.weight_zero")
    if zeros is None:
        kept.pack(module, codes, "", scale, None)
        return
    points = zero_words(scale, zeros, codes.bits)
    key = "" if lacking else f"zero points of {module}"
    if key:
        kept.draft.reduce(points, ZeroPoints(key, codes.bits, 1 << (codes.bits - 1)))
    kept.pack(module, codes, key, turned(scale), (points, Plain(points.dtype)) if lacking else None)


def _copied(kept: Kept, module: str, codes: SourceTensor, tensors: Mapping[str, SourceTensor]) -> None:
    """FP8 and W4A16_AWQ: bytes as they are, scales in the shape of the container."""
    scale, modelopt = tensors[f"{module}.weight_scale"], kept.container == "modelopt"
    if isinstance(codes, PackedTensor):
        kept.add(f"{module}.weight", codes, GivenIntegers("pairs"), (codes.rows // 2, codes.cols))
        kept.copy(f"{module}.weight_scale", scale)
        if inputs := tensors.get(f"{module}.pre_quant_scale"):
            kept.copy(inputs.name, inputs)
        return
    kept.copy(f"{module}.weight", codes)
    inputs = tensors.get(f"{module}.input_scale")
    whole: tuple[int, ...] = () if modelopt else (1,)
    kept.copy(f"{module}.weight_scale", scale, whole if inputs else (scale.rows,) if modelopt else (scale.rows, 1))
    if inputs:
        kept.copy(inputs.name, inputs, whole)


def _packed(forms: Mapping[str, _Form], counts: Mapping[_Form, int], symmetric: bool, left: list[str]) -> dict[str, Any]:
    """`quantization_config` of pack-quantized; where weights differ the rarer ones are named by the last parts of their names."""
    arguments: dict[str, Any] = {}
    for number, form in enumerate(sorted(counts, key=lambda form: -counts[form])):
        args = {"num_bits": form.bits, "type": "int", "symmetric": symmetric, "dynamic": False}
        args |= {"strategy": "group", "group_size": form.group} if form.group else {"strategy": "channel"}
        config = compressed("pack-quantized", args, None, left)
        if not number:
            arguments = config
            continue
        ends = {name.split(".")[-2] for name, own in forms.items() if own == form}
        others = {name.split(".")[-2] for name, own in forms.items() if own != form}
        targets = [f"re:.*\\.{re.escape(end)}$" for end in sorted(ends - others)]
        targets += [name.removesuffix(".weight") for name, own in forms.items() if own == form and name.split(".")[-2] in others]
        arguments["config_groups"][f"group_{number}"] = config["config_groups"]["group_0"] | {"targets": targets}
    return arguments


@dataclass(frozen=True, slots=True)
class ZeroWords(SourceTensor):
    """Zero points [N * bits / 32, groups], int32 words of unsigned integers, the lowest channel in the lowest bits.

    A TensorRT-LLM checkpoint has (half - zero point) * scale in the model's type instead, half being 2^(bits-1).

    Attributes:
        scales, zeros: float [groups, N].
    """

    scales: SourceTensor = field(kw_only=True)
    zeros: SourceTensor = field(kw_only=True)
    bits: int = field(kw_only=True)

    @property
    def scratch_row_bytes(self) -> int:
        return 24 * self.cols * 32 // self.bits

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        each, groups, half = 32 // self.bits, self.cols, 1 << (self.bits - 1)
        scales, zeros = (columns_of(tensor, shards, start * each, stop * each) for tensor in (self.scales, self.zeros))
        with np.errstate(all="ignore"):
            below = np.where(scales == 0, np.float32(0), np.rint(zeros / scales))
            whole = np.abs(below * scales - zeros) <= np.abs(zeros) * np.float32(2.0**-8)  # a rounding to bfloat16
        points = half - below
        if not bool((whole & (points >= 0) & (points < 2 * half)).all()):
            message = f"{printable(self.name)} has zeros that are no whole number of {self.bits} bits times their scale"
            raise DataError(message, hint="--quant none decodes it")
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)[None, :, None]
        words = points.T.astype(np.uint32).reshape(stop - start, each, groups) << shifts
        out.view(np.uint32)[:] = np.bitwise_or.reduce(words, 1).reshape(-1)


def zero_words(scales: SourceTensor, zeros: SourceTensor, bits: int) -> ZeroWords:
    """Zero points of group-wise integers."""
    shape = (zeros.cols * bits // 32, zeros.rows)
    return ZeroWords(zeros.name, I32, shape, (*zeros.pieces, *scales.pieces), scales=scales, zeros=zeros, bits=bits)
