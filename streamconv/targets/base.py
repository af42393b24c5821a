"""What a target is: a frozen dataclass whose fields are the options that decide its bytes, and what it makes of a source.

The fields are the only list of a target's options: flags, recipe keys, `--help` and the manifest come from them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from streamconv.checkpoint.index import Index
from streamconv.planning.draft import Draft


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[Any] | None = None,
    least: int | None = None,
    size: bool = False,
    typed: type | None = None,
) -> Any:
    """A field of a target.

    Args:
        text: what `--help` says.
        choices: the values that it takes; None: any of the type.
        least: the smallest number.
        size: the number is one of bytes, and may be typed with a unit.
        typed: the type of a value whose default is None.
    """
    metadata = {"help": text, "choices": choices, "least": least, "size": size, "type": typed or type(default)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Check:
    """What `verify` found in a folder without a source; `problems` empty means good."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target(ABC):
    """A kind of output.

    Attributes:
        key: what the user calls it: `--to KEY`.
        summary: a line of `streamconv list targets`.
        loader: what reads such an output, for messages.
    """

    key: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def describe(self, index: Index, draft: Draft) -> Target:
        """Fix every output byte: files, tensors, side files, warnings, into `draft`.

        Returns:
            The target with everything settled that was left to the source.

        Raises:
            UsageError: an option no model makes right. CheckpointError: the source lacks something.
            RefusedError: the request cannot give a correct output; every reason is listed.
        """

    @property
    def files_read(self) -> tuple[Path, ...]:
        """Files beside the source that decide the output."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """The options, for the manifest."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def fingerprint(self) -> Mapping[str, Any]:
        """The options that decide bytes; files count by their content and not by their place."""
        return {key: value for key, value in self.to_json().items() if key != "activation_ranges"}
