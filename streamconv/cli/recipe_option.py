"""`--config FILE`: a recipe's values take the place of the defaults; flags on the command line win."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from streamconv.cli import output

if TYPE_CHECKING:
    from streamconv.cli.recipe import Recipe

_KEY = "streamconv.cli.recipe"
_OWN = ("config", "write_config", "as_json", "quiet", "more")
"""What a command says, and recipes themselves, are no part of one."""
_NUMBERS_TOO = ("workers",)
"""Flags whose text may be a number, so that it need not be quoted."""


class Kind(NamedTuple):
    """What a key may hold.

    Attributes:
        types: accepted Python types; a bool is no int.
        what: the same for people.
        choices: the only values, if not empty.
    """

    types: tuple[type, ...]
    what: str
    choices: tuple[str, ...] = ()

    def accepts(self, value: object) -> bool:
        right = isinstance(value, self.types) and (not isinstance(value, bool) or bool in self.types)
        if isinstance(value, int | float) and not abs(value) < 1 << 63:  # no flag takes more; infinity and NaN are not below it either
            return False
        return right and (not self.choices or value in self.choices)

    def wanted(self, value: object) -> str:
        """What it may hold in the place of a value that it does not accept, for people."""
        return f"one of {', '.join(self.choices)}" if self.choices and isinstance(value, self.types) else self.what


def kinds(*commands: click.Command) -> dict[str, Kind]:
    """What a recipe may hold: every parameter of the commands."""
    params = [param for command in commands for param in command.params]
    return {param.name: _kind(param) for param in params if param.name is not None and param.name not in _OWN}


def _kind(param: click.Parameter) -> Kind:
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

        read = recipe.read(value, known())
        context.meta[_KEY] = read
        context.default_map = read.values

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
    taken: Recipe | None = click.get_current_context().meta.get(_KEY)
    why = taken.differences(Path(out)) if taken is not None else None
    if why is not None and taken is not None:
        output.note(f"warning: {out} is not what {taken.path} tells of: {why}")
