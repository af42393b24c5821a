"""`streamconv calibrate`."""

from __future__ import annotations

from typing import Any, get_args

import click

from streamconv.calibration.request import DTYPES, Loop
from streamconv.cli import output
from streamconv.cli.details import CALIBRATE
from streamconv.cli.flags import SAMPLES, WATCHING, Command, options
from streamconv.errors import UsageError


@click.command(cls=Command, epilog=CALIBRATE)
@click.argument("model")
@click.option("--output", "-o", "ranges", required=True, help="Ranges file to write (safetensors).")
@options(SAMPLES)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float16",
    show_default=True,
    help="Computing type: float16 for SmoothQuant, auto (the model's own) for FP8 and for the INT8 KV cache alone.",
)
@click.option(
    "--loop",
    type=click.Choice(get_args(Loop)),
    default="trtllm",
    show_default=True,
    help="How samples are prepared: as TensorRT-LLM does (SmoothQuant, INT8 KV cache) or as ModelOpt does (FP8).",
)
@click.option("--memory-budget", help="Ceiling of this process's memory, e.g. 2GiB.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:0.")
@options(WATCHING)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors and warnings only.")
def calibrate(
    model: str,
    ranges: str,
    text: str | None,
    memory_budget: str,
    progress: str,
    memory_trace: str | None,
    report: str | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Measure the activation ranges of MODEL on text, one layer at a time."""
    from streamconv.calibration.run import calibrate as run_calibration
    from streamconv.cli.view import command_line, layers, watching
    from streamconv.memory import parse_size, show_size

    if not text:
        raise UsageError("calibrate needs --text", hint="a .txt or .jsonl file, a folder of them, or a data set on the Hub")
    limit = parse_size(memory_budget) if memory_budget else None
    with watching((ranges,), model, quiet or as_json, progress, memory_trace, report) as (meter, memory):
        watch: dict[str, Any] = {name: call for name, call in layers(meter).items() if name != "told"}
        measured = run_calibration(model, ranges, text, memory_budget=limit, **watch, **values)
    if report:
        from streamconv.pages import page, runs

        page.write(report, runs.calibration(model, measured, runs.largest_inputs(ranges), text, memory, command_line()))
    if as_json:
        output.dump(measured)
    elif not quiet:
        output.line(
            f"{ranges}: {measured['tensors']} ranges from {measured['samples']} samples ({measured['tokens']} tokens) in "
            f"{measured['seconds']:.1f} s on {measured['device']}; peak memory {show_size(measured['peak_memory'])}"
        )
    return 0
