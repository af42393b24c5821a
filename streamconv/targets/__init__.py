"""The kinds of outputs, by key. A target is one folder; nothing outside of it names what only its loader knows."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from streamconv.errors import UsageError, printable

if TYPE_CHECKING:
    from streamconv.targets.base import Target

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


def target_from_json(key: str, options: object) -> Target:
    """A target as a manifest tells of it.

    Raises:
        UsageError: no such target, or options that it does not have.
    """
    return target_class(key).from_json(options)
