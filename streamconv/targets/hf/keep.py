"""--quant keep: the codes of a quantized source stay bit for bit, and get another container, or none."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from streamconv.checkpoint.dtypes import F32
from streamconv.checkpoint.quantized import SourceQuantization, source_quantization, stated_in
from streamconv.checkpoint.rows import PackedTensor, SourceTensor, content
from streamconv.checkpoint.source_tensors import SourceTensors
from streamconv.checkpoint.unknown_statements import refuse_unknown, stated_by
from streamconv.errors import CheckpointError, UsageError, printable
from streamconv.quants.decoded_rows import DecodedTensor, in_order
from streamconv.quants.given_codes import GivenZeros, Reciprocal, ZeroPoints
from streamconv.targets.hf import config_json
from streamconv.targets.hf.check import check_names
from streamconv.targets.hf.check_scales import SHARED, codes_of, unequal, wrong_scales, wrong_values
from streamconv.targets.hf.keep_ranks import keep_ranks
from streamconv.targets.hf.kept import ZERO_POINTS, Kept, compressed, left
from streamconv.targets.hf.layers import Model
from streamconv.targets.hf.recipes import METHODS, NVFP4_ARGS, recipe_of
from streamconv.targets.hf.sources import PACKED, integers
from streamconv.targets.hf.stated import group_size, read_statement
from streamconv.targets.hf.target import CONTAINERS, Container
from streamconv.targets.hf.units import Entry, Kind

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.planning.draft import Draft
    from streamconv.targets.hf.target import HuggingFace

_NVFP4 = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}
"""Container -> codes, block scales, and the two scales that one container has as reciprocals of the other's."""
_KV_SCALE = re.compile(r"(.+?)\.(?:[kv]_proj\.)?([kv])_scale")
"""Scales of the FP8 KV cache: of the attention, or, in ModelOpt's container, of k_proj and v_proj."""


def describe_kept(index: Index, target: HuggingFace, units: Sequence[Kind[Entry]], draft: Draft) -> None:
    """Describe the output to a draft.

    Raises:
        UsageError: options that would change codes, or a container that does not take them.
    """
    flags: dict[str, object] = {"--ignore": target.ignore, "--only": target.only, "--dtype": target.dtype != "auto"}
    flags["--allow-nonfinite"] = target.allow_nonfinite
    changed = [flag for flag, there in flags.items() if there]
    if changed:
        raise UsageError(f"{' and '.join(changed)}: --quant keep changes no weight")
    tensors, container = SourceTensors(index), next((container for container in CONTAINERS if container == target.format), None)
    if index.views:
        kept = keep_ranks(index, tensors, container, draft, target.model_dtype(index))
    else:
        kept = _keep(index, tensors, container, units, draft)
    kept.describe(index, target.max_shard_size)


def _keep(
    index: Index, tensors: Mapping[str, SourceTensor], container: Container | None, units: Sequence[Kind[Entry]], draft: Draft
) -> Kept:
    """What is kept of a Hugging Face source.

    Raises:
        UsageError: the source is not quantized, or has no way into this container without new codes.
        CheckpointError: tensors do not fit together.
    """
    quantization = source_quantization(index)
    if quantization is None:
        raise UsageError("--quant keep: the source is not quantized", hint="--quant none copies it")
    own = container_of(quantization)
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
        return _integers(index, tensors, quantization, draft)
    if {container, own} == {"compressed-tensors", "modelopt"} and _is_nvfp4(tensors, own):
        return _nvfp4(tensors, own, container, draft)
    raise UsageError(
        f"--quant keep: codes of {printable(quantization.title)} have no place in --format {container} as they are",
        hint="leave --format out to copy them, or quantize anew: --quant fp8_dynamic, for example",
    )


def container_of(quantization: SourceQuantization) -> str:
    """The container of a source, in the words of --format where it is one of them."""
    return "hf" if quantization.method in METHODS else quantization.method


def _as_it_is(index: Index, tensors: Mapping[str, SourceTensor], own: str, units: Sequence[Kind[Entry]], draft: Draft) -> Kept:
    config, names = stated_in(index.config), index.tensors.told()
    if not isinstance(config, dict):
        hint = "put it there, or name a --format"
        raise CheckpointError("config.json has no quantization_config: engines would take the codes for floats", hint=hint)
    folder = index.root if os.path.isdir(index.root) else index.root.parent
    statement = read_statement(group_size(folder) | config, names)
    problems, _ = check_names(folder, config, codes_of(names), names, statement, Model(index.config, units, None))
    if problems:
        raise CheckpointError(problems, hint="engines would refuse or misread these weights as they are; --quant none decodes them")
    draft.warnings += [line for line in statement.warnings if not line.startswith(tuple(stated_by(index)) or "\0")]
    kept = Kept(own, draft, lambda name, data, dtype: wrong_values(name, data, dtype, names, statement))
    for name, tensor in tensors.items():
        kept.copy(name, tensor)
    return kept


