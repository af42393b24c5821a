"""--quant keep: the codes of a quantized source stay bit for bit, and get another container, or none."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamconv.checkpoint.derived_rows import turned
from streamconv.checkpoint.dtypes import F32, FLOATS, I64
from streamconv.checkpoint.quantized import SourceQuantization, source_quantization
from streamconv.checkpoint.rows import SourceTensor, content
from streamconv.checkpoint.unknown_statements import refuse_unknown, stated_by
from streamconv.errors import CheckpointError, UsageError, printable
from streamconv.planning.matrix_table import Named
from streamconv.quants.act_order import in_order
from streamconv.quants.base import Codec
from streamconv.quants.given_codes import GivenZeros, Reciprocal, Words, ZeroPoints
from streamconv.quants.plain import Plain
from streamconv.targets.hf import config_json
from streamconv.targets.hf.check import check_names
from streamconv.targets.hf.check_scales import SHARED, codes_of, has_values_to_check, unequal, wrong_scales, wrong_values
from streamconv.targets.hf.ignored import ignored
from streamconv.targets.hf.kept_values import checked
from streamconv.targets.hf.layers import Model
from streamconv.targets.hf.packed_sources import PACKED, Integers, integers
from streamconv.targets.hf.recipes import METHODS, NVFP4_FP4, recipe_of
from streamconv.targets.hf.second_file import group_size
from streamconv.targets.hf.stated import read_statement
from streamconv.targets.hf.target import Container
from streamconv.targets.hf.units import Kind
from streamconv.targets.hf.weights import Told

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.planning.draft import Draft

ZERO_POINTS = "the weights have zero points: vLLM reads them, transformers (5.24 with compressed-tensors 0.20) does not"
_NVFP4 = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}
"""Container -> codes, block scales, and the two scales that one container has as reciprocals of the other's."""
_KV_SCALE = re.compile(r"(.+?)\.(?:[kv]_proj\.)?([kv])_scale")
"""Scales of the FP8 KV cache: of the attention, or, in ModelOpt's container, of k_proj and v_proj."""


