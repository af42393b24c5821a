"""The kinds of outputs, by key. A target is one folder; nothing outside of it names what only its loader knows."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from streamconv.errors import UsageError, printable

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.targets.base import Target
    from streamconv.targets.checks import Checks

TARGETS: Mapping[str, tuple[str, str]] = {
    "trtllm": ("streamconv.targets.trtllm.options", "TensorRTLLM"),
    "hf": ("streamconv.targets.hf.target", "HuggingFace"),
}
"""Key -> module and class; the first is the default."""
DEFAULT = "trtllm"


def target_class(key: str) -> type[Target]:
    """The class of a target.

    Raises:
        UsageError: there is none of that name; the message lists those there are.
    """
    if key not in TARGETS:
        raise UsageError(f"unknown target {printable(key)!r}", hint=f"one of {', '.join(TARGETS)}")
    module, name = TARGETS[key]
    return cast("type[Target]", getattr(importlib.import_module(module), name))


def target_of(config: Mapping[str, Any]) -> type[Target]:
    """The kind of output that a config.json is of; a Hugging Face directory if no other says so."""
    kinds = [target_class(key) for key in TARGETS]
    return next((kind for kind in kinds if kind.has_written(config)), kinds[-1])


def checks_of(key: str) -> Checks:
    """What `verify` asks of outputs of a target."""
    return cast("Checks", importlib.import_module(f"{target_class(key).__module__.rpartition('.')[0]}.check"))


def opened(folder: Path, as_stored: bool = False) -> Index | None:
    """An output as a source, see `Target.opened`; None for any other folder."""
    return next((index for key in TARGETS if (index := target_class(key).opened(folder, as_stored)) is not None), None)


def target_from_json(key: str, options: object) -> Target:
    """A target as a manifest tells of it.

    Raises:
        UsageError: no such target, or options that it does not have.
    """
    return target_class(key).from_json(options)
