"""`--output TARGET:FOLDER:KEY=VALUE,...`, and the [[output]] tables of recipes: several outputs from one read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli import effects
from streamconv.cli.flags import target
from streamconv.errors import StreamconvError, UsageError, printable
from streamconv.targets import TARGETS, target_class
from streamconv.targets.base import flag

if TYPE_CHECKING:
    from streamconv.calibration.foreseen import Search
    from streamconv.calibration.request import Samples
    from streamconv.cli.recipe import Kind
    from streamconv.options import Resources
    from streamconv.targets.base import Output

_FORM = "--output TARGET:FOLDER:KEY=VALUE,..., e.g. --output trtllm:OUT1:tp_size=2,quant=int8,target_sm=90"


def asked(
    model: str,
    out: str | None,
    more: Sequence[str],
    given: Iterable[object],
    known: Callable[[], Mapping[str, Kind]],
    only: Collection[str],
) -> list[Output]:
    """The outputs that a command asks for with `--output`, or its recipe with tables; none if it has one output, OUT.

    Args:
        out, more: words after MODEL.
        given: texts, or tables of a recipe.
        known: what each key may hold.
        only: flags that concern a single output, of those that were given.

    Raises:
        UsageError: an output is not understood, or has options that change nothing; the rest of the command is about another output.
    """
    given = tuple(given)
    if not given:
        return []
    if out is not None:
        raise UsageError(f"OUT ({printable(out)}) and --output exclude each other", hint="name every output with --output")
    if more:
        raise UsageError(f"one word too many: {more[0]}")
    context = click.get_current_context()
    options = {"to", *(name for key in TARGETS for name in _keys(key))}
    named = effects.typed(context) | set(context.default_map or ())
    if wrong := [flag(name) for name in context.params if name in named & options]:
        raise UsageError(f"{', '.join(wrong)}: not beside --output", hint="each output names its own options: " + _FORM)
    if wrong := [flag(name) for name in context.params if name in named and name in only]:
        hint = "leave --output out: streamconv convert MODEL OUT"
        if "--text" in wrong:
            hint = "measure once, with `streamconv calibrate`, and give each output its activation_ranges=FILE (codes=FILE for INT4)"
        raise UsageError(f"{', '.join(wrong)}: for one output, not for several", hint=hint)
    made, told, kinds = [], list[str](), known()
    for number, each in enumerate(given, 1):
        with _about(f"--output {printable(each)}" if isinstance(each, str) else f"[[output]] {number}"):
            if not isinstance(each, str | dict):
                raise UsageError("it is no table", hint='[[output]], then lines such as out = "FOLDER"')
            output, names = _output(_parsed(each, kinds) if isinstance(each, str) else each, kinds)
        made.append(output)
        if isinstance(each, str):
            told += [f"output {printable(output.out)}: {line}" for line in _without_effect(model, output, names)]
    effects.refuse(told)
    return made


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    try:
        yield
    except StreamconvError as error:
        error.about(what)
        raise


def _keys(to: str) -> list[str]:
    """Names of the options of a target."""
    return [field.name for field in dataclasses.fields(target_class(to))]


def _without_effect(model: str, output: Output, names: Collection[str]) -> Iterator[str]:
    from streamconv.hub import open_source

    return output.target.without_effect(names, lambda: open_source(model))


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
        made = _value(value if equals else "true", kind)
        if isinstance(made, list):
            table[key] = [*table.get(key, ()), *made]
        elif key in table:
            raise UsageError(f"{printable(key)} is there twice")
        else:
            table[key] = made
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


def _output(table: Mapping[str, Any], kinds: Mapping[str, Kind]) -> tuple[Output, set[str]]:
    """The output of a table, and the names of the options in it."""
    table = {str(key).replace("-", "_"): value for key, value in table.items() if value is not None}
    to = table.pop("to", None) or next(iter(TARGETS))
    out = table.pop("out", None)
    own = _keys(str(to))
    if not isinstance(out, str) or not out:
        raise UsageError("no folder is named", hint='out = "FOLDER"')
    for key, value in table.items():
        if key not in own:
            import difflib

            near, others = difflib.get_close_matches(key, own, 1, 0.5), [other for other in TARGETS if key in _keys(other)]
            hint = f"did you mean {near[0]}?" if near else f"keys are the options of {to}, see `streamconv list targets`"
            hint = f"it is an option of {', '.join(others)}" if others else hint
            raise UsageError(f"unknown key {printable(key)!r}", hint=hint)
        if not kinds[key].accepts(value) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
            from streamconv.checkpoint.untrusted import shown_value

            raise UsageError(f"{key} is {shown_value(value)}, not {kinds[key].wanted(value)}")
    return target(str(to), table, set(table)).to(out), set(table)


def plan(
    model: str,
    outputs: Sequence[Output],
    samples: Samples | None,
    asked: Resources,
    write_config: str | None,
    given: Mapping[str, object],
    as_json: bool,
) -> None:
    """`streamconv plan` of several outputs.

    Args:
        samples: what INT4 codes would be searched on, None without a text.
        given: flags that change no byte, for the recipe.

    Raises:
        UsageError: there is a text, and no output has codes to search. Others as of planning.
    """
    from streamconv.cli import recipe_option, several_view
    from streamconv.open_plan import open_and_plan_all

    outputs, searches = _searched(model, outputs, samples, asked)
    index, plans = open_and_plan_all(model, outputs, asked.memory_budget)
    plans = [search.of(made) if search is not None else made for made, search in zip(plans, searches, strict=True)]
    with contextlib.closing(index):
        if write_config:
            tables = [(output.out, made.target) for output, made in zip(outputs, plans, strict=True)]
            recipe_option.write(write_config, model, tables, given, index, several=True)
        several_view.show(index, outputs, plans, searches, asked, as_json)


def _searched(model: str, outputs: Sequence[Output], samples: Samples | None, asked: Resources) -> tuple[list[Output], list[Search | None]]:
    """The outputs whose plans have the sizes of these, and the search for INT4 codes that comes before each, if one does."""
    from streamconv.calibration.foreseen import planned, searches_on

    made: list[Output] = []
    searches: list[Search | None] = []
    for output in outputs:
        on = samples if searches_on(output.target) else None
        with _about(f"output {printable(output.out)}"):
            target, search = planned(model, output.target, on, asked.memory_budget, asked.device)
        made.append(dataclasses.replace(output, target=target))
        searches.append(search)
    if samples is not None and not any(searches):
        raise UsageError("--text has no effect: no output has INT4 codes to search", hint="leave it out")
    return made, searches
