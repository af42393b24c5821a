"""Names that no file can have, in every place that takes a name: each is a typed error before anything is done, and no name means the
current folder by mistake."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

import streamconv
from streamconv.cli import conversion, convert_checkpoint
from streamconv.cli.main import cli, main
from streamconv.cli.official_flags import _parser
from streamconv.errors import StreamconvError, UsageError
from tests import tiny

NOTHING = {"empty": "", "NUL": "a\0b", "half of a character": "\ud800"}
TOO_LONG = {"name": "x" * 300, "path": "a/" * 3000}
ODD = [*NOTHING.values(), *TOO_LONG.values()]
WORDS = {
    "convert": ["MODEL", "OUT"],
    "plan": ["MODEL", "OUT"],
    "verify": ["MADE"],
    "inspect": ["MODEL"],
    "diff": ["MODEL", "MODEL"],
    "calibrate": ["MODEL"],
    "push": ["MADE", "org/name"],
    "bench": ["MODEL"],
    "status": ["OUT"],
    "finalize": ["OUT"],
    "list": ["quants"],
    "submit": [],
}
"""Arguments of each command; a new command fails until it is here."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test ends in the folder in which it began, and nothing has come up there."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert Path.cwd() == here and not any(here.iterdir())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("names")
    model = tiny.write(root / "model")
    streamconv.convert(model, root / "made")
    return {"MODEL": str(model), "MADE": str(root / "made"), "OUT": str(root / "out")}


def _commands(group: click.Group, *before: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, *before, name)
        else:
            yield (*before, name), command


def _taken(param: click.Parameter) -> bool:
    return isinstance(param.type, click.types.StringParamType | click.types.UnprocessedParamType)


PLACES = [
    pytest.param(words, command, param, id=f"{' '.join(words)}-{param.name}")
    for words, command in _commands(cli)
    for param in command.params
    if _taken(param)
]


def _line(words: tuple[str, ...], command: click.Command, param: click.Parameter, odd: str, places: dict[str, str]) -> list[str]:
    """A command line that holds `odd` in the place of a parameter."""
    line = [places.get(word, word) for word in WORDS[words[0]]]
    if not isinstance(param, click.Argument):
        return [*words, *line, param.opts[0], odd]
    number = [each.name for each in command.params if isinstance(each, click.Argument)].index(param.name)
    return [*words, *line[:number], odd, *line[number + 1 :]]


@pytest.mark.parametrize(("words", "command", "param"), PLACES)
def test_every_text_of_every_command(
    words: tuple[str, ...], command: click.Command, param: click.Parameter, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for what, odd in NOTHING.items():
        assert main(_line(words, command, param, odd, places)) == 2, what
        told = capsys.readouterr().err
        assert told.startswith("error: ") and "Traceback" not in told and what in told
        if not isinstance(param, click.Argument):
            assert main([*words, f"{param.opts[0]}={odd}"]) == 2, what
            assert param.opts[0] in capsys.readouterr().err


@pytest.mark.parametrize(("words", "command", "param"), [place for place in PLACES if place.values[0][0] not in ("calibrate", "bench")])
def test_names_that_are_too_long(
    words: tuple[str, ...], command: click.Command, param: click.Parameter, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    named = isinstance(param, click.Argument) or "FILE" in (param.metavar or "") or param.name in ("source", "output")
    if words[0] != "submit" and named:
        for what, odd in TOO_LONG.items():
            odd = f"hf:{odd}" if param.name == "output" else odd
            line = _line(words, command, param, odd, places)
            line = [word for word in line if word != places["OUT"]] if param.name == "output" else line
            status, told = main(line), capsys.readouterr()
            assert status in (2, 3, 4, 6, 7) or (words[0] == "plan" and "would refuse" in told.err + told.out), (what, told)
            assert not status or told.err.startswith("error: ")


def test_every_text_of_nvidias_command(places: dict[str, str]) -> None:
    for action in _parser()._actions:
        if action.nargs != 0:
            for odd in NOTHING.values():
                line = ["--model_dir", places["MODEL"], "--output_dir", places["OUT"]]
                assert convert_checkpoint.main([*line, action.option_strings[0], odd]) == 2, (action.option_strings, odd)


@pytest.mark.parametrize("odd", ["", "a\0b"])
def test_every_text_of_a_recipe(odd: str, places: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    for key in sorted({param.name for param in conversion.convert.params if _taken(param)} - {"output", "more", None}):
        texts = [odd] if key in ("ignore", "only") else odd
        held = {"model": places["MODEL"], "out": places["OUT"], str(key): texts}
        recipe.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in held.items()))
        assert main(["convert", "--config", str(recipe)]) == 2, key
    for key in ("out", "activation_ranges"):
        held = {"out": places["OUT"], key: odd}
        lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in held.items())
        recipe.write_text(f"model = {json.dumps(places['MODEL'])}\n[[output]]\n{lines}")
        assert main(["convert", "--config", str(recipe)]) == 2, key


FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(streamconv, name) for name in streamconv.__all__ if inspect.isfunction(getattr(streamconv, name))
}
NAMES = [
    pytest.param(name, param, id=f"{name}-{param}")
    for name, function in FUNCTIONS.items()
    for param, told in inspect.signature(function).parameters.items()
    if "Path" in str(told.annotation)
]


@pytest.mark.parametrize(("function", "param"), NAMES)
def test_every_name_of_every_function(function: str, param: str, places: dict[str, str]) -> None:
    for odd in ODD:
        given = {"source": places["MODEL"], "model": places["MODEL"], "a": places["MODEL"], "b": places["MODEL"]}
        given |= {"out": places["MADE" if function == "verify" else "OUT"], "text": places["MODEL"]}
        wanted = inspect.signature(FUNCTIONS[function]).parameters
        for kind in (str, Path) if "\ud800" not in odd and odd else (str,):
            with pytest.raises(UsageError if odd in NOTHING.values() else StreamconvError):
                made = FUNCTIONS[function](**{name: place for name, place in given.items() if name in wanted} | {param: kind(odd)})
                if (function, param) == ("plan", "out") and any("would refuse" in line for line in made.warnings):
                    raise StreamconvError("foretold")


@pytest.mark.parametrize("target", [streamconv.TensorRTLLM, streamconv.HuggingFace])
def test_every_name_of_a_target(target: type[streamconv.TensorRTLLM] | type[streamconv.HuggingFace]) -> None:
    named = [field.name for field in fields(target) if field.metadata["metavar"] == "FILE"]
    assert named
    for odd in NOTHING.values():
        with pytest.raises(UsageError):
            target().to(odd)
        for name in named:
            with pytest.raises(UsageError):
                target(**{name: odd})


def test_a_current_folder_that_is_gone(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(gone)
        gone.rmdir()
        assert main(["convert", places["MODEL"], "out"]) == 2
        os.chdir(tmp_path)


def test_an_output_in_the_current_folder_leaves_it_in_its_place(places: dict[str, str], tmp_path: Path) -> None:
    """A shell, and this process, would otherwise be in a folder that is gone."""
    out, before = tmp_path / "made", os.getcwd()
    out.mkdir()
    os.chdir(out)
    try:
        inode = os.stat(".").st_ino
        assert main(["convert", places["MODEL"], ".", "-q"]) == 0 == main(["verify", ".", "-q"])
        assert os.stat(out).st_ino == inode and os.path.exists("rank0.safetensors")
        assert main(["convert", places["MODEL"], ".", "-q", "--force", "--dtype", "float32"]) == 0 == main(["verify", ".", "-q"])
    finally:
        os.chdir(before)
