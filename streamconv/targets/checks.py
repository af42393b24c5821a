"""What `verify` asks of a kind of output: each target answers in the module `check` of its folder; two config.json files, key by key."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from streamconv.errors import printable
from streamconv.targets.base import Target


@dataclass(frozen=True, slots=True)
class Contents:
    """What `verify` knows of an output.

    Attributes:
        config: config.json, an object.
        shapes: file -> tensor -> (dtype, shape).
        hashes: (file, tensor) -> hash of its bytes, of what was hashed.
        copies: files may be copies of each other: no manifest tells their hashes.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
    hashes: Mapping[tuple[str, str], str]
    copies: bool


Findings = tuple[list[str], list[str]]
"""Problems and warnings."""


class Checks(Protocol):
    """What `verify` asks of a kind of output."""

    LOADABLE: Collection[str]

    def tensor_files(self, folder: Path, config: Mapping[str, Any], problems: list[str]) -> list[str]:
        """The weight files that are there and belong to the output, in order; adds to `problems`."""

    def check(self, contents: Contents) -> Findings:
        """What can be said without the source."""

    def made_with(self, config: Mapping[str, Any], first: Path) -> Sequence[Target]:
        """Options that may have given another tool's output, whose bytes are then compared; none: values are.

        Args:
            first: the first of its files.
        """

    def config_differences(self, config: Mapping[str, Any], given: Mapping[str, Any]) -> Findings:
        """What a config.json tells an engine to compute, against the one that conversion gives, or that of the source."""

    def engine_reads(self, folder: Path) -> tuple[str, list[str]]:
        """What the engine's own reader says: a line for people, and a line for each file that it refuses."""


SHOWN = 20
"""Lines that are shown."""


def line(key: str, held: object, expected: object, where: str) -> str:
    """A value that differs, for people."""
    shown, right = (printable(json.dumps(value), 60) for value in (held, expected))
    return f"config.json: {printable(key)} is {shown}, and {right} {where}"


def flat(config: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    """(key, value) with the keys of inner objects after a dot; what is empty is null."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", None if value in ([], {}) else value


def rope_scaling(scaling: object) -> dict[str, Any]:
    """A scaling of rotary embedding, its type under one name, "default" where there is none."""
    entries = {key: value for key, value in scaling.items() if value is not None} if isinstance(scaling, dict) else {}
    kind = entries.pop("rope_type", None)
    return entries | {"type": entries.get("type", kind or "default")}
