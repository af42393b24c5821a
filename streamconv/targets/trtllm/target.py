"""Source, options -> Plan for a TensorRT-LLM checkpoint. Reads headers only."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from streamconv.checkpoint.dtypes import MODEL_DTYPES
from streamconv.checkpoint.index import Index, source_files
from streamconv.checkpoint.limits import MAX_TENSORS
from streamconv.checkpoint.meta import output_rows
from streamconv.checkpoint.model_config import ModelConfig, from_hf, from_meta
from streamconv.checkpoint.quantized import left_over, source_quantization
from streamconv.checkpoint.rows import PackedTensor
from streamconv.checkpoint.source_tensors import Changed, SourceTensors
from streamconv.checkpoint.unknown_statements import refuse_unknown
from streamconv.errors import CheckpointError, RefusedError, UsageError, printable
from streamconv.families import Family, family_of
from streamconv.families.meta import META
from streamconv.natural import natural
from streamconv.planning.draft import Draft
from streamconv.planning.plan import Plan, SideFile
from streamconv.targets.trtllm import expected, import_rules, import_scales, remarks
from streamconv.targets.trtllm.checks import embedding_is_shared, refusals
from streamconv.targets.trtllm.config_json import build_config, dump
from streamconv.targets.trtllm.config_sections import resolve_dtype, resolve_moe
from streamconv.targets.trtllm.inherited import inherited, origin_of
from streamconv.targets.trtllm.lookup import TensorLookup
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.parallel import ParallelMapping
from streamconv.targets.trtllm.rank_layout import RankLayout
from streamconv.targets.trtllm.recipes import quant_of
from streamconv.targets.trtllm.recipes.awq import Awq
from streamconv.targets.trtllm.recipes.gptq import Gptq
from streamconv.targets.trtllm.recipes.per_channel import WeightOnlyQuant

if TYPE_CHECKING:
    from streamconv.checkpoint.codes_file import Codes

_CODES = ("F8_E4M3", "F8_E5M2")
"""Floats whose numbers mean nothing without scales; integers are no weight type at all."""


def model_of(index: Index) -> tuple[ModelConfig, Family]:
    """What the source says of its model, and the names that its tensors have.

    Raises:
        CheckpointError: the config lacks something, or its architecture is unknown.
    """
    if index.assembled is not None:
        model, family = from_meta(index.config, output_rows(index.assembled)), META
    else:
        model = from_hf(index.config)
        family = family_of(model.architecture)
    if model.num_hidden_layers > len(index.tensors):  # looking for every tensor of a million layers takes minutes
        raise CheckpointError(f"the config says {model.num_hidden_layers} layers, but the source holds only {len(index.tensors)} tensors")
    stacked = max((shape[0] for _, shape in index.tensors.kinds() if len(shape) == 3), default=0)
    experts = model.num_experts * model.num_hidden_layers
    if experts > MAX_TENSORS or (experts > len(index.tensors) and model.num_experts > stacked):
        raise CheckpointError(
            f"the config says {model.num_experts} experts in each of {model.num_hidden_layers} layers, but the source holds"
            f" only {len(index.tensors)} tensors"
        )
    return model, family


def check_options(options: TensorRTLLM) -> None:
    """Values that no model makes right.

    Raises:
        UsageError: names the flag.
    """
    options.check_values()
    info = quant_of(options.quant).info
    if info.sm_dependent and options.encoding == "processed" and options.target_sm is None:
        raw = "; or --encoding raw" if "--encoding" in info.flags else ""
        raise UsageError(
            f"--quant {options.quant} writes bytes laid out for one GPU generation: --target-sm is required (no GPU is here to ask)",
            hint=f"for example --target-sm 80 (A100), 86 (RTX 30), 89 (L4, RTX 40), 90 (H100){raw}",
        )


def _settled(options: TensorRTLLM, family: Family) -> TensorRTLLM:
    if family.config_class == "gemma":
        return dataclasses.replace(options, use_parallel_embedding=options.tp_size > 1, embedding_sharding_dim=0)
    return options


def check_request(index: Index, options: TensorRTLLM) -> None:
    """What planning would refuse because of the model's sizes; asked before hours of calibration.

    Raises:
        CheckpointError, RefusedError: as `make_plan`.
    """
    model, family = model_of(index)
    quantization = source_quantization(index)
    if quantization is not None:
        import_rules.import_prequantized(options, quantization, model.num_experts)
        hint = "leave out --text" if quantization.brings_scales else "measure on the unquantized model, and convert that"
        message = f"--text: {quantization.stated_in}: quantized already ({quantization.title}); nothing is measured on such a model"
        raise RefusedError([message], hint=hint)
    _refuse(refusals(model, family, _settled(options, family), _kv_heads(model, options), resolve_moe(options)))


def make_plan(index: Index, options: TensorRTLLM) -> Plan:
    """Fix every output byte.

    Raises:
        UsageError: an option no model makes right.
        CheckpointError: the source lacks something, or has something nobody asked for.
        RefusedError: the request cannot give a correct checkpoint; every reason is listed.
    """
    origin = origin_of(index)
    options = inherited(options, origin)
    check_options(options)
    model, family = model_of(index)
    quantization = source_quantization(index)
    refuse_unknown(index, "convert the model that it was made from")
    options = _settled(import_rules.import_prequantized(options, quantization, model.num_experts), family)
    check_options(options)
    moe = resolve_moe(options)
    kv = _kv_heads(model, options)
    _refuse(refusals(model, family, options, kv, moe))
    given = quantization is not None and quantization.brings_scales
    if given and options.activation_ranges is not None and options.kv_cache is None:
        raise UsageError("--activation-ranges: the source is FP8 and brings its scales along", hint="leave it out")
    factors = origin.cache_factors if origin is not None else {}
    ranges = (dataclasses.replace(options, quant="none") if given else options).ranges(known=bool(factors))
    dtype = MODEL_DTYPES[resolve_dtype(options.dtype, model.dtype)]
    mapping = ParallelMapping(options.tp_size, options.pp_size, *moe)
    tensors = SourceTensors(index)
    base = quant_of(options.quant)
    if origin is not None:
        stored = import_scales.take_stored(tensors)
        if stored.scales and isinstance(base, WeightOnlyQuant | Gptq):
            from streamconv.quants.layout import LAID_OUT

            base = dataclasses.replace(base, packings=(LAID_OUT,))
    elif family is META:  # Meta quantizes nothing, and its tensors have many pieces
        stored = import_scales.Stored(Changed(tensors))
    else:
        bits = 8 if options.quant == "int8_gptq" else 4
        stored = import_scales.assemble(tensors, quantization, bits, index.shards)
    kept = origin is not None and bool(stored.scales)
    codes = _codes(options, index)
    if codes is not None:
        import_scales.take_codes(stored, family, codes)
    _refuse([*stored.problems, *import_rules.group_problems(options, stored)])
    if isinstance(base, Awq) and not stored.scales:
        base = Awq(None)  # a source of floats
    roles = TensorLookup(family, stored.tensors, base.packings)
    quant = import_rules.quant_for(base, options, family, quantization, stored, roles, origin.bound if origin is not None else None)
    _refuse(list(import_rules.given_problems(options, quant)))
    has_head = roles.has("lm_head")
    missing = not has_head or (options.use_embedding_sharing and remarks.same_bytes(index, roles))
    shared = embedding_is_shared(model, options, lm_head_missing=missing, qwen=family.config_class == "qwen")
    shared = shared or (family.config_class == "gemma" and options.target_version == "0.16")
    tied = model.tie_word_embeddings and (not has_head or options.target_version != "0.16")
    builder = Draft(tensors)
    for number in range(options.tp_size * options.pp_size):
        builder.file(f"rank{number}.safetensors")
    layout_class = RankLayout
    if options.quant == "smoothquant":
        from streamconv.targets.trtllm.smooth_layout import SmoothLayout as layout_class
    layout = layout_class(model, family, options, dtype, mapping, roles, quant, builder, kv, shared, tied, ranges, stored.kv, factors)
    layout.describe()
    layout.refused += _without_scales(index, stored, roles)
    roles.ignore(import_scales.zero_biases(stored, roles.unused(), index.shards))
    spare = [name for name in roles.unused() if name in index.unlisted]
    roles.ignore(set(spare))
    if (stored.scales or stored.fp8 or options.quant in ("int4_awq", "fp8")) and not roles.problems and not layout.refused:
        from streamconv.targets.trtllm import scales

        layout.refused += scales.add_scales(builder, stored, dtype, index.shards, kept=kept, experts=model.num_experts // moe[1])
        layout.refused += scales.add_given_scales(builder, stored.fp8)
        if options.quant == "int4_awq" and not stored.scales:
            scales.add_unit_prescales(builder, roles.tensors, dtype)
        if options.quant == "fp8" and not given and ranges is not None:
            scales.add_calibrated(builder, ranges, roles.tensors)
    calibrated = options.kv_cache == "int8" or options.quant == "smoothquant"
    if options.rope_tables and family.rope_tables and not calibrated:
        from streamconv.targets.trtllm import rope

        rope.add_tables(builder, model, options)
    if codes is not None:
        layout.decisions["codes"] = codes.losses().line()
    roles.reject_unused()
    _refuse(layout.refused)
    config = build_config(
        model,
        options,
        config_class=family.config_class,
        dtype=dtype.torch,
        quantization=import_rules.config_entries(options, quant),
        calibrated=calibrated,
        share_embedding_table=shared,
    )
    written = dump(config)
    files, matrices, spans, constants = builder.finish()
    problem = expected.first_problem(config, files)
    if problem:  # whatever a source's config says: nothing is written that the loader, or `verify`, would reject
        hint = "is the source's config.json complete, and does it describe these weights?"
        raise RefusedError([f"TensorRT-LLM would not load it: {problem}"], hint=hint)
    return Plan(
        family=family.name,
        target=options,
        dtype=dtype,
        side_files=(SideFile("config.json", len(written), written),),
        files=tuple(files),
        matrices=matrices,
        spans=spans,
        constants=tuple(constants),
        sources=(*source_files(index), *(file.identity() for file in (ranges, codes) if file is not None)),
        warnings=tuple(
            remarks.about_model(model, options, family)
            + (remarks.about_lm_head(index, roles) if tied and has_head else [])
            + list(filter(None, [left_over(index)]))
            + remarks.about_kv_cache(quantization, options)
            + list(index.notes)
            + remarks.about_index(index, spare)
        ),
        decisions=layout.decisions,
        losses=None if codes is None else codes.losses(),
        beside=tuple(file.shard for file in (ranges, codes) if file is not None),
        notes=remarks.late_notes(config),
        source_config=index.config if model.source == "hf" else None,
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise RefusedError(problems)


def _codes(options: TensorRTLLM, index: Index) -> Codes | None:
    """The file of codes that --method needs, of this model.

    Raises:
        UsageError: it is not one of this target.
    """
    if options.method is None and options.codes is None:
        return None
    from streamconv.checkpoint.codes_file import codes_of

    codes = codes_of(options.method, options.codes)
    if codes is not None and codes.folded:
        message = "--codes: their pre-scales are folded into the layers before, for a Hugging Face directory"
        raise UsageError(message, hint="--text FILE finds those of a TensorRT-LLM checkpoint")
    if codes is not None:
        codes.check_model(index)
    return codes


def _kv_heads(model: ModelConfig, options: TensorRTLLM) -> int:
    kv = model.num_key_value_heads
    if not options.remove_duplicated_kv_heads:
        return kv
    if kv % 2:
        raise RefusedError([f"--remove-duplicated-kv-heads: num_key_value_heads {kv} is odd, so no pairs were stored"])
    return kv // 2


def _without_scales(index: Index, stored: import_scales.Stored, roles: TensorLookup) -> list[str]:
    """Weights whose stored numbers are not their values, where nothing says what they are times."""
    if not any(dtype.name in _CODES for dtype, _ in index.tensors.kinds()):
        return []
    known = (stored.scales, stored.fp8)
    odd = [name for name in sorted(roles.found.values(), key=natural) if name in stored.tensors and not any(name in k for k in known)]
    odd = [name for name in odd if stored.tensors[name].dtype.name in _CODES and not isinstance(stored.tensors[name], PackedTensor)]
    if not odd:
        return []
    more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
    message = f"{stored.tensors[odd[0]].dtype} weights need scales, and this checkpoint has none for them"
    return [f"{printable(odd[0])}{more}: {message}; convert the unquantized model, or a checkpoint that is complete"]
