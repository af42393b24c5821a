"""The order in which people read names: layer 2 before layer 10."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"0*(\d+)", re.ASCII)


def natural(name: str) -> str:
    """A key to sort names by: each run of digits counts as a number, whose length goes first."""
    return _DIGITS.sub(lambda run: f"{chr(0x30 + len(run[1]))}{run[1]}", name)
