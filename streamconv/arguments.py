"""What a program passes to the public functions: refused by name where its type cannot be meant, before anything is done."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from streamconv.errors import StreamconvError, UsageError, printable
from streamconv.memory import parse_size

Value = TypeVar("Value")


def path_of(value: object, name: str) -> str:
    """A path, or a name on the Hub. Raises UsageError: it is neither a string nor a path object, or no file can have this name."""
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{name} is {_a(value)}, not a path")
    text = os.fsdecode(value)
    check_text(text, name)
    return text


def check_text(text: str, name: str) -> None:
    """Refuse a text that the system takes for nothing.

    Args:
        name: of the argument or flag, for errors.

    Raises:
        UsageError: it is empty, holds a NUL character, or half of a character.
    """
    if not text:
        raise UsageError(f"{name} is empty", hint="a variable that is not set?")
    try:
        nul = b"\0" in os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(f"{name} holds half of a character: {printable(text)}") from None
    if nul:
        raise UsageError(f"{name} holds a NUL character: {printable(text)}")


def check_words(words: Sequence[str]) -> None:
    """`check_text` for each value on a command line. Raises UsageError: names the flag before it."""
    for before, word in zip(("", *words), words, strict=False):
        named, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        if equals:
            check_text(value, named if named.startswith("-") and "=" not in named else "an argument")


def settled(value: object, kind: type[Value], name: str) -> Value:
    """A record of choices whose fields have the types that they are declared with: paths become strings, and ints floats.

    Args:
        kind: a frozen dataclass.

    Raises:
        UsageError: it is of another class, or a field holds something else; names the field.
    """
    if not isinstance(value, kind):
        public = "TensorRTLLM" if name == "target" else kind.__name__
        raise UsageError(f"{name} is {_a(value)}", hint=f"it takes a streamconv.{public}(...)")
    changes = as_declared(value, choices=True)
    changed: Value = dataclasses.replace(value, **changes) if changes else value  # type: ignore[type-var]
    return changed


def as_declared(record: object, choices: bool = False) -> dict[str, Any]:
    """Fields of a dataclass that hold what is meant as another type, as that type: paths as strings, ints as floats, lists as tuples.

    Args:
        choices: refuse a value that is none of the choices, too; a target tells them apart in the words of its flags.

    Raises:
        UsageError: a field holds what cannot be meant; names it.
    """
    public, changes, hints = type(record).__name__, dict[str, Any](), get_type_hints(type(record))
    for field in (each.name for each in dataclasses.fields(record)):  # type: ignore[arg-type]
        given, declared = getattr(record, field), hints[field]
        if not _is_one(given, declared, choices):
            changes[field] = _as_meant(f"{public}({field}={printable(repr(given), 60)})", field, given, declared)
    return changes


def _is_one(value: object, declared: Any, choices: bool) -> bool:
    if get_origin(declared) in (Union, UnionType):
        return any(_is_one(value, one, choices) for one in get_args(declared))
    if get_origin(declared) is Literal:
        return value in get_args(declared) if choices else type(value) in map(type, get_args(declared))
    if get_origin(declared) is tuple:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    return type(value) is declared  # a bool is no int here, nor is numpy's


def _as_meant(shown: str, field: str, value: object, declared: Any) -> object:
    kinds = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    if float in kinds and type(value) is int:
        return float(value)
    if str in kinds and isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if get_origin(declared) is tuple and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    if get_origin(declared) is Literal:
        raise UsageError(f"{shown} is not one of {', '.join(map(repr, get_args(declared)))}")
    raise UsageError(f"{shown} is not {' or '.join(_name(kind) for kind in kinds)}", hint=_hint(field, value))


def _name(kind: Any) -> str:
    return "None" if kind is NoneType else str(getattr(kind, "__name__", kind))


def _hint(field: str, value: object) -> str | None:
    """A size as the command line takes it."""
    try:
        return f"{field}={parse_size(value)}, in bytes" if isinstance(value, str) and "budget" in field else None
    except StreamconvError:
        return None


def _a(value: object) -> str:
    kind = "type" if isinstance(value, type) else type(value).__name__  # a class is one, whatever made it
    return "None" if value is None else f"a value of type {kind}"
