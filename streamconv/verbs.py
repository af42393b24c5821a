"""The five things streamconv does, as a program calls them."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from streamconv import api
from streamconv.arguments import path_of, settled
from streamconv.calibration.request import Loop
from streamconv.errors import UsageError
from streamconv.options import Resources
from streamconv.planning.plan import Plan
from streamconv.progress import Meter, Progress, Watching, watch_of
from streamconv.reports import Report
from streamconv.run.output_checks import output_problem
from streamconv.targets.base import Output, Target
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.verdict import Verdict

if TYPE_CHECKING:
    from streamconv.verification.difference import Comparison

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a calibration did.

    Attributes:
        out: the file of activation ranges, for `TensorRTLLM(activation_ranges=...)`.
        samples, tokens: that went through the model.
        layers: of the model.
        tensors: ranges in the file.
        seconds: of wall-clock time.
        peak_memory: largest resident set of this process, bytes.
        device: "cpu" or "cuda:N".
    """

    out: str
    samples: int
    tokens: int
    layers: int
    tensors: int
    seconds: float
    peak_memory: int
    device: str


def plan(source: Path, target: Target | None = None, out: Path | None = None) -> Plan:
    """Plan a conversion from the headers alone; no weight is read and nothing is written.

    Args:
        source: as of `convert`.
        target: as of `convert`.
        out: where it would be written; a reason why `convert` would refuse that is one of the plan's `warnings`.

    Raises:
        UsageError: a choice is unknown or contradicts another. RefusedError: it cannot give a correct checkpoint.
        CheckpointError: the source cannot be read. HubError: the Hub did not give it.
    """
    asked = _asked(target)
    place = None if out is None else path_of(out, "out")
    index, planned = api.open_and_plan(path_of(source, "source"), asked)
    with index:
        problem = None if place is None else output_problem(index, planned, place)
    warnings = planned.warnings if problem is None else (*planned.warnings, f"convert would refuse this output: {problem}")
    return dataclasses.replace(planned, warnings=warnings)


@overload
def convert(
    source: Path,
    out: Path,
    target: Target | None = None,
    *,
    resources: Resources | None = None,
    force: bool = False,
    watch: Watching = None,
) -> Report: ...
@overload
def convert(
    source: Path, out: Output, /, *more: Output, resources: Resources | None = None, force: bool = False, watch: Watching = None
) -> Report: ...
def convert(
    source: Path,
    out: Path | Output,
    target: Target | Output | None = None,
    *more: Output,
    resources: Resources | None = None,
    force: bool = False,
    watch: Watching = None,
) -> Report:
    """Convert a checkpoint, into one output or into several from one read.

        convert(source, "out", TensorRTLLM(tp_size=2))
        convert(source, TensorRTLLM(tp_size=2).to("out1"), HuggingFace(quant="fp8_dynamic").to("out2"))

    Args:
        source: a Hugging Face or Meta folder, a TensorRT-LLM checkpoint (options that are not passed are then its own), one weight file,
            or a model of the Hub (org/name[@revision]).
        out: folder to write; it appears only when it is complete and on the disk.
        target: what to write, and all that decides its bytes (`TensorRTLLM(...)`, `HuggingFace(...)`); None is `TensorRTLLM()`.
        more: further outputs, each a target and its folder, `target.to(out)`; each byte of the source is read once for all of them.
            Those that this very call has finished before are skipped.
        resources: memory, workers and device, which decide none; None is `Resources()`.
        force: replace a finished checkpoint, or start over.
        watch: called with a `Progress` now and then, by one thread at a time; what it raises stops the run. "bar" draws a bar.

    Raises:
        UsageError, RefusedError: the request is no good. BudgetError: `memory_budget` is too small.
        CheckpointError, DataError, HubError: the source is no good. OutputError: `out` cannot be written, or holds something.
        After one of these nothing half-written looks whole; after a full disk, a signal or a crash the same call goes on.
    """
    given = settled(Resources() if resources is None else resources, Resources, "resources")
    place, meter = path_of(source, "source"), Meter(watch_of(watch))
    if not isinstance(out, Output):
        if more or isinstance(target, Output):
            raise UsageError("convert takes a folder and a target, or outputs alone", hint='an output is TensorRTLLM(...).to("out")')
        return api.convert(place, path_of(out, "out"), _asked(target), given, force=force, meter=meter)
    outputs: list[Output] = []
    for each in (out, *([] if target is None else [target]), *more):
        if not isinstance(each, Output):
            raise UsageError(f"an output is a value of type {type(each).__name__}", hint='it takes TensorRTLLM(...).to("out")')
        outputs.append(_asked(each.target).to(path_of(each.out, "out")))
    return api.convert_all(place, outputs, given, force=force, meter=meter)


