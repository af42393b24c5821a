"""`streamconv convert` and `streamconv plan`: parse, call the API, show the result."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli import effects, output, recipe_option
from streamconv.cli.details import OUTPUT, RECIPES, SOURCES, paragraphs
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
    sharing,
    target,
)
from streamconv.errors import UsageError

if TYPE_CHECKING:
    from streamconv.calibration.request import Samples
    from streamconv.checkpoint.index import Index
    from streamconv.targets.base import Target


def _recipe_keys() -> dict[str, Any]:
    return recipe_option.kinds(convert, plan)


def asked_target(to: str, values: dict[str, Any], more: tuple[str, ...]) -> Target:
    """The target that this command asks for.

    Args:
        more: words after MODEL and OUT: further modules of --ignore or --only, of which the shell made words.
    """
    context = click.get_current_context()
    given = effects.typed(context) | set(context.default_map or ())
    lists = [name for name in ("ignore", "only") if name in effects.typed(context)]
    if more and len(lists) != 1:
        raise UsageError(f"one word too many: {more[0]}", hint="quote it, or repeat --ignore or --only for each module")
    if more:
        values = values | {lists[0]: (*values[lists[0]], *more)}
    return target(to, values, given)


def _samples(text: str | None, samples: int, max_length: int, batch_size: int) -> Samples | None:
    """The samples of this command, None without a text; their number counts if the user said it."""
    from streamconv.calibration.request import Samples

    context = click.get_current_context()
    given = effects.typed(context) | set(context.default_map or ())
    return Samples(text, samples if "samples" in given else None, max_length, batch_size) if text else None


@click.command(cls=Command, epilog=paragraphs(SOURCES, OUTPUT, RECIPES))
@click.argument("model")
@click.argument("out", required=False)
@click.argument("more", nargs=-1, metavar="[MODULE]...")
@options(CONVERSION, OUTPUTS, SAMPLES, RESOURCES, OF_A_RUN, WATCHING, PARTS)
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@click.option("--no-lock", is_flag=True, help="Go on where the file system cannot lock a file or sync a folder.")
@recipe_option.option(_recipe_keys)
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors and warnings only.")
def convert(
    model: str,
    out: str | None,
    memory_budget: str,
    workers: str,
    device: str,
    device_memory_budget: str,
    no_probe: bool,
    hub_keep: str,
    on_device_loss: Any,
    read: Any,
    verify: str,
    no_source_check: bool,
    min_snr: float | None,
    progress: str,
    memory_trace: str | None,
    report: str | None,
    no_lock: bool,
    parts: int | None,
    part: str | None,
    wait: float,
    private_parts: bool,
    engine: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    text: str | None,
    samples: int,
    max_length: int,
    batch_size: int,
    to: str,
    more: tuple[str, ...],
    **values: Any,
) -> int:
    """Convert MODEL (a Hugging Face or Meta folder, a TensorRT-LLM checkpoint, or org/name[@revision] on the Hub) into the folder OUT.

    What OUT is, --to says: a TensorRT-LLM checkpoint, or a quantized Hugging Face directory. Several --output, in the place of OUT, are
    made from one read.
    """
    from streamconv import api
    from streamconv.calibration.before import measured
    from streamconv.cli import convert_view, several
    from streamconv.cli.shared_work import on_ray
    from streamconv.cli.watching import watching
    from streamconv.targets.hf.target import HuggingFace
    from streamconv.targets.trtllm.options import TensorRTLLM

    if report:
        from streamconv.cli import pages_view
    if quiet or as_json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if text and hub_keep == "none":
        raise UsageError("--hub-keep none and --text exclude each other: calibration reads the model before the conversion does")

    asked = dataclasses.replace(
        resources(memory_budget, workers, device, device_memory_budget),
        hub_keep=hub_keep,
        on_device_loss=on_device_loss,
        read=read,
        no_lock=no_lock,
        verify_inline=verify == "inline",
        min_snr=min_snr,
        probe=not no_probe,
        source_check=not no_source_check,
        **sharing(parts, part, wait, private_parts),
    )
    if min_snr is not None and not asked.verify_inline:
        raise UsageError("--min-snr has no effect without --verify inline", hint="add --verify inline, or leave it out")
    if asked.parts and text:
        hint = "on one machine: `streamconv calibrate`, then --activation-ranges FILE"
        hint += "; for INT4 the command without --parts, then --codes OUT.int4.safetensors"
        raise UsageError("--text and --parts exclude each other: what is measured is measured once for all parts", hint=hint)
    outputs = several.asked(model, out, more, values.pop("output"), _recipe_keys, ("text",))
    if out is None and not outputs:
        raise click.MissingParameter(param_hint="'OUT'", param_type="argument")
    wanted = None if outputs else asked_target(to, values, more)
    effects.check(click.get_current_context(), model, wanted)
    places = [output.out for output in outputs] if out is None else [out]
    place = places[0]
    with watching(places, model, quiet or as_json, progress, memory_trace, report) as watched:
        if isinstance(wanted, TensorRTLLM | HuggingFace):
            wanted = measured(
                model,
                place,
                wanted,
                _samples(text, samples, max_length, batch_size),
                memory_budget=asked.memory_budget,
                device=asked.device,
                force=force,
                **watched.layers,
            )
        alone = [wanted.to(place)] if wanted is not None else []
        facts = pages_view.planned(model, outputs or alone, asked, bool(outputs)) if report else ([], "")
        if engine is not None:
            made = on_ray(engine, model, outputs or alone, asked, force, watched.meter, several=bool(outputs))
        elif wanted is not None:
            made = api.convert(model, place, wanted, asked, force=force, meter=watched.meter)
        else:
            made = api.convert_all(model, outputs, asked, force=force, meter=watched.meter)
    convert_view.show(made, as_json, quiet)
    if made.published and not outputs:
        recipe_option.compare(place)
    watched.write(report, lambda: pages_view.conversion(model, made, facts, watched, min_snr))
    if as_json:
        output.dump(dataclasses.asdict(made))
    return 0


@click.command(cls=Command, epilog=paragraphs(SOURCES, RECIPES))
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
    memory_budget: str,
    workers: str,
    device: str,
    device_memory_budget: str,
    no_probe: bool,
    write_config: str | None,
    parts: int | None,
    as_json: bool,
    text: str | None,
    samples: int,
    max_length: int,
    batch_size: int,
    to: str,
    more: tuple[str, ...],
    **values: Any,
) -> int:
    """Show what convert would do, from the headers alone."""
    from streamconv.allocation import costs_of, estimate_memory
    from streamconv.cli import plan_view, several
    from streamconv.estimate import Looking, look, size_of
    from streamconv.execution import choose_device
    from streamconv.hub import cache_need
    from streamconv.open_plan import open_and_plan
    from streamconv.planning.parts import cut
    from streamconv.planning.reads import Reads
    from streamconv.run.output_checks import output_problem

    asked = dataclasses.replace(resources(memory_budget, workers, device, device_memory_budget), probe=not no_probe)
    given = {"memory_budget": memory_budget, "workers": workers, "device": device, "device_memory_budget": device_memory_budget}
    outputs = several.asked(model, out, more, values.pop("output"), _recipe_keys, ("parts",))
    on = _samples(text, samples, max_length, batch_size)
    if outputs:
        effects.check(click.get_current_context(), model, None)
        several.plan(model, outputs, on, asked, write_config, given, as_json)
        return 0
    wanted = asked_target(to, values, more)
    effects.check(click.get_current_context(), model, wanted)
    search = None
    if on is not None or getattr(wanted, "method", None) is not None:
        from streamconv.calibration.foreseen import planned

        wanted, search = planned(model, wanted, on, asked.memory_budget, asked.device)
    place, looks = Path(out) if out is not None else None, list[Looking | None]()

    def opened(index: Index) -> None:
        looks.append(look(index, [place], size_of(index)) if asked.probe else None)

    index, made = open_and_plan(model, wanted, asked.memory_budget, opened)
    if search is not None:
        made = search.of(made)
    try:
        if write_config:
            recipe_option.write(write_config, model, [(out, made.target)], given, index)
        reads = Reads([made])
        chosen = choose_device(reads, asked)
        costs = costs_of(reads)
        shares = estimate_memory(reads, asked, costs)
        refused = output_problem(index, made, out) if out is not None else None
        shared = cut(made, parts) if parts is not None else None
        looking, written = looks[0], {place: made.bytes_written}
        estimate = looking.estimate(reads, written, costs, shares, bool(chosen.devices)) if looking is not None else None
        plan_view.show(made, shares, costs, chosen.why, out, as_json, cache_need(index), refused, shared, search, estimate)
    finally:
        index.close()
    return 0
