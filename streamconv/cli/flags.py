"""The flags of the commands: those of every target from the fields of its dataclass, and those that several commands share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import click

from streamconv.errors import UsageError
from streamconv.options import Resources
from streamconv.targets import DEFAULT, TARGETS, target_class
from streamconv.targets.base import flag

if TYPE_CHECKING:
    from streamconv.targets.base import Target

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_Field = dataclasses.Field[Any]


class Flag(click.Option):
    """A flag that `--help` shows under a heading."""

    def __init__(self, *args: Any, heading: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.heading = heading


class Command(click.Command):
    """A command whose help groups the flags by heading."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _flags_of_targets() -> tuple[_Decorator, ...]:
    """A flag for each option of any target: those that several share first, then those of each."""
    owners: dict[str, list[tuple[str, _Field]]] = {}
    for key in TARGETS:
        for field in dataclasses.fields(target_class(key)):
            owners.setdefault(field.name, []).append((key, field))
    order = {name: (len(fields) == 1, [*TARGETS].index(fields[0][0])) for name, fields in owners.items()}
    return tuple(_flag_of(name, owners[name]) for name in sorted(owners, key=order.__getitem__))


def _flag_of(name: str, owners: list[tuple[str, _Field]]) -> _Decorator:
    field = owners[0][1]
    facts, kind, default = field.metadata, field.metadata["type"], field.default
    texts = {each.metadata["help"]: key for key, each in owners}
    text = "; --to ".join(help_text if not number else f"{key}: {help_text}" for number, (help_text, key) in enumerate(texts.items()))
    settings: dict[str, Any] = {
        "cls": Flag,
        "heading": f"Options of --to {owners[0][0]}" if len(owners) == 1 else f"Options of --to {' and '.join(TARGETS)}",
        "help": f"{text[0].upper()}{text[1:]}.",
    }
    if kind is bool:
        return click.option(flag(name), is_flag=True, **settings)
    if kind is tuple:
        return click.option(flag(name), multiple=True, metavar=facts["metavar"], **settings)
    choices = facts["choices"]
    same = not callable(choices) and all(each.metadata["choices"] == choices for _, each in owners)
    settings["type"] = click.Choice([*choices]) if kind is str and choices and same else str if facts["size"] else kind
    metavar = "SIZE" if facts["size"] else facts["metavar"]
    return click.option(flag(name), default=default, show_default=default not in (None, -1), metavar=metavar, **settings)


CONVERSION: tuple[_Decorator, ...] = (
    click.option("--to", type=click.Choice([*TARGETS]), default=DEFAULT, show_default=True, help="What to write; see `list targets`."),
    *_flags_of_targets(),
)


def options_of(to: str) -> dict[str, _Field]:
    """Name -> field of each option of a target."""
    return {field.name: field for field in dataclasses.fields(target_class(to))}


def target(to: str, values: Mapping[str, Any], given: Collection[str]) -> Target:
    """The target that flags ask for.

    Args:
        values: flags of every target, and of other things.
        given: names of those on the command line, or in a recipe; the others hold the target's own defaults.

    Raises:
        UsageError: flags of another target were given, or a value is none.
    """
    from streamconv.memory import parse_size

    own, others = options_of(to), {name for key in TARGETS for name in options_of(key)}
    if wrong := [flag(name) for name in values if name in given and name in others and name not in own]:
        raise UsageError(f"{', '.join(wrong)}: not for --to {to}", hint="`streamconv list targets` shows the options of each target")
    chosen = {name: value for name, value in values.items() if name in own and name in given}
    for name, value in chosen.items():
        if own[name].metadata["size"] and isinstance(value, str):
            chosen[name] = parse_size(value)
    target = target_class(to)(**chosen)
    target.check_values()
    return target


def _under(heading: str) -> Callable[..., _Decorator]:
    """Makes the flags of a heading: (name, help, settings of click)."""

    def decorate(name: str, text: str, **settings: Any) -> _Decorator:
        settings = {"show_default": settings.get("default") is not None} | settings
        return click.option(name, help=text, cls=Flag, heading=heading, **settings)

    return decorate


def _first(*choices: str) -> dict[str, Any]:
    """Settings of a flag with a few values, the first of which is the default."""
    return {"type": click.Choice(choices), "default": choices[0]}


_resource, _calibration, _part, _watching = map(_under, ("Resources", "Calibration", "Several machines", "Watching"))

RESOURCES: tuple[_Decorator, ...] = (
    _resource("--memory-budget", "Ceiling of this process's memory, e.g. 2GiB. Default: from what is free."),
    _resource("--workers", "Worker threads, or auto.", default="auto"),
    _resource("--device", "auto, cpu, cuda, cuda:0 or cuda:0,cuda:1.", default="auto"),
    _resource("--device-memory-budget", "Device memory to use, e.g. 2GiB."),
    _resource("--no-probe", "Do not look at the disks to tell how long it should take.", is_flag=True),
)

