"""`streamconv-convert-checkpoint`: NVIDIA's command line, our engine."""

from __future__ import annotations

import os
import sys

from streamconv.cli import signals, view
from streamconv.cli.main import resources, show_report
from streamconv.cli.official_flags import parse, unsupported
from streamconv.errors import StreamconvError, UsageError, printable
from streamconv.quants.refused import refuse

TAKEN_OVER = {"int4_gptq", "int8_gptq", "int4_awq"}
SUPPORTED: set[str] = TAKEN_OVER | {"fp8_rowwise", "meta", "smoothquant", "int8_kv_cache"}
"""Work beyond the unquantized and weight-only conversions that is built."""


def main(argv: list[str] | None = None) -> int:
    """Run a conversion; gives the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _convert(arguments)
    except StreamconvError as error:
        return view.fail(error, False)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _convert(arguments: list[str]) -> int:
    from streamconv import api

    request = parse(arguments)
    refuse(request.options.quant, "the flags for")
    if request.quant_ckpt_path and request.options.quant not in TAKEN_OVER:
        raise UsageError("--quant_ckpt_path goes with --weight_only_precision int4_gptq, int8_gptq or int4_awq only")
    missing = unsupported(request, SUPPORTED)
    if missing:
        raise UsageError(f"not built yet: {', '.join(missing)}", hint="nothing was converted")
    source = request.quant_ckpt_path or request.model_dir or request.meta_ckpt_dir
    if source is None:
        raise UsageError("--model_dir or --meta_ckpt_dir is required")
    if source == request.meta_ckpt_dir and os.path.lexists(os.path.join(source, "config.json")):
        raise UsageError(
            f"--meta_ckpt_dir {printable(source)} holds a config.json, so it is a Hugging Face folder",
            hint="give it as --model_dir, or name the folder that holds params.json alone",
        )
    report = api.convert(
        source,
        request.output_dir,
        request.options,
        resources(request.memory_budget, request.workers, request.device),
        force=request.force,
        watcher=view.Progress(False),
    )
    show_report(report, False, False)
    return 0


def run() -> None:
    """The command: `main` for the arguments of this process."""
    with signals.orderly():
        sys.exit(main())
