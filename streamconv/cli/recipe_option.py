"""`--config FILE`: a recipe's values take the place of the defaults; flags on the command line win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamconv.cli import output
from streamconv.options import Resources

if TYPE_CHECKING:
    from streamconv.cli.recipe import Kind, Recipe
    from streamconv.planning.plan import PlannedTarget

_KEY = "streamconv.cli.recipe"
_OWN = ("config", "write_config", "as_json", "quiet", "more")
"""What a command says, and recipes themselves, are no part of one."""
_NUMBERS_TOO = ("workers",)
"""Flags whose text may be a number, so that it need not be quoted."""


def kinds(*commands: click.Command) -> dict[str, Kind]:
    """What a recipe may hold: every parameter of the commands."""
    found: dict[str, Kind] = {}
    for command in commands:
        for param in command.params:
            if param.name is not None and param.name not in _OWN:
                found[param.name] = _kind(param)
    return found


def _kind(param: click.Parameter) -> Kind:
    from streamconv.cli.recipe import Kind

    if param.name == "output":
        return Kind((list,), "a table for each output: [[output]]")
    if isinstance(param, click.Option) and param.multiple:
        return Kind((list,), "a list of texts in quotes")
    if isinstance(param, click.Option) and param.is_flag:
        return Kind((bool,), "true or false")
    if isinstance(param.type, click.Choice):
        choices = tuple(str(choice) for choice in param.type.choices)
        return Kind((str,), "a text in quotes", choices)
    if isinstance(param.type, click.types.IntParamType):
        return Kind((int,), "a whole number")
    if isinstance(param.type, click.types.FloatParamType):
        return Kind((int, float), "a number")
    if param.name in _NUMBERS_TOO:
        return Kind((int, str), "a whole number or a text in quotes")
    return Kind((str,), "a text in quotes")


def option(known: Callable[[], dict[str, Kind]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The --config option of a command."""

    def take(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is None:
            return
        from streamconv.cli import recipe

        found = recipe.read(value, known())
        context.meta[_KEY] = found
        context.default_map = found.values

    return click.option(
        "--config",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=take,
        help="Take MODEL, OUT and flags from a recipe (.toml, .yaml) or from the streamconv.json of a conversion; flags typed here win.",
    )


def compare(out: str) -> None:
    """After a conversion from a manifest: warn if the output is not what the manifest tells of."""
    found: Recipe | None = click.get_current_context().meta.get(_KEY)
    why = found.differences(Path(out)) if found is not None else None
    if why is not None and found is not None:
        output.note(f"warning: {out} is not what {found.path} tells of: {why}")


def text(model: str, outputs: Sequence[tuple[str | None, PlannedTarget]], others: Mapping[str, object], index: Any, several: bool) -> str:
    """The recipe of plans; a model of the Hub is named by its commit.

    Args:
        outputs: folder and target of each.
        several: a table for each; else it is one, whose folder may be missing.
        others: flags that change no byte.
    """
    from streamconv.cli import recipe

    named, changed = _named(model, index), _changed(others)
    if not several:
        return recipe.render(named, *outputs[0], changed)
    return recipe.render_all(named, [(out, target) for out, target in outputs if out is not None], changed)


def _named(model: str, index: Any) -> str:
    from streamconv.hub.shard import HubShard

    for shard in index.shards:
        if isinstance(shard, HubShard):
            return f"hf://{shard.repo.name}@{shard.repo.commit}"
    return model


def _changed(others: Mapping[str, object]) -> dict[str, object]:
    plain = Resources()
    return {key: value for key, value in others.items() if value not in (getattr(plain, key, None), "auto")}


def write(
    path: str,
    model: str,
    outputs: Sequence[tuple[str | None, PlannedTarget]],
    others: Mapping[str, object],
    index: Any,
    several: bool = False,
) -> None:
    """Write what `text` gives."""
    from streamconv.cli import recipe

    recipe.write(path, text(model, outputs, others, index, several))
