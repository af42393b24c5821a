"""Calibration as the first part of a conversion: the ranges are measured once, kept beside the output, and found again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from streamconv import memory
from streamconv.calibration.request import Samples, measured_in
from streamconv.checkpoint.activation_ranges import HINT
from streamconv.errors import UsageError
from streamconv.run.fs import beside, named
from streamconv.targets.trtllm.options import TensorRTLLM

BOTH_WAYS = "--text FILE measures them now; or " + HINT


def ranges_path(out: Path) -> Path:
    """Where the ranges of an output are kept: `OUT.ranges.safetensors`."""
    return beside(out, "", ".ranges.safetensors")


def with_ranges(
    source: str | Path,
    out: str | Path,
    options: TensorRTLLM,
    samples: Samples | None,
    *,
    memory_budget: int | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Callable[[int, int, float], None] = lambda layer, layers, seconds: None,
    sampled: Callable[[int, int, int, int], None] = lambda layer, layers, sample, samples: None,
    told: Callable[[str], None] = lambda line: None,
) -> TensorRTLLM:
    """The options with activation ranges in them, measured if a format needs them and none are given.

    An interrupted measurement goes on after its last layer; a finished one of the same model, text and sizes is used again.

    Args:
        samples: what to measure on, None if nothing was said.
        memory_budget: bytes.
        progress, sampled: see `run.calibrate`.
        told: called with one line once the ranges are there.

    Raises:
        UsageError: they are needed and there is no text either; or there is text and nothing needs it.
        CheckpointError, RefusedError: what planning would say; said before anything is measured.
        OutputError: the output cannot be written.
    """
    flag, out = options.needs_ranges(), named(out)
    if samples is None:
        from streamconv.targets.trtllm.import_rules import brings_scales

        if flag is not None and options.activation_ranges is None and not (options.quant == "fp8" and brings_scales(source)):
            raise UsageError(f"{flag} needs activation ranges", hint=BOTH_WAYS)
        return options
    if not options.uses_ranges():
        raise UsageError("--text is for --quant smoothquant and fp8 and for --kv-cache int8 and fp8 only")
    if options.activation_ranges is not None:
        raise UsageError("--activation-ranges and --text exclude each other: ranges that are given are not measured again")
    from streamconv.calibration.child import calibrate_apart
    from streamconv.hub import local_folder, open_source
    from streamconv.run.output_checks import check_output
    from streamconv.targets.trtllm.target import check_options, check_request

    check_options(options)
    with contextlib.closing(open_source(source)) as index:
        check_request(index, options)
    check_output(out, Path(source), [], force)  # before hours of work
    ranges = ranges_path(out)
    dtype, loop = measured_in(options)
    arguments = {
        "model": str(local_folder(source)),
        "out": str(ranges),
        **dataclasses.asdict(samples),
        "dtype": dtype,
        "loop": loop,
        "device": device,
        "memory_budget": max(1, memory_budget - memory.resident()) if memory_budget is not None else None,
        "reuse": True,
    }
    done = calibrate_apart(arguments, progress, [out], sampled)
    how = "measured before" if done["reused"] else f"measured in {done['seconds']:.1f} s"
    told(f"{ranges}: {done['tensors']} activation ranges from {done['samples']} samples, {how}")
    return dataclasses.replace(options, activation_ranges=str(ranges))
