"""The options that an output was made with, with the files that they name where those are now."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from streamconv.errors import UsageError, VerifyError, printable
from streamconv.run import manifest
from streamconv.targets import target_from_json
from streamconv.targets.base import Target
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.import_rules import brings_scales
from streamconv.targets.trtllm.options import TensorRTLLM


def asked(told: manifest.Manifest, folder: Path) -> Target:
    """The options that a manifest tells of."""
    try:
        return target_from_json(told.target, told.asked)
    except UsageError as error:
        raise VerifyError(f"{printable(str(folder / manifest.NAME))} is not a streamconv manifest: {error.message}") from None


def with_ranges(folder: Path, source: Path, options: Target, ranges: str | None) -> Target:
    """The options with a ranges file that is there: the one that is named, or of the same name beside the output."""
    if not isinstance(options, TensorRTLLM | HuggingFace):
        return options
    if ranges is not None:
        if not options.uses_ranges():
            raise UsageError("--activation-ranges: this checkpoint was made without any")
        return dataclasses.replace(options, activation_ranges=ranges)
    if options.codes is not None and not os.path.isfile(options.codes):
        near = [folder.absolute().parent / name for name in (Path(options.codes).name, f"{folder.absolute().name}.int4.safetensors")]
        found = next((place for place in near if os.path.isfile(place)), None)
        if found is None:
            told = f"the INT4 codes {printable(options.codes)} are not there, and they cannot be made again from the source alone"
            raise UsageError(told, hint="put the file beside the output; without --source the output is checked by its hashes")
        options = dataclasses.replace(options, codes=str(found))
    if options.activation_ranges is None:
        brought = isinstance(options, TensorRTLLM) and options.quant == "fp8" and brings_scales(source)
        if options.needs_ranges() and not brought:
            raise UsageError("--source: this checkpoint was made with activation ranges", hint="name their file: --activation-ranges FILE")
        return options
    known = Path(options.activation_ranges)
    places = [known, folder.absolute().parent / known.name, folder.absolute().parent / f"{folder.absolute().name}.ranges.safetensors"]
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        shown = printable(str(known))
        raise UsageError(f"the activation ranges {shown} are not there", hint="say where they are: --activation-ranges FILE")
    return dataclasses.replace(options, activation_ranges=str(found))
