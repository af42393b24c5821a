"""What is mounted where: file systems that a plan has to know of."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_OCTAL = re.compile(r"\\([0-7]{3})")


_BEGUN_INSIDE = ".streamconv-journal"


def mounted(table: Path = Path("/proc/self/mountinfo")) -> dict[Path, str]:
    """Mount point -> file system type, as this process sees them; empty where the system does not say."""
    try:
        lines = table.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return {}
    kinds = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) > 4 and kind:
            kinds[Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4]))] = kind[0]
    return kinds


def kind_of(path: Path) -> str:
    """Type of the file system that holds, or will hold, `path`: "ext4", "tmpfs", ...; empty if unknown."""
    table, real = mounted(), Path(os.path.realpath(path))
    return next((table[place] for place in (real, *real.parents) if place in table), "")


def in_memory(path: Path) -> bool:
    """What is written there takes memory: the container's limit counts it."""
    return kind_of(path) in ("tmpfs", "ramfs")


def why_inside(out: Path, begun: bool) -> str | None:
    """Why the work for an output has to be done inside its folder, None if beside it.

    Args:
        out: resolved.
        begun: work beside it is kept, so it could be done there.
    """
    if not os.path.isdir(out):
        return None
    if out in mounted() or os.path.ismount(out):
        return "is a mount point, which cannot be renamed"
    if begun:
        return None
    if os.path.lexists(out / _BEGUN_INSIDE):
        return "holds work that was begun in it"
    with contextlib.suppress(FileNotFoundError):
        if os.path.samefile(out, os.getcwd()):
            return "is the current folder, which a shell would lose"
    with os.scandir(out) as entries:
        if kind_of(out) == "overlay" and any(entries):
            return "may lie in a lower layer of an overlay, where folders cannot be renamed"
    return None if os.access(out.parent, os.W_OK | os.X_OK) else "is in a folder that nothing can be written to"
