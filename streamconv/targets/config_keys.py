"""Two config.json files, key by key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from streamconv.errors import printable

SHOWN = 20
"""Lines that are shown."""


def line(key: str, held: object, wanted: object, where: str) -> str:
    """A value that differs, for people."""
    shown, right = (printable(json.dumps(value), 60) for value in (held, wanted))
    return f"config.json: {printable(key)} is {shown}, and {right} {where}"


def flat(config: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    """(key, value) with the keys of inner objects after a dot; what is empty is null."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", None if value in ([], {}) else value


def rope_scaling(stated: object) -> dict[str, Any]:
    """A scaling of rotary embedding, its type under one name, "default" where there is none."""
    held = {key: value for key, value in stated.items() if value is not None} if isinstance(stated, dict) else {}
    kind = held.pop("rope_type", None)
    return held | {"type": held.get("type", kind or "default")}
