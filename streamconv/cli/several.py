"""`--output TARGET:FOLDER:KEY=VALUE,...`, and the [[output]] tables of recipes: several outputs from one read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli import effects
from streamconv.cli.flags import options_of, target
from streamconv.errors import StreamconvError, UsageError, printable
from streamconv.targets import DEFAULT, TARGETS
from streamconv.targets.base import Output, flag

if TYPE_CHECKING:
    from streamconv.calibration.foreseen import Search
    from streamconv.calibration.request import Samples
    from streamconv.cli.recipe_option import Kind
    from streamconv.options import Resources

_FORM = "--output TARGET:FOLDER:KEY=VALUE,..., e.g. --output trtllm:OUT1:tp_size=2,quant=int8,target_sm=90"


def asked(
    model: str, out: str | None, more: Sequence[str], given: Sequence[object], kinds: Mapping[str, Kind], alone: str
) -> list[Output]:
    """The outputs that a command asks for with `--output`, or its recipe with tables.

    Args:
        out, more: words after MODEL.
        given: texts, or tables of a recipe.
        kinds: what each key may hold.
        alone: the parameter that concerns a single output.

    Raises:
        UsageError: an output is not understood, or has options that change nothing; the rest of the command is about another output.
    """
    if out is not None:
        raise UsageError(f"OUT ({printable(out)}) and --output exclude each other", hint="name every output with --output")
    if more:
        raise UsageError(f"one word too many: {more[0]}")
    context = click.get_current_context()
    options, named = {"to", *(name for key in TARGETS for name in options_of(key))}, effects.given(context)
    if wrong := [flag(name) for name in context.params if name in named & options]:
        raise UsageError(f"{', '.join(wrong)}: not beside --output", hint="each output names its own options: " + _FORM)
    if alone in named:
        hint = "leave --output out: streamconv convert MODEL OUT"
        if alone == "text":
            hint = "measure once, with `streamconv calibrate`, and give each output its activation_ranges=FILE (codes=FILE for INT4)"
        raise UsageError(f"{flag(alone)}: for one output, not for several", hint=hint)
    outputs, idle = list[Output](), list[str]()
    for number, each in enumerate(given, 1):
        with _about(f"--output {printable(each)}" if isinstance(each, str) else f"[[output]] {number}"):
            if not isinstance(each, str | dict):
                raise UsageError("it is no table", hint='[[output]], then lines such as out = "FOLDER"')
            output = _output(_parsed(each, kinds) if isinstance(each, str) else each, kinds)
        outputs.append(output)
        if isinstance(each, str):
            lines = effects.without_effect(output.target, output.target.given, model)
            idle += [f"output {printable(output.out)}: {line}" for line in lines]
    effects.refuse(idle)
    return outputs


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    try:
        yield
    except StreamconvError as error:
        error.about(what)
        raise


def _parsed(text: str, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The table that a text stands for. A folder may hold colons; of a key that is there again the values are a list."""
    to, colon, rest = text.partition(":")
    folder, last, options = rest.rpartition(":")
    if not last or (options and "=" not in options):
        folder, options = rest, ""
    if not colon or not folder:
        raise UsageError("no folder is named", hint=_FORM)
    table: dict[str, Any] = {"to": to, "out": folder}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        key = key.strip().replace("-", "_")
        kind = kinds.get(key)
        typed = _value(value if equals else "true", kind)
        if isinstance(typed, list):
            table[key] = [*table.get(key, ()), *typed]
        elif key in table:
            raise UsageError(f"{printable(key)} is there twice")
        else:
            table[key] = typed
    return table


def _value(text: str, kind: Kind | None) -> Any:
    """A value of the kind, or the text, which is refused later."""
    types = kind.types if kind is not None else ()
    if list in types:
        return [text] if text.startswith("re:") else text.replace(";", "+").split("+")
    if bool in types:
        return {"true": True, "false": False}.get(text, text)
    for number in (int, float):
        if number in types:
            with contextlib.suppress(ValueError):
                return number(text)
    return text


def _output(table: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Output:
    """The output of a table."""
    table = {str(key).replace("-", "_"): value for key, value in table.items() if value is not None}
    to, out = str(table.pop("to", None) or DEFAULT), table.pop("out", None)
    own = options_of(to)
    if not isinstance(out, str) or not out:
        raise UsageError("no folder is named", hint='out = "FOLDER"')
    for key, value in table.items():
        if key not in own:
            import difflib

            near, others = difflib.get_close_matches(key, own, 1, 0.5), [other for other in TARGETS if key in options_of(other)]
            hint = f"did you mean {near[0]}?" if near else f"keys are the options of {to}, see `streamconv list targets`"
            hint = f"it is an option of {', '.join(others)}" if others else hint
            raise UsageError(f"unknown key {printable(key)!r}", hint=hint)
        if not kinds[key].accepts(value) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
            from streamconv.checkpoint.untrusted import shown_value

            raise UsageError(f"{key} is {shown_value(value)}, not {kinds[key].wanted(value)}")
    return target(to, table, table).to(out)


def searched(
    model: str, outputs: Sequence[Output], samples: Samples | None, asked: Resources, several: bool
) -> tuple[list[Output], list[Search | None]]:
    """The outputs whose plans have the sizes of these, and the search for INT4 codes that comes before each, if one does.

    Args:
        samples: what INT4 codes would be searched on, None without a text.

    Raises:
        UsageError: there is a text, and no output has codes to search. Others as of planning.
    """
    planned_outputs, searches = list[Output](), list["Search | None"]()
    for output in outputs:
        if samples is None and getattr(output.target, "method", None) is None:
            planned_outputs.append(output)
            searches.append(None)
            continue
        from streamconv.calibration.foreseen import planned, searches_on

        on = samples if searches_on(output.target) or not several else None
        with _about(f"output {printable(output.out)}") if several else contextlib.nullcontext():
            target, search = planned(model, output.target, on, asked.memory_budget, asked.device)
        planned_outputs.append(dataclasses.replace(output, target=target))
        searches.append(search)
    if several and samples is not None and not any(searches):
        raise UsageError("--text has no effect: no output has INT4 codes to search", hint="leave it out")
    return planned_outputs, searches