OF_A_RUN: tuple[_Decorator, ...] = (
    _resource("--hub-keep", "Hub model: keep its shards in the cache, or remove each once it was read.", **_first("all", "none")),
    _resource(
        "--on-device-loss",
        "A GPU that fails: finish on the CPU, or stop so that the same command resumes later.",
        **_first("cpu", "stop"),
    ),
    _resource(
        "--read",
        "On the CPU: map the source, copy it into memory, or map what the page cache holds. Network file systems are never mapped.",
        **_first("auto", "map", "pread"),
    ),
    _resource(
        "--verify",
        "inline: decode each tile and hold it against its source before it is written; the manifest gets the SNR of each tensor.",
        **_first("none", "inline"),
    ),
    _resource(
        "--no-source-check",
        "Do not read a source that streamconv wrote once more first, to hold it against its own streamconv.json.",
        is_flag=True,
    ),
    _resource("--min-snr", "--verify inline: fail if a tensor's SNR is below.", type=float, metavar="DB"),
)
"""What only a command that converts can use."""

OUTPUTS: tuple[_Decorator, ...] = (
    _under("Several outputs")(
        "--output",
        "An output in the place of OUT; repeat it, and all are made from one read: trtllm:OUT1:tp_size=2,quant=int8,target_sm=90. "
        "Keys are the options of the target with _; modules of a list are joined by +. What is finished is skipped.",
        multiple=True,
        type=click.UNPROCESSED,
        metavar="TARGET:FOLDER:KEY=VALUE,...",
    ),
)
"""More than one output."""

PARTS: tuple[_Decorator, ...] = (
    _part(
        "--parts",
        "Share the work: cut it into N parts, do those that nobody has, and publish the output if the last one is done. "
        "Start the same command as often as you like, anywhere, on one shared folder.",
        type=click.IntRange(1),
        metavar="N",
    ),
    _part("--part", "Do part K (0 to N-1) of N alone; auto/N takes K from the launcher (Slurm, Kubernetes, ...).", metavar="K/N"),
    _part(
        "--wait",
        "Wait so long for parts that others hold while nothing goes on.",
        type=click.FloatRange(0),
        default=300,
        metavar="SECONDS",
    ),
    _part(
        "--private-parts",
        "Write each part into a file of its own, for file systems whose locks do not reach other machines.",
        is_flag=True,
    ),
    _part(
        "--engine",
        "Give the parts to a Ray cluster, as tasks (streamconv[ray]); run it inside the cluster.",
        metavar="ray[=ADDRESS]",
    ),
)
"""How several processes share a conversion."""

SAMPLES: tuple[_Decorator, ...] = (
    _calibration("--text", "Calibrate on this: a .txt or .jsonl file, a folder of them, or a data set on the Hub.", metavar="FILE"),
    _calibration("--samples", "Calibration samples, -1 for all.", default=512, show_default="512, and 128 for INT4 codes"),
    _calibration("--max-length", "Tokens of a calibration sample.", default=512),
    _calibration("--batch-size", "Calibration samples of equal length at once.", default=1),
)

WATCHING: tuple[_Decorator, ...] = (
    _watching(
        "--progress",
        "One live line, a line every 10 s, or a JSON object a second. auto: live on a terminal, lines elsewhere and in CI.",
        **_first("auto", "live", "lines", "json", "none"),
    ),
    _watching(
        "--memory-trace",
        "Write 20 lines of JSON a second: time, memory of the process, its cgroup and devices, bytes read and written, phase.",
        metavar="FILE",
    ),
    _watching(
        "--report",
        "Write one HTML page about the run: memory and rates over time, sizes, errors (streamconv[report]).",
        metavar="FILE.html",
    ),
)


def options(*groups: tuple[_Decorator, ...]) -> _Decorator:
    """Groups of flags as one decorator, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def resources(values: Mapping[str, Any]) -> Resources:
    """Resources from the flags that a command has of RESOURCES, OF_A_RUN and PARTS.

    Raises:
        UsageError: a value that is none, or that contradicts another.
    """
    from streamconv.memory import parse_size

    choices: dict[str, Any] = {name: values[name] for name in _AS_TYPED if name in values}
    choices |= {name: parse_size(values[name]) for name in ("memory_budget", "device_memory_budget") if values.get(name)}
    workers, part, parts = values["workers"], values.get("part"), values.get("parts")
    if workers not in (None, "auto"):
        try:
            choices["workers"] = int(str(workers))
        except ValueError:
            raise UsageError(f"--workers {workers!r} is neither a number nor auto") from None
    if part is not None or parts:
        from streamconv import launchers
    if part is not None:
        choices["part"], count = launchers.part_of(part)
        if parts not in (None, count):
            raise UsageError(f"--part {part} and --parts {parts} contradict each other")
        choices["parts"] = count
    elif parts:
        choices |= {"parts": parts, "begin": launchers.begin()}
    rows = os.environ.get("STREAMCONV_TILE_ROWS")
    return Resources(
        **choices,
        tile_rows=int(rows) if rows else None,
        verify_inline=values.get("verify") == "inline",
        probe=not values.get("no_probe"),
        source_check=not values.get("no_source_check"),
    )


_AS_TYPED = ("device", "hub_keep", "on_device_loss", "read", "no_lock", "min_snr", "wait", "private_parts")
"""Fields of `Resources` that hold what the flag of the same name does."""