@dataclass(slots=True)
class Kept:
    """What --quant keep makes of a source.

    Attributes:
        tensors: output tensor -> a function that adds it to a file of the draft; in the order of the source.
        files: output tensor -> number of the source's file.
        nbytes: output tensor -> about how many bytes of it.
        quantization: `quantization_config` of the output; None leaves the source's.
        second: ModelOpt's file of its own.
        container: of the output.
        modules: names of what is quantized.
    """

    container: str
    tensors: dict[str, Callable[[int], None]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    second: bytes | None = None
    modules: list[str] = field(default_factory=list)


def keep(index: Index, tensors: Mapping[str, SourceTensor], container: Container | None, units: Sequence[Kind[Told]], draft: Draft) -> Kept:
    """Plan it.

    Raises:
        UsageError: the source is not quantized, or has no way into this container without new codes.
        CheckpointError: tensors do not fit together.
    """
    stated = source_quantization(index)
    if stated is None:
        raise UsageError("--quant keep: the source is not quantized", hint="--quant none copies it")
    own = container_of(stated)
    shared = {name: content(tensors[name], index.shards) for name in tensors if name.endswith(SHARED) and tensors[name].nbytes == 4}
    wrong = {name: wrong_scales(name, data, tensors[name].dtype.name) for name, data in shared.items()}
    problems = [f"{printable(name)} holds {odd}" for name, odd in wrong.items() if odd] or [*unequal(shared)]
    if problems:
        raise CheckpointError(problems, hint="the checkpoint is damaged, or made by a tool that engines do not follow")
    if container is None or container == own:
        draft.warnings += [f"{line}: it is kept as it is" for line in stated_by(index)]
        return _as_it_is(index, tensors, own, units, draft)
    refuse_unknown(index, "without --format codes and statement stay as they are")
    if container == "compressed-tensors" and own in ("awq", "gptq"):
        return _integers(index, tensors, stated, draft)
    if {container, own} == {"compressed-tensors", "modelopt"} and _is_nvfp4(tensors, own):
        return _nvfp4(tensors, own, container, draft)
    raise UsageError(
        f"--quant keep: codes of {printable(stated.title)} have no place in --format {container} as they are",
        hint="leave --format out to copy them, or quantize anew: --quant fp8_dynamic, for example",
    )


def container_of(stated: SourceQuantization) -> str:
    """The container of a source, in the words of --format where it is one of them."""
    return "hf" if stated.method in METHODS else stated.method


class Maker:
    """Adds tensors to `Kept`.

    Args:
        wrong: (name, bytes, dtype) -> what of a copied tensor cannot be, in words.
    """

    def __init__(self, kept: Kept, draft: Draft, wrong: Callable[[str, bytes, str], str] = wrong_scales) -> None:
        self.kept, self.draft, self._wrong = kept, draft, wrong

    def add(self, name: str, source: SourceTensor, codec: Codec, shape: tuple[int, ...]) -> None:
        if isinstance(codec, Plain) and has_values_to_check(name):
            whole = name.endswith(("g_idx", ".weight_shape"))
            source = checked(source, lambda data: self._wrong(name, data, codec.dtype.name), whole)

        def made(file: int) -> None:
            matrix = self.draft.matrix(file, name, source.rows, source.cols, codec, spelling=Named(shape))
            self.draft.feed(matrix, source, 0, source.rows)

        self._put(name, source, source.nbytes, made)

    def copy(self, name: str, source: SourceTensor, shape: tuple[int, ...] | None = None) -> None:
        self.add(name, source, Plain(source.dtype), source.shape if shape is None else shape)

    def fixed(self, name: str, like: SourceTensor, values: tuple[int, ...]) -> None:
        data = struct.pack(f"<{len(values)}q", *values)
        self._put(name, like, len(data), lambda file: self.draft.constant(file, name, I64, (len(values),), data))

    def _put(self, name: str, source: SourceTensor, nbytes: int, made: Callable[[int], None]) -> None:
        if name in self.kept.tensors:
            raise CheckpointError(f"{printable(name)} would be there twice")
        self.kept.tensors[name], self.kept.files[name], self.kept.nbytes[name] = made, source.pieces[0].shard, nbytes


def _as_it_is(index: Index, tensors: Mapping[str, SourceTensor], own: str, units: Sequence[Kind[Told]], draft: Draft) -> Kept:
    stated, told = index.config.get("quantization_config"), index.tensors.told()
    if not isinstance(stated, dict):
        hint = "put it there, or name a --format"
        raise CheckpointError("config.json has no quantization_config: engines would take the codes for floats", hint=hint)
    folder = index.root if os.path.isdir(index.root) else index.root.parent
    statement = read_statement(group_size(folder) | stated, told)
    problems, _ = check_names(folder, stated, codes_of(told), told, statement, Model(index.config, units, None))
    if problems:
        raise CheckpointError(problems, hint="engines would refuse or misread these weights as they are; --quant none decodes them")
    draft.warnings += [line for line in statement.warnings if not line.startswith(tuple(stated_by(index)) or "\0")]
    kept = Kept(own)
    maker = Maker(kept, draft, lambda name, data, dtype: wrong_values(name, data, dtype, told, statement))
    for name, tensor in tensors.items():
        maker.copy(name, tensor)
    return kept


def _integers(index: Index, tensors: Mapping[str, SourceTensor], stated: SourceQuantization, draft: Draft) -> Kept:
    """GPTQ and AutoAWQ -> pack-quantized."""
    kept = Kept("compressed-tensors")
    maker, found = Maker(kept, draft), list[Integers]()
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in PACKED and f"{module}.qweight" in tensors:
            if leaf == "qweight":
                found.append(integers(tensors, module, stated))
                kept.modules.append(module)
                _check_order(index, module, found[-1], stated)
                _packed(maker, module, found[-1], stated.symmetric)
            continue
        maker.copy(name, tensor)
    if not found:
        raise CheckpointError("the config speaks of packed weights, and there is none")
    kinds = {(one.codes.bits, one.group, one.codes.packing) for one in found}
    if len(kinds) > 1:
        raise UsageError("--quant keep: the source's layers have different groups or bits", hint="--quant none decodes them")
    bits, group, packing = kinds.pop()
    symmetric = packing == "gptq" and stated.symmetric
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "strategy": "group", "group_size": group}
    if not symmetric:
        draft.warnings.append(ZERO_POINTS)
    kept.quantization = compressed("pack-quantized", weights, None, left(tensors, kept.modules, kept.container))
    return kept