def _integers(index: Index, tensors: Mapping[str, SourceTensor], quantization: SourceQuantization, draft: Draft) -> Kept:
    """GPTQ and AutoAWQ -> pack-quantized."""
    kept, changed = Kept("compressed-tensors", draft), list[tuple[int, int, str]]()
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in PACKED and f"{module}.qweight" in tensors:
            if leaf == "qweight":
                weight = integers(tensors, module, quantization, F32)
                codes = cast(PackedTensor, weight.codes)
                changed.append((codes.bits, weight.per_col, codes.packing))
                kept.modules.append(module)
                _check_order(index, module, weight, quantization)
                _pack(kept, module, weight, codes, tensors[f"{module}.qzeros"], quantization.symmetric)
            continue
        kept.copy(name, tensor)
    if not changed:
        raise CheckpointError("the config speaks of packed weights, and there is none")
    if len({*changed}) > 1:
        raise UsageError("--quant keep: the source's layers have different groups or bits", hint="--quant none decodes them")
    bits, group, packing = changed[0]
    symmetric = packing == "gptq" and quantization.symmetric
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "strategy": "group", "group_size": group}
    if not symmetric:
        draft.warnings.append(ZERO_POINTS)
    kept.quantization = compressed("pack-quantized", weights, None, left(tensors, kept.modules, kept.container))
    return kept


def _check_order(index: Index, module: str, weight: DecodedTensor, quantization: SourceQuantization) -> None:
    """Input features come in the order of their groups: compressed-tensors had a place for another order (g_idx) until 2026.

    Raises:
        UsageError: they do not.
    """
    if not (in_order(weight.order, index.shards, weight.per_col) if weight.order is not None else not quantization.act_order):
        message = f"--quant keep: {printable(module)} has act order (desc_act), which has no place in compressed-tensors"
        raise UsageError(message, hint="--quant none decodes it")


def _pack(kept: Kept, module: str, weight: DecodedTensor, codes: PackedTensor, zeros: SourceTensor, symmetric: bool) -> None:
    bits, gptq = codes.bits, codes.packing == "gptq"
    key = f"zero points of {module}" if gptq and (symmetric or weight.lacking) else ""
    if key:
        kept.draft.reduce(zeros, ZeroPoints(key, bits, (1 << (bits - 1)) - weight.lacking if symmetric else 0))
    points = cast(SourceTensor, weight.zeros), GivenZeros(bits, not gptq, weight.lacking, key)
    kept.pack(module, codes, key if symmetric else "", weight.scales, None if gptq and symmetric else points)


def _is_nvfp4(tensors: Mapping[str, SourceTensor], own: str) -> bool:
    return own in _NVFP4 and any(name.endswith("." + _NVFP4[own][2]) for name in tensors)


def _nvfp4(tensors: Mapping[str, SourceTensor], own: str, container: Container, draft: Draft) -> Kept:
    """Codes and block scales get other names; what one container multiplies with, the other divides by."""
    kept = Kept(container, draft)
    here, there = _NVFP4[own], _NVFP4[container]
    shape = (1,) if container == "compressed-tensors" else ()
    inputs = kv = False
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if cache := _KV_SCALE.fullmatch(name):
            kv = True
            at_proj = f"{cache[2]}_proj." if container == "modelopt" else ""
            kept.copy(f"{cache[1]}.{at_proj}{cache[2]}_scale", tensor, shape)
            continue
        if f"{module}.{here[2]}" not in tensors or leaf not in here:
            kept.copy(name, tensor)
            continue
        at = here.index(leaf)
        if at < 2:
            kept.copy(f"{module}.{there[at]}", tensor)
            kept.modules += [module] if at == 0 else []
            continue
        if tensor.dtype != F32 or tensor.nbytes != 4:
            raise CheckpointError(f"{printable(name)} must be one float32 number, and is {tensor.dtype} {list(tensor.shape)}")
        inputs |= at == 3
        kept.add(f"{module}.{there[at]}", tensor, Reciprocal(), shape)
    ignore = left(tensors, kept.modules, kept.container)
    if container == "compressed-tensors":
        fed = NVFP4_ARGS | {"dynamic": "local"} if inputs else None
        kept.quantization = compressed("nvfp4-pack-quantized", NVFP4_ARGS, fed, ignore)
        kept.quantization |= {"kv_cache_scheme": config_json.KV_CACHE} if kv else {}
    else:
        recipe = recipe_of("nvfp4" if inputs else "nvfp4a16", container)
        assert recipe is not None
        kept.quantization = config_json.quantization_config(recipe, ignore, 16, kv)
        kept.second = config_json.hf_quant_config(recipe, ignore, 16, kv)
    return kept
