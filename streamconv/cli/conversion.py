"""`streamconv convert` and `streamconv plan`: parse, call the API, show the result."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli import effects, output, recipe_option, several
from streamconv.cli.details import CONVERT, PLAN
from streamconv.cli.flags import (
    CONVERSION,
    OF_A_RUN,
    OUTPUTS,
    PARTS,
    RESOURCES,
    SAMPLES,
    WATCHING,
    Command,
    options,
    resources,
    target,
)
from streamconv.errors import UsageError, count, few, printable
from streamconv.memory import show_size
from streamconv.targets.base import Output

if TYPE_CHECKING:
    from streamconv.calibration.request import Samples
    from streamconv.checkpoint.index import Index
    from streamconv.options import Resources
    from streamconv.pages.runs import Planned
    from streamconv.progress import Meter
    from streamconv.reports import Report, Written


def _recipe_keys() -> dict[str, recipe_option.Kind]:
    return recipe_option.kinds(convert, plan)


def _outputs(model: str, out: str | None, more: tuple[str, ...], values: dict[str, Any], alone: str) -> tuple[list[Output], bool]:
    """The outputs of this command, and whether it names them with --output; options that have no effect are refused.

    Args:
        more: words after MODEL and OUT: further modules of --ignore or --only, of which the shell made words.
        alone: the parameter that concerns a single output.
    """
    context = click.get_current_context()
    if named := values.pop("output"):
        outputs = several.asked(model, out, more, tuple(named), recipe_option.kinds(convert, plan), alone)
        effects.check(context, model, None)
        return outputs, True
    if out is None and context.command is convert:
        raise click.MissingParameter(param_hint="'OUT'", param_type="argument")
    lists = [name for name in ("ignore", "only") if name in effects.typed(context)]
    if more and len(lists) != 1:
        raise UsageError(f"one word too many: {more[0]}", hint="quote it, or repeat --ignore or --only for each module")
    if more:
        values[lists[0]] = (*values[lists[0]], *more)
    asked = target(values.pop("to"), values, effects.given(context))
    effects.check(context, model, asked)
    return [Output(out or "", asked)], False


def _samples(text: str | None, values: dict[str, Any]) -> Samples | None:
    """The samples of this command, None without a text; their number counts if the user said it."""
    if not text:
        return None
    from streamconv.calibration.request import Samples

    count = values["samples"] if "samples" in effects.given(click.get_current_context()) else None
    return Samples(text, count, values["max_length"], values["batch_size"])


@click.command(cls=Command, epilog=CONVERT)
@click.argument("model")
@click.argument("out", required=False)
@click.argument("more", nargs=-1, metavar="[MODULE]...")
@options(CONVERSION, OUTPUTS, SAMPLES, RESOURCES, OF_A_RUN, WATCHING, PARTS)
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@click.option("--no-lock", is_flag=True, help="Write even where the file system cannot lock a file or sync a folder.")
@recipe_option.option(_recipe_keys)
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors and warnings only.")
def convert(
    model: str,
    out: str | None,
    more: tuple[str, ...],
    text: str | None,
    engine: str | None,
    progress: str,
    memory_trace: str | None,
    report: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Convert MODEL (a Hugging Face or Meta folder, a TensorRT-LLM checkpoint, or org/name[@revision] on the Hub) into the folder OUT.

    What OUT is, --to says: a TensorRT-LLM checkpoint, or a quantized Hugging Face directory. Several --output, in the place of OUT, are
    made from one read.
    """
    from streamconv import api
    from streamconv.calibration.before import measured
    from streamconv.cli.view import command_line, layers, watching
    from streamconv.targets.hf.target import HuggingFace
    from streamconv.targets.trtllm.options import TensorRTLLM

    if quiet or as_json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    asked = resources(values)
    if text and asked.hub_keep == "none":
        raise UsageError("--hub-keep none and --text exclude each other: calibration reads the model before the conversion does")
    if asked.min_snr is not None and not asked.verify_inline:
        raise UsageError("--min-snr has no effect without --verify inline", hint="add --verify inline, or leave it out")
    if asked.parts and text:
        hint = "on one machine: `streamconv calibrate`, then --activation-ranges FILE"
        hint += "; for INT4 the command without --parts, then --codes OUT.int4.safetensors"
        raise UsageError("--text and --parts exclude each other: what is measured is measured once for all parts", hint=hint)
    outputs, together = _outputs(model, out, more, values, "text")
    place, chosen = outputs[0].out, outputs[0].target
    with watching([output.out for output in outputs], model, quiet or as_json, progress, memory_trace, report) as (meter, memory):
        if not together and isinstance(chosen, TensorRTLLM | HuggingFace):
            limit, device, watch = asked.memory_budget, asked.device, layers(meter, quiet or as_json)
            samples = _samples(text, values)
            chosen = measured(model, place, chosen, samples, memory_budget=limit, device=device, force=force, **watch)
            outputs = [chosen.to(place)]
        facts = _page_facts(model, outputs, asked, together) if report else None
        if engine is not None:
            result = _on_ray(engine, model, outputs, asked, force, meter, together)
        elif together:
            result = api.convert_all(model, outputs, asked, force=force, meter=meter)
        else:
            result = api.convert(model, place, chosen, asked, force=force, meter=meter)
    show(result, as_json, quiet)
    if result.published and not together:
        recipe_option.compare(place)
    if report and facts:
        from streamconv.pages import page, runs

        page.write(report, runs.conversion(model, result, *facts, memory, command_line(), asked.min_snr))
    if as_json:
        output.dump(dataclasses.asdict(result))
    return 0


