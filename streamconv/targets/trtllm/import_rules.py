"""Which quantized sources may be taken over by which --quant, decided before any tensor is looked at."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from streamconv.checkpoint.dtypes import F8_E4M3
from streamconv.checkpoint.quantized import SourceQuantization, source_quantization
from streamconv.errors import RefusedError
from streamconv.families.base import Family
from streamconv.families.meta import META
from streamconv.hub import open_source
from streamconv.targets.trtllm.expected_forms import EXCLUDED
from streamconv.targets.trtllm.import_scales import Stored
from streamconv.targets.trtllm.lookup import MODULES, TensorLookup
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import Quant, refused
from streamconv.targets.trtllm.recipes.awq import Awq
from streamconv.targets.trtllm.recipes.fp8 import CLAMP, Fp8GivenQuant, Fp8RowwiseQuant
from streamconv.targets.trtllm.recipes.gptq import EXPERTS, GROUP_SIZES

GROUPED = ("int4_gptq", "int8_gptq", "int4_awq")


def brings_scales(source: str | Path) -> bool:
    """Whether `--quant fp8` takes over the scales of a source and needs no activation ranges."""
    with contextlib.closing(open_source(source)) as index:
        quantization = source_quantization(index)
    return quantization is not None and quantization.brings_scales


def import_prequantized(options: TensorRTLLM, quantization: SourceQuantization | None, experts: int = 0) -> TensorRTLLM:
    """The options with the quantization that the source brings along; the source must be one that can be taken over.

    Args:
        experts: how many the model has.

    Raises:
        RefusedError: it cannot, or --quant asks for something else; says what to do.
    """
    if quantization is None:
        return options
    key, group = _key(quantization), quantization.group_size or options.group_size
    if key in GROUPED:
        if experts:
            raise RefusedError([f"{quantization.stated_in}: quantized already ({quantization.title}); {EXPERTS}"])
        if group not in GROUP_SIZES:
            said = "one scale for a whole column (group_size -1)" if group == -1 else f"groups of {group}"
            raise RefusedError(
                [f"{quantization.stated_in}: {said}; TensorRT-LLM has kernels for groups of 64 and 128 only"],
                hint="requantize with one of these sizes, or start from the unquantized model",
            )
    if quantization.kv_algo == "FP8" and key == "fp8" and options.kv_cache is None:
        options = dataclasses.replace(options, kv_cache="fp8")
    if options.quant == "none":
        if quantization.method in ("gptq", "awq") and options.target_version == "0.16":
            sm = "" if options.target_sm else " --target-sm SM"
            raise RefusedError(
                [f"{quantization.stated_in}: quantized already ({quantization.method}); 0.16 does not take that over by itself"],
                hint=f"add --quant {key} --group-size {group}{sm}",
            )
        return dataclasses.replace(options, quant=key, group_size=group if key in GROUPED else options.group_size)
    if options.quant != key:
        raise RefusedError(
            [f"{quantization.stated_in}: quantized already ({quantization.title}); --quant {options.quant} cannot start from it"],
            hint=f"use --quant {key}, or start from the unquantized model",
        )
    if key in GROUPED and group != options.group_size:
        raise RefusedError([f"--group-size {options.group_size}: {quantization.stated_in} says {group}"], hint=f"use --group-size {group}")
    return options


def _key(quantization: SourceQuantization) -> str:
    """The --quant that takes this source over."""
    if quantization.method == "gptq" and quantization.bits in (4, 8, None):
        return f"int{quantization.bits or 4}_gptq"
    if quantization.method == "awq" and quantization.bits in (4, None):
        return "int4_gptq"
    if quantization.method == "fbgemm_fp8":
        return "fp8_rowwise"
    if quantization.method == "modelopt" and quantization.algo == "W4A16_AWQ":
        return "int4_awq"
    if quantization.brings_scales:
        return "fp8"
    known = refused(quantization.algo) if quantization.algo else None
    why = f": {known[0]}" if known else ""
    raise RefusedError(
        [f"{quantization.stated_in}: already quantized ({quantization.title}), not in a way that can be taken over{why}"],
        hint=known[1] if known else "start from the unquantized model",
    )


def refusals(options: TensorRTLLM, kv: int) -> Iterator[str]:
    """What formats with groups, or with a scale for each row, rule out."""
    few = f"--quant {options.quant}: --tp-size {options.tp_size} is more than num_key_value_heads {kv};"
    if options.quant in GROUPED and kv < options.tp_size:
        yield f"{few} TensorRT-LLM does not handle that for group-wise weights"
    if options.quant in GROUPED and options.remove_duplicated_kv_heads:
        yield f"--quant {options.quant}: --remove-duplicated-kv-heads works on unquantized weights only"
    if options.quant == "fp8_rowwise" and kv < options.tp_size and not options.use_meta_fp8_rowwise_recipe:
        yield f"{few} --use-meta-fp8-rowwise-recipe leaves attention out"


def given_problems(options: TensorRTLLM, quant: Quant) -> Iterator[str]:
    """What a source that brings codes or scales along rules out: an FP8 one with some layers left in 16 bits, a search for scales."""
    if options.method is not None and options.codes is None and not (isinstance(quant, Awq) and quant.packings is None):
        yield f"--method {options.method} is for --quant int4_awq of a float model"
    elif isinstance(quant, Fp8GivenQuant) and quant.left_out and options.pp_size > 1:
        layer, module = quant.left_out[0]
        why = "and config.json can only say that of a layer of all stages alike; use --pp-size 1"
        yield f"--pp-size {options.pp_size}: {module} of layer {layer} is not FP8 in the source, {why}"


def group_problems(options: TensorRTLLM, stored: Stored) -> Iterator[str]:
    """Sources whose groups are not those of --group-size."""
    groups = {name: one.group for name, one in stored.scales.items()} if options.quant in GROUPED else {}
    unknown = [name for name, group in groups.items() if group not in GROUP_SIZES]
    other = unknown or [name for name, group in groups.items() if group != options.group_size]
    if other:
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        message = f"{other[0]} has groups of {groups[other[0]]}{more};"
        if unknown:
            yield f"{message} TensorRT-LLM has kernels for groups of 64 and 128 only"
        else:
            yield f"--group-size {options.group_size}: {message} use --group-size {groups[other[0]]}"


def config_entries(options: TensorRTLLM, quant: Quant) -> dict[str, object]:
    """What config.json must say of the quantization, whatever the family writes."""
    if options.quant in GROUPED:
        awq = options.quant == "int4_awq"
        return {"group_size": options.group_size, "has_zero_point": not awq, "pre_quant_scale": awq}
    if isinstance(quant, Fp8GivenQuant) and quant.left_out:
        names = [f"transformer.layers.{layer}.{module}" for layer, module in quant.left_out]
        return {"exclude_modules": [*EXCLUDED, *names]}
    if options.quant == "fp8_rowwise":
        bound = quant.bound if isinstance(quant, Fp8RowwiseQuant) else CLAMP
        return {"clamp_val": [-bound, bound], "use_meta_recipe": options.use_meta_fp8_rowwise_recipe}
    return {}


def quant_for(
    quant: Quant,
    options: TensorRTLLM,
    family: Family,
    quantization: SourceQuantization | None,
    stored: Stored,
    roles: TensorLookup,
    bound: float | None,
) -> Quant:
    """The quant of --quant, told what the source has done already.

    Args:
        bound: that FP8 weights of a TensorRT-LLM checkpoint were clamped to.
    """
    names, tensors = roles.found, roles.tensors
    modules = {role: module for module, roles in MODULES.items() for role in roles}
    if quantization is not None and quantization.brings_scales:
        given: dict[tuple[int, str], list[tuple[str, float]]] = {}
        for (role, layer, _), name in names.items():
            if role in modules:
                given.setdefault((layer, modules[role]), []).extend([(name, stored.fp8[name][0])] if name in stored.fp8 else [])
        scales = {place: tuple(sources) for place, sources in given.items() if sources}
        return Fp8GivenQuant(scales, tuple(sorted(place for place in given if place not in scales)))
    if bound is None:
        bound = quantization.activation_bound if quantization is not None and quantization.activation_bound is not None else CLAMP
    if options.quant != "fp8_rowwise" or (not stored.scales and bound == CLAMP and family is not META):
        return quant
    copied = {
        (layer, modules[role])
        for (role, layer, _), name in names.items()
        if role in modules and name in stored.scales and tensors[name].dtype == F8_E4M3
    }
    return Fp8RowwiseQuant(bound, frozenset(copied), cast=family is META)
