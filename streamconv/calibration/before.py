"""Calibration as the first part of a conversion: what is measured or found is kept beside the output, and found again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from streamconv import memory
from streamconv.calibration.request import Progress, Sampled, Samples, measured_in, silent
from streamconv.checkpoint.activation_ranges import HINT
from streamconv.errors import BudgetError, UsageError
from streamconv.options import SEARCHED
from streamconv.run.fs import beside, named
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM

BOTH_WAYS = "--text FILE measures them now; or " + HINT
_Measured = TypeVar("_Measured", bound="TensorRTLLM | HuggingFace")
_SAME_SHAPES = {"fp8_static": "fp8_dynamic", "nvfp4": "nvfp4a16"}
"""Formats that need ranges -> those that refuse the same models and need none."""
SAMPLES = {"codes": 128, "ranges": 512}
"""How many, where the user says nothing."""


def ranges_path(out: Path) -> Path:
    """Where the ranges of an output are kept: `OUT.ranges.safetensors`."""
    return beside(out, "", ".ranges.safetensors")


def codes_path(out: Path) -> Path:
    """Where the codes of an output are kept: `OUT.int4.safetensors`."""
    return beside(out, "", ".int4.safetensors")


def measured(
    source: str | Path,
    out: str | Path,
    options: _Measured,
    samples: Samples | None,
    *,
    memory_budget: int | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Progress = silent,
    sampled: Sampled = silent,
    told: Callable[[str], None] = silent,
) -> _Measured:
    """The options with activation ranges and codes in them, measured if a format needs them and none are given.

    An interrupted measurement goes on after its last layer; a finished one of the same model, text and sizes is used again.

    Args:
        samples: what to measure on, None if nothing was said.
        memory_budget: bytes.
        told: called with a line for what is there.

    Raises:
        UsageError: they are needed and there is no text either; or there is text and nothing needs it.
        CheckpointError, RefusedError: what planning would say; said before anything is measured.
        OutputError: the output cannot be written.
    """
    flag, out = options.needs_ranges(), named(out)
    int4 = takes_codes(options)
    if samples is None:
        if flag is not None and options.activation_ranges is None and not _brings_scales(source, options):
            raise UsageError(f"{flag} needs activation ranges", hint=BOTH_WAYS)
        return options
    check_text(options)
    from streamconv.run.fs import Disk
    from streamconv.run.inside import choose
    from streamconv.run.output_checks import check_output

    _check(source, options, int4)
    check_output(choose(out, Disk()), Path(source), [], force)  # before hours of work
    run = _Runs(source, out, samples, memory_budget, device, progress, sampled, told)
    if options.uses_ranges():
        options = dataclasses.replace(options, activation_ranges=run.ranges(options))
    return run.codes(options) if int4 else options


def takes_codes(options: TensorRTLLM | HuggingFace) -> bool:
    """Whether INT4 codes are searched if there is a text."""
    return options.quant in ("int4_awq", "w4a16") and options.method in (None, *SEARCHED)


def check_text(options: TensorRTLLM | HuggingFace) -> None:
    """Options that a text goes with. Raises UsageError: nothing is measured on it."""
    if options.activation_ranges is not None or options.codes is not None:
        given = "--activation-ranges" if options.activation_ranges is not None else "--codes"
        raise UsageError(f"{given} and --text exclude each other: what is given is not measured again")
    if not takes_codes(options) and not options.uses_ranges():
        users = "fp8_static, nvfp4 and w4a16 and for --kv-cache fp8"
        if isinstance(options, TensorRTLLM):
            users = "smoothquant, fp8 and int4_awq and for --kv-cache int8 and fp8"
        raise UsageError(f"--text is for --quant {users} only: nothing of this format is measured")


def _brings_scales(source: str | Path, options: TensorRTLLM | HuggingFace) -> bool:
    from streamconv.targets.trtllm.import_rules import brings_scales

    return isinstance(options, TensorRTLLM) and options.quant == "fp8" and brings_scales(source)


def _check(source: str | Path, options: TensorRTLLM | HuggingFace, int4: bool) -> None:
    """What planning would refuse, asked before anything is measured."""
    from streamconv.hub import open_source
    from streamconv.open_plan import open_and_plan
    from streamconv.targets.trtllm.target import check_options, check_request

    like: TensorRTLLM | HuggingFace = options
    if isinstance(options, HuggingFace):
        like = dataclasses.replace(options, quant=_SAME_SHAPES.get(options.quant, options.quant), kv_cache=None)
    else:
        check_options(options)
        with open_source(source) as index:
            check_request(index, options)
    if not like.uses_ranges():
        open_and_plan(source, dataclasses.replace(like, method="rtn" if int4 else None))[0].close()


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Calibrations in a process of their own; attributes as of `measured`."""

    source: str | Path
    out: Path
    samples: Samples
    memory_budget: int | None
    device: str
    progress: Progress
    sampled: Sampled
    told: Callable[[str], None]

    def _run(self, out: Path, what: str, arguments: dict[str, Any]) -> None:
        from streamconv.calibration.child import calibrate_apart
        from streamconv.hub import local_folder

        asked = dataclasses.asdict(self.samples)
        if asked["samples"] is None:
            asked["samples"] = SAMPLES["codes" if "method" in arguments else "ranges"]
        asked |= {"model": str(local_folder(self.source)), "out": str(out), "device": self.device, "reuse": True, **arguments}
        asked |= {"memory_budget": self.memory_budget, "beside": memory.resident() if self.memory_budget is not None else 0}
        done = calibrate_apart(asked, self.progress, [self.out], self.sampled)
        how = "measured before" if done["reused"] else f"measured in {done['seconds']:.1f} s"
        self.told(f"{out}: {done['tensors']} {what} from {done['samples']} samples, {how}")
        for line in done.get("notes", []):
            self.told(line)

    def ranges(self, options: TensorRTLLM | HuggingFace) -> str:
        """The file of activation ranges."""
        dtype, loop = measured_in(options) if isinstance(options, TensorRTLLM) else ("auto", "modelopt")
        path = ranges_path(self.out)
        self._run(path, "activation ranges", {"dtype": dtype, "loop": loop})
        return str(path)

    def codes(self, options: _Measured) -> _Measured:
        """The options with a file of codes, and the method that found them."""
        path, scale = codes_path(self.out), _scale(self.source, options)
        arguments = {"group": options.group_size, "scale": scale, "fold": _fold(options)}
        for method in (options.method,) if options.method is not None else ("gptq", "clip"):
            try:
                self.told(f"searching INT4 codes with --method {method}")
                self._run(path, "weights with INT4 codes", arguments | {"method": method})
            except BudgetError as error:
                if method == "clip" or options.method is not None:
                    raise
                self.told(f"--method {method} does not fit: {error.message}")
            else:
                return dataclasses.replace(options, codes=str(path), method=method)
        raise AssertionError("no method")


def _fold(options: TensorRTLLM | HuggingFace) -> str:
    """Where AWQ's pre-scales go (`folds.Fold`)."""
    if isinstance(options, TensorRTLLM) or options.method != "awq":
        return ""
    return "norms" if options.format == "modelopt" else "all"


def _scale(source: str | Path, options: TensorRTLLM | HuggingFace) -> str:
    """What scales are rounded to: what engines compute with."""
    from streamconv.hub import open_source
    from streamconv.targets.trtllm.config_sections import resolve_dtype
    from streamconv.targets.trtllm.target import model_of

    if isinstance(options, HuggingFace) and options.format != "awq":
        return "source"
    with open_source(source) as index:
        if isinstance(options, HuggingFace):
            return "bfloat16" if options.model_dtype(index).name == "BF16" else "float16"
        return resolve_dtype(options.dtype, model_of(index)[0].dtype)
