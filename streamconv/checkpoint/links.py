"""Weight files that are links."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os.path import realpath
from pathlib import Path

from streamconv.errors import printable


def links_out(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """A note on weight files that are links out of the folder, other than those of the Hub's cache into its blobs/."""
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    links = {name: Path(realpath(folder / name)) for name in names if os.path.islink(folder / name)}
    out = {name: real for name, real in links.items() if home not in real.parents and real.parent != blobs}
    if not out:
        return ()
    name, real = next(iter(out.items()))
    more = f" (and {len(out) - 1} more files are links out of the folder)" if len(out) > 1 else ""
    return (f"{printable(name)} is a link to {printable(str(real))}{more}",)