def _check_order(index: Index, module: str, one: Integers, stated: SourceQuantization) -> None:
    """Input features come in the order of their groups: compressed-tensors had a place for another order (g_idx) until 2026.

    Raises:
        UsageError: they do not.
    """
    if not (in_order(one.order, index.shards, one.group) if one.order is not None else not stated.act_order):
        told = f"--quant keep: {printable(module)} has act order (desc_act), which has no place in compressed-tensors"
        raise UsageError(told, hint="--quant none decodes it")


def _packed(maker: Maker, module: str, one: Integers, symmetric: bool) -> None:
    n, k = one.codes.shape
    bits, gptq = one.codes.bits, one.codes.packing == "gptq"
    key = f"zero points of {module}" if gptq and (symmetric or one.offset) else ""
    if key:
        maker.draft.reduce(one.zeros, ZeroPoints(key, bits, (1 << (bits - 1)) - one.offset if symmetric else 0))
    maker.add(f"{module}.weight_packed", one.codes, Words(bits, key if symmetric else ""), (n, k * bits // 32))
    maker.copy(f"{module}.weight_scale", turned(one.scales))
    if not (gptq and symmetric):
        zeros = turned(one.zeros)
        maker.add(f"{module}.weight_zero_point", zeros, GivenZeros(bits, not gptq, one.offset, key), zeros.shape)
    maker.fixed(f"{module}.weight_shape", one.codes, (n, k))


def _is_nvfp4(tensors: Mapping[str, SourceTensor], own: str) -> bool:
    return own in _NVFP4 and any(name.endswith("." + _NVFP4[own][2]) for name in tensors)


def _nvfp4(tensors: Mapping[str, SourceTensor], own: str, container: Container, draft: Draft) -> Kept:
    """Codes and block scales get other names; what one container multiplies with, the other divides by."""
    kept = Kept(container)
    maker = Maker(kept, draft)
    here, there = _NVFP4[own], _NVFP4[container]
    shape = (1,) if container == "compressed-tensors" else ()
    inputs = kv = False
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if cache := _KV_SCALE.fullmatch(name):
            kv = True
            at_proj = f"{cache[2]}_proj." if container == "modelopt" else ""
            maker.copy(f"{cache[1]}.{at_proj}{cache[2]}_scale", tensor, shape)
            continue
        if f"{module}.{here[2]}" not in tensors or leaf not in here:
            maker.copy(name, tensor)
            continue
        at = here.index(leaf)
        if at < 2:
            maker.copy(f"{module}.{there[at]}", tensor)
            kept.modules += [module] if at == 0 else []
            continue
        if tensor.dtype != F32 or tensor.nbytes != 4:
            raise CheckpointError(f"{printable(name)} must be one float32 number, and is {tensor.dtype} {list(tensor.shape)}")
        inputs |= at == 3
        maker.add(f"{module}.{there[at]}", tensor, Reciprocal(), shape)
    ignore = left(tensors, kept.modules, kept.container)
    if container == "compressed-tensors":
        args = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor_group", **NVFP4_FP4}
        kept.quantization = compressed("nvfp4-pack-quantized", args, args | {"dynamic": "local"} if inputs else None, ignore)
        kept.quantization |= {"kv_cache_scheme": config_json.KV_CACHE} if kv else {}
    else:
        recipe = recipe_of("nvfp4" if inputs else "nvfp4a16", container)
        assert recipe is not None
        kept.quantization = config_json.quantization_config(recipe, ignore, 16, kv)
        kept.second = config_json.hf_quant_config(recipe, ignore, 16, kv)
    return kept


def compressed(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of kept codes: args of weights, and of inputs where these are quantized."""
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": dict(weights), "format": form}
    return config_json.compressed(form, scheme | ({"input_activations": dict(inputs)} if inputs is not None else {}), ignore)


def left(tensors: Mapping[str, SourceTensor], quantized: list[str], container: str) -> list[str]:
    """What the config says of every linear-like module that is stored as floats."""
    found = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype.name in FLOATS
    }
    return ignored(found - {*quantized}, quantized, container)

