"""Where the files beside a source that decided an output are now: activation ranges, and codes that were searched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from streamconv.errors import UsageError, printable


class UsesFiles(Protocol):
    """Options of a target that reads such files."""

    @property
    def codes(self) -> str | None: ...
    @property
    def activation_ranges(self) -> str | None: ...
    def uses_ranges(self) -> bool: ...
    def needs_ranges(self) -> str | None: ...


def files_beside(options: UsesFiles, folder: Path, ranges: str | None, brought: bool = False) -> dict[str, Any]:
    """Options to replace: those that hold the path of a file which was moved with the output, or is named anew.

    Args:
        folder: the output; ranges: see `Target.with_files`.
        brought: the source holds its ranges.

    Raises:
        UsageError: as of `Target.with_files`.
    """
    if ranges is not None:
        if not options.uses_ranges():
            raise UsageError("--activation-ranges: this checkpoint was made without any")
        return {"activation_ranges": ranges}
    replaced = dict[str, Any]()
    parent, name = folder.absolute().parent, folder.absolute().name
    if options.codes is not None and not os.path.isfile(options.codes):
        found = _first(parent / Path(options.codes).name, parent / f"{name}.int4.safetensors")
        if found is None:
            told = f"the INT4 codes {printable(options.codes)} are not there, and they cannot be made again from the source alone"
            raise UsageError(told, hint="put the file beside the output; without --source the output is checked by its hashes")
        replaced["codes"] = found
    if options.activation_ranges is None:
        if options.needs_ranges() and not brought:
            raise UsageError("--source: this checkpoint was made with activation ranges", hint="name their file: --activation-ranges FILE")
        return replaced
    known = Path(options.activation_ranges)
    found = _first(known, parent / known.name, parent / f"{name}.ranges.safetensors")
    if found is None:
        shown = printable(str(known))
        raise UsageError(f"the activation ranges {shown} are not there", hint="say where they are: --activation-ranges FILE")
    return replaced | {"activation_ranges": found}


def _first(*places: Path) -> str | None:
    return next((str(place) for place in places if os.path.isfile(place)), None)