def _asked(target: object) -> Target:
    return settled(TensorRTLLM() if target is None else target, Target, "target")  # type: ignore[type-abstract]


def verify(
    out: Path,
    source: Path | None = None,
    *,
    activation_ranges: Path | None = None,
    with_tensorrt_llm: bool = False,
    resources: Resources | None = None,
    watch: Watching = None,
) -> Verdict:
    """Check a converted folder; the verdict's `problems` are empty if it is good.

    Args:
        out: the folder.
        source: what it was made from: it is encoded again, on the CPU, and every byte compared. A model of the Hub is downloaded.
        activation_ranges: for `source`, where the ranges are now, if they moved.
        with_tensorrt_llm: TensorRT-LLM's own reader has to accept every rank, too.
        resources: memory and workers for `source`.
        watch: as of `convert`.

    Raises:
        VerifyError: it is no checkpoint at all. UsageError: TensorRT-LLM or the ranges are not there.
        CheckpointError, HubError, BudgetError: the source cannot be read, or not within the memory.
    """
    from streamconv.verification.check import verify as check

    ranges = None if activation_ranges is None else path_of(activation_ranges, "activation_ranges")
    given = settled(Resources() if resources is None else resources, Resources, "resources")
    place = None if source is None else path_of(source, "source")
    meter = Meter(watch_of(watch))
    return check(path_of(out, "out"), place, with_tensorrt_llm=with_tensorrt_llm, activation_ranges=ranges, resources=given, meter=meter)


def diff(a: Path, b: Path, *, memory_budget: int | None = None, watch: Watching = None) -> Comparison:
    """Compare two checkpoints tensor by tensor; `within(tolerance)` of what it gives says whether they are alike.

    Args:
        a, b: folders, weight files or models of the Hub, of any kind: weights of a quantized model are compared as values, those of
            TensorRT-LLM checkpoints that are cut alike rank by rank.
        memory_budget: ceiling of this process's resident set, bytes.
        watch: as of `convert`.

    Raises:
        CheckpointError, HubError: one cannot be read. BudgetError: `memory_budget` is too small.
    """
    from streamconv.verification.difference import compare

    return compare(path_of(a, "a"), path_of(b, "b"), memory_budget, Meter(watch_of(watch)))


def calibrate(
    model: Path,
    out: Path,
    text: Path,
    *,
    samples: int = 512,
    max_length: int = 512,
    batch_size: int = 1,
    dtype: str = "float16",
    loop: Loop = "trtllm",
    device: str = "auto",
    memory_budget: int | None = None,
    watch: Watching = None,
) -> CalibrationReport:
    """Measure activation ranges on text, one layer in memory at a time.

    Args:
        model: Hugging Face folder with its tokenizer, or a model of the Hub, which is downloaded.
        out: safetensors file to write: float32, of every linear module M the largest absolute input `M.x` [in], output `M.y` [out]
            and weight `M.w` [out].
        text: a .txt or .jsonl file, a folder of them, or a data set of the Hub.
        samples: how many; -1 for all.
        max_length: tokens of a sample at most.
        batch_size: samples of equal length that go through a layer together.
        dtype: "float16" for SmoothQuant, "auto" (the model's own) for FP8 and for the INT8 KV cache alone, or "bfloat16", "float32".
        loop: how samples are prepared: "trtllm" (SmoothQuant, INT8 KV cache) or "modelopt" (FP8).
        device: "auto", "cpu", "cuda" or "cuda:N".
        memory_budget: ceiling of this process's resident set, bytes.
        watch: as of `convert`; it counts layers.

    Raises:
        UsageError: no text, or something unknown. CheckpointError: no such model, no tokenizer. RefusedError: it is quantized.
        BudgetError: too little memory. OutputError: `out` cannot be written. HubError: the Hub did not give it.
    """
    from streamconv.calibration.run import calibrate as measure

    if memory_budget is not None and type(memory_budget) is not int:
        raise UsageError(f"memory_budget={memory_budget!r} is not a number of bytes")
    watcher, began = watch_of(watch), time.monotonic()

    def progress(done: int, layers: int, _: float) -> None:
        watcher(Progress("calibrating", done, layers, time.monotonic() - began, "layers", memory_budget))

    facts = measure(
        path_of(model, "model"),
        path_of(out, "out"),
        path_of(text, "text"),
        samples=samples,
        max_length=max_length,
        batch_size=batch_size,
        dtype=dtype,
        loop=loop,
        device=device,
        memory_budget=memory_budget,
        progress=progress,
    )
    watcher(Progress("done", facts["layers"], facts["layers"], time.monotonic() - began, "layers", memory_budget))
    return CalibrationReport(**{field.name: facts[field.name] for field in dataclasses.fields(CalibrationReport)})