def show(report: Report, as_json: bool, quiet: bool) -> None:
    """Print them; warnings in any case."""
    output.warn(report.warnings)
    if quiet or as_json:
        return
    several = report.outputs if len(report.outputs) > 1 else ()
    memory = f"peak memory {show_size(report.peak_memory)} of {show_size(report.budget)}"
    if report.parts is not None:
        for each in several:
            after = "complete" if each.published else f"other parts are missing, see `streamconv status {each.out}`"
            output.line(f"{each.out}: {_parts(each.parts or ())} done here; {after}")
        done = f"{len(report.parts)} parts" if several else _parts(report.parts)
        whole = "all outputs are complete" if several else "the output is complete"
        after = whole if report.published else "other parts are missing, see `streamconv status`"
        read = f"{show_size(report.bytes_read)} read in {report.seconds:.1f} s, {memory}{_kept(report, ',')}"
        output.line(f"{report.out}: {done} done here, {read}; {after}")
        return
    for each in several:
        what = "finished by an earlier run, skipped" if each.finished else f"{_written(each)} written{_kept(each)}"
        output.line(f"{each.out}: {what}")
    output.line(
        f"{f'{len(several)} outputs' if several else report.out}: {_written(report)} written, "
        f"{show_size(report.bytes_read)} read in {report.seconds:.1f} s; {memory} with {count(report.workers, 'worker')}{_kept(report)}"
    )
    if errors := [error for written in report.outputs for error in written.errors]:
        worst = min(errors, key=lambda error: error.snr_db)
        inexact = sum(error.snr_db != inf for error in errors)
        worst_text = f", the worst {worst.name} with an SNR of {worst.snr_db:.1f} dB" if inexact else ""
        output.line(f"{len(errors)} matrices were decoded as they were written, {len(errors) - inexact} are exact{worst_text}")
    if report.estimate is not None and not report.resumed:
        output.line(f"time: {report.estimate.off(report.seconds)}")
    if report.profile:
        mapped = f"; {show_size(report.bytes_mapped)} of the source mapped, {show_size(report.bytes_read - report.bytes_mapped)} copied"
        output.line("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in report.profile.items()) + mapped)


def _parts(numbers: Sequence[int]) -> str:
    return f"part{'s' * (len(numbers) > 1)} {few([*map(str, numbers)], 20)}" if numbers else "no part"


def _written(made: Report | Written) -> str:
    return f"{count(made.files, 'file')}, {made.tensors} tensors, {show_size(made.bytes_written)}"


def _kept(made: Report | Written, mark: str = ";") -> str:
    return f"{mark} {made.resumed} tiles of an earlier run were kept" if made.resumed else ""


def _page_facts(model: str, outputs: Sequence[Output], asked: Resources, together: bool) -> tuple[list[Planned], str]:
    """What the page of --report needs of the plans, which are too large to be kept, and the recipe."""
    from streamconv.cli import recipe
    from streamconv.open_plan import open_and_plan_all
    from streamconv.pages.runs import planned

    index, plans = open_and_plan_all(model, outputs, asked.memory_budget)
    with index:
        return [planned(plan) for plan in plans], recipe.of_plans(model, outputs, plans, {}, index, together)


def _on_ray(engine: str, model: str, outputs: Sequence[Output], asked: Resources, force: bool, meter: Meter, together: bool) -> Report:
    """`convert --engine`. Raises UsageError: another engine."""
    from streamconv.run_on_ray import convert_on_ray

    name, _, address = engine.partition("=")
    if name != "ray":
        raise UsageError(f"--engine {printable(engine)} is not known", hint="ray, or ray=ADDRESS; without it this process does the work")
    return convert_on_ray(address or None, model, outputs, asked, force=force, meter=meter, several=together)


@click.command(cls=Command, epilog=PLAN)
@click.argument("model")
@click.argument("out", required=False)
@click.argument("more", nargs=-1, metavar="[MODULE]...")
@options(CONVERSION, OUTPUTS, SAMPLES, RESOURCES)
@recipe_option.option(_recipe_keys)
@click.option("--parts", type=click.IntRange(1), metavar="N", help="Show how the work is cut for N parts, done by any number of machines.")
@click.option("--write-config", metavar="FILE", help="Write a recipe (TOML) that gives exactly this conversion.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    model: str,
    out: str | None,
    more: tuple[str, ...],
    text: str | None,
    parts: int | None,
    write_config: str | None,
    as_json: bool,
    **values: Any,
) -> int:
    """Show what convert would do, from the headers alone."""
    from streamconv.cli import plan_view, recipe
    from streamconv.estimate import Looking, look, size_of
    from streamconv.open_plan import open_and_plan_all

    asked = resources(values)
    outputs, together = _outputs(model, out, more, values, "parts")
    outputs, searches = several.searched(model, outputs, _samples(text, values), asked, together)
    places, looks = [Path(one.out) if one.out else None for one in outputs], list[Looking | None]()

    def opened(index: Index) -> None:
        looks.append(look(index, places, size_of(index)) if asked.probe else None)

    index, plans = open_and_plan_all(model, outputs, asked.memory_budget, opened)
    plans = [search.of(each) if search is not None else each for each, search in zip(plans, searches, strict=True)]
    with index:
        if write_config:
            recipe.write(write_config, recipe.of_plans(model, outputs, plans, values, index, together))
        plan_view.show(index, outputs, plans, searches, asked, looks[0], parts, together, as_json)
    return 0
