"""Recipe files: the flags of a conversion in TOML or YAML, or the manifest of one that was done.

Keys are the long flags, with - or _. Paths mean what they mean on the command line: relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv.arguments import check_text
from streamconv.checkpoint.limits import MAX_RECIPE
from streamconv.checkpoint.untrusted import read_file, shown_value
from streamconv.errors import OutputError, UsageError, VerifyError, printable
from streamconv.run import manifest
from streamconv.targets import target_from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.cli.recipe_option import Kind
    from streamconv.planning.plan import Plan, PlannedTarget
    from streamconv.targets.base import Output

@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe read.

    Attributes:
        values: underscored key -> value; keys that hold nothing (null) are left out.
        made: the manifest it is, if it is one.
    """

    path: Path
    values: dict[str, Any]
    made: manifest.Manifest | None = None

    def differences(self, folder: Path) -> str | None:
        """Why an output folder is not the one the manifest tells of; None if it is, or if this is no manifest."""
        if self.made is None:
            return None
        now = manifest.read_head(folder / manifest.NAME)
        if now.check == self.made.check:
            return None
        if now.sources != self.made.sources:
            return "the source is another one"
        if (now.target, now.asked) != (self.made.target, self.made.asked):
            return "other flags were given"
        return "this version of streamconv writes other bytes"


def read(path: str | Path, kinds: Mapping[str, Kind]) -> Recipe:
    """Read a recipe.

    Args:
        path: .toml, .yaml or .yml; .json or a folder: the manifest of a conversion.
        kinds: underscored key -> what it may hold.

    Raises:
        UsageError: it cannot be read; a key is unknown, twice there, or holds something else. Names the file and the key.
    """
    file = Path(path)
    file = file / manifest.NAME if os.path.isdir(file) else file
    name = printable(file)
    if not os.path.lexists(file):
        raise UsageError(f"--config {name}: No such file or folder")
    if file.suffix.lower() == ".json":
        return _from_manifest(file)
    values: dict[str, Any] = {}
    for key, value in _parse(file).items():
        plain = str(key).replace("-", "_")
        if plain not in kinds:
            near = difflib.get_close_matches(plain, kinds, 1, 0.5)
            flag = near[0].replace("_", "-") if near else ""
            raise UsageError(
                f"{name}: unknown key {printable(key)!r}",
                hint=f"did you mean {flag!r}?" if near else "keys are the long flags of streamconv convert",
            )
        if plain in values:
            raise UsageError(f"{name}: {printable(key)!r} is there twice")
        if value is not None and not kinds[plain].accepts(value):
            raise UsageError(f"{name}: {printable(key)} is {shown_value(value)}, not {kinds[plain].wanted(value)}")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(text, f"{name}: {printable(key)}")
        values[plain] = value
    return Recipe(file, {key: value for key, value in values.items() if value is not None})


def _parse(file: Path) -> dict[Any, Any]:
    name = printable(file)
    if file.suffix.lower() not in (".toml", ".yaml", ".yml"):
        raise UsageError(f"{name} ends in none of .toml, .yaml, .yml and .json", hint="--config takes a recipe or a manifest")
    data = read_file(file, MAX_RECIPE, UsageError)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: {error}") from None
    try:
        content = tomllib.loads(text) if file.suffix.lower() == ".toml" else _yaml(text)
    except RecursionError:
        raise UsageError(f"{name} is nested too deeply: a recipe has one line for each flag") from None
    except (ValueError, ArithmeticError, TypeError, LookupError, AttributeError) as error:  # what parsers make of odd numbers and dates
        raise UsageError(f"{name}: {printable(' '.join(str(error).split()), 300)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{name} holds no keys", hint="write one line for each flag: tp-size: 2")
    return content


def _yaml(text: str) -> Any:
    """What a YAML text holds. Raises ValueError: it is no YAML, or holds an alias, by which a few lines stand for billions."""
    import yaml

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("aliases (*name) have no place in a recipe")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _from_manifest(file: Path) -> Recipe:
    try:
        written = manifest.read_head(file)
    except VerifyError as error:
        raise UsageError(f"--config: {error.message}", hint="it takes the manifest of a conversion as it was written") from None
    try:
        target_from_json(written.target, written.asked)
    except UsageError as error:
        raise UsageError(f"--config: {printable(file)} is not a streamconv manifest: {error.message}") from None
    given = {key: value for key, value in written.asked.items() if value is not None and value != []}
    return Recipe(file, {"to": written.target, **given}, written)


def of_plans(
    model: str, outputs: Sequence[Output], plans: Sequence[Plan], flags: Mapping[str, object], index: Index, several: bool
) -> str:
    """The recipe of plans: every option is settled, and a model of the Hub is named by its commit.

    Args:
        flags: of the command; those of resources that were changed are kept.
    """
    named = model if index.repo is None else f"hf://{index.repo}@{index.root.name}"
    resources = {name: value for name in _RESOURCES if (value := flags.get(name)) != "auto"}
    return render(named, [(one.out, plan.target) for one, plan in zip(outputs, plans, strict=True)], resources, several)


def render(model: str, outputs: Sequence[tuple[str, PlannedTarget]], others: Mapping[str, object], several: bool = False) -> str:
    """TOML that gives this conversion again: every option is written, so that no default can change it.

    Args:
        outputs: folder, which may be empty, and target of each.
        others: further flags, which change no byte; None is left out.
        several: a table for each output.
    """
    more = "" if several or outputs[0][0] else f" {printable(model)} OUT"
    lines = [
        "# A conversion by streamconv. Run it again with",
        f"#     streamconv convert --config THIS_FILE{more}",
        "# Keys are the long flags; flags on the command line win. Relative paths start at the working directory.",
        "",
        f"model = {_toml(model)}",
    ]
    given = [f"{key.replace('_', '-')} = {_toml(value)}" for key, value in others.items() if value is not None]
    lines += ["", "# what does not decide the bytes", *given] if given else []
    for out, target in outputs:
        options = {"out": out or None, "to": target.key, **target.to_json()}
        lines += ["", "[[output]]" if several else "# the output, and what decides its bytes"]
        lines += [f"{key.replace('_', '-')} = {_toml(value)}" for key, value in options.items() if value not in (None, ())]
    return "\n".join(lines) + "\n"


_RESOURCES = ("memory_budget", "workers", "device", "device_memory_budget")
"""Flags that a recipe keeps, though they decide no byte."""


def write(path: str | Path, text: str) -> None:
    """Write a recipe that `render` gave. Raises OutputError: the file is there already, or cannot be written."""
    name = printable(path)
    try:
        data = text.encode()
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        raise OutputError(f"{name} exists already", hint="remove it, or give another name to --write-config") from None
    except UnicodeEncodeError:
        raise OutputError(f"{name}: a path in it is no UTF-8 and cannot be written into a recipe") from None
    except OSError as error:
        raise OutputError(f"{name} cannot be written: {error.strerror}") from None


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
