"""`streamconv-convert-checkpoint`: NVIDIA's command line, our engine."""

from __future__ import annotations

import dataclasses
import os
import sys

from streamconv.arguments import check_words
from streamconv.cli import ending, output
from streamconv.cli.official_flags import OfficialRequest, parse
from streamconv.errors import RefusedError, UsageError, printable
from streamconv.targets.trtllm.options import TensorRTLLM

IMPORTED = {"int4_gptq", "int8_gptq", "int4_awq"}


def main(argv: list[str] | None = None) -> int:
    """Run a conversion; gives the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return output.flush_or_fail(lambda: ending.status_of(lambda: _main(arguments), as_json=False))


def _main(arguments: list[str]) -> int:
    check_words(arguments)
    request = parse(arguments)
    from streamconv.targets.trtllm.recipes import refuse

    for note in request.notes:
        output.note(f"note: {note}")
    source = _source(request)
    if source is None:
        return _write_config(request, None)
    refuse(request.options.quant, "the flags for")
    request.options = _settled(request.options, source, source == request.meta_ckpt_dir)
    return _write_config(request, source) if request.save_config_only else _convert(request, source)


def _source(request: OfficialRequest) -> str | None:
    """The folder to read, None if the flags name none."""
    if request.model_dir is None and request.meta_ckpt_dir is None:
        return None
    if request.quant_ckpt_path and request.options.quant not in IMPORTED:
        raise UsageError("--quant_ckpt_path goes with --weight_only_precision int4_gptq, int8_gptq or int4_awq only")
    source = request.quant_ckpt_path or request.model_dir or request.meta_ckpt_dir
    if source is not None and source == request.meta_ckpt_dir and os.path.lexists(os.path.join(source, "config.json")):
        raise UsageError(
            f"--meta_ckpt_dir {printable(source)} holds a config.json, so it is a Hugging Face folder",
            hint="give it as --model_dir, or name the folder that holds params.json alone",
        )
    return source


def _settled(options: TensorRTLLM, source: str, meta: bool) -> TensorRTLLM:
    """The options as NVIDIA's scripts take them for a source: InternLM2's has float16 where --dtype is not given, others the source's.

    Raises:
        RefusedError: --use_fp8 or --enable_fp8 without activation ranges, and the source brings no scales along either.
    """
    from streamconv.checkpoint.quantized import source_quantization
    from streamconv.hub import open_source

    unscaled, no_dtype = options.quant == "fp8" and options.activation_ranges is None, "dtype" not in options.given and not meta
    if not unscaled and not no_dtype:
        return options
    with open_source(source) as index:
        names = index.config.get("architectures")
        if unscaled and source_quantization(index) is None:  # of a quantized one planning says what can be done with it
            what = "NVIDIA's script makes no usable scales from a model that is not FP8 already; only other tools make these"
            hint = "`streamconv convert --quant fp8 --text FILE` measures them and converts; here, --activation_ranges FILE "
            hint += "gives measured ones"
            raise RefusedError([f"--use_fp8: {what}"], hint=hint)
    if not no_dtype or not isinstance(names, list) or "InternLM2ForCausalLM" not in names:
        return options
    output.note("note: --dtype float16, the default of NVIDIA's script for InternLM2")
    return dataclasses.replace(options, dtype="float16")


def _write_config(request: OfficialRequest, source: str | None) -> int:
    """config.json and nothing else: of a conversion that is planned and not done, or without a source from the size flags."""
    from streamconv.targets.trtllm.config_only import write_config

    root = None
    if source is None:
        from streamconv.cli.config_from_flags import config_from_flags

        data, why = config_from_flags(request), "neither --model_dir nor --meta_ckpt_dir"
    else:
        from streamconv.open_plan import open_and_plan

        sm = request.options.target_sm or 80  # decides bytes of weights, none of config.json
        index, plan = open_and_plan(source, dataclasses.replace(request.options, target_sm=sm))
        with index:
            data, root, why = plan.config, index.root, "--save_config_only"
    write_config(request.output_dir, data, source=root, force=request.force, no_lock=request.no_lock)
    if not request.quiet:
        output.line(f"{request.output_dir}: config.json alone, no weights ({why})")
    return 0


def _convert(request: OfficialRequest, source: str) -> int:
    from streamconv import api
    from streamconv.cli import view
    from streamconv.cli.conversion import show
    from streamconv.cli.flags import resources

    options, meter = _with_ranges(request, source), view.meter("auto", request.quiet)
    report = api.convert(source, request.output_dir, options, resources(vars(request)), force=request.force, meter=meter)
    show(report, False, request.quiet)
    return 0


def _with_ranges(request: OfficialRequest, source: str) -> TensorRTLLM:
    """The options; where activation ranges are needed and none are given they are measured, as NVIDIA's script does.

    They are kept beside the output, in `OUTPUT.ranges.safetensors`.
    """
    options = request.options
    if options.activation_ranges is not None or options.needs_ranges() is None:
        return options
    if options.quant == "fp8" and options.kv_cache != "int8":
        return options  # `_settled` lets only sources pass that are quantized already
    if source == request.meta_ckpt_dir:
        raise UsageError("--smoothquant and --int8_kv_cache need --model_dir: a Meta checkpoint cannot be calibrated")
    from streamconv.calibration.before import measured
    from streamconv.calibration.request import Samples
    from streamconv.cli import view
    from streamconv.memory import parse_size

    return measured(
        source,
        request.output_dir,
        options,
        Samples(**request.calibration),
        memory_budget=parse_size(request.memory_budget) if request.memory_budget else None,
        device=request.device,
        force=request.force,
        **view.layers(view.meter("auto", request.quiet), request.quiet),
    )


def run() -> None:
    """The command: `main` for the arguments of this process."""
    ending.run(main)
