"""Files in huggingface_hub's cache: what they hold is hashed, and only what a run brought there is removed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

from streamconv.checkpoint.untrusted import open_regular
from streamconv.errors import SourceChangedError, printable

_PIECE = 1 << 20


class Brought(NamedTuple):
    """A file that this run downloaded: its content, and the name it has in a snapshot (a link to it, or itself)."""

    blob: Path
    inode: tuple[int, int]


def blobs(folder: Path) -> set[str]:
    """Names of the contents that a repository's cache holds.

    Args:
        folder: a snapshot's folder.
    """
    with contextlib.suppress(OSError):
        return set(os.listdir(folder.parent.parent / "blobs"))
    return set()


def brought(path: Path, before: set[str]) -> Brought | None:
    """What a download to `path` in a snapshot's folder brought; None if the content was there `before`, or lies outside of the cache."""
    home = path.parent.parent.parent / "blobs"
    with contextlib.suppress(OSError):
        blob = path
        if os.path.islink(path):
            to = Path(os.path.normpath(path.parent / os.readlink(path)))
            if to.parent != home or to.name in before:
                return None
            blob = to
        status = os.lstat(blob)
        if stat.S_ISREG(status.st_mode):
            return Brought(blob, (status.st_dev, status.st_ino))
    return None


def remove(path: Path, ours: Brought) -> None:
    """Remove what a run brought, unless it was replaced or something else refers to it."""
    with contextlib.suppress(OSError):
        status = os.lstat(ours.blob)
        if (status.st_dev, status.st_ino) != ours.inode or status.st_nlink != 1:
            return
        if ours.blob != path:
            for place, _, names in os.walk(path.parent.parent):
                for name in names:
                    other = Path(place, name)
                    if other != path and os.path.islink(other) and other.resolve() == ours.blob.resolve():
                        return
            path.unlink()
        ours.blob.unlink()


def check_content(path: Path, oid: str, shown: str) -> os.stat_result:
    """Hash a file and compare.

    Args:
        oid: SHA-256 of the content, or git's SHA-1 of a blob (hex); "" where nobody knows.

    Returns:
        what the system says of the file that was hashed, from before.

    Raises:
        SourceChangedError: it is another content. CheckpointError: it cannot be opened.
    """
    fd = open_regular(path)
    try:
        status, at = os.fstat(fd), 0
        digest = hashlib.sha256() if len(oid) == 64 else hashlib.sha1(b"blob %d\0" % status.st_size, usedforsecurity=False)
        while oid and (data := os.pread(fd, _PIECE, at)):
            digest.update(data)
            at += len(data)
    finally:
        os.close(fd)
    if oid and digest.hexdigest() != oid:
        raise SourceChangedError(
            f"{shown}: its content is not what the Hub lists ({printable(oid[:12])}...)",
            hint=f"run again; if {printable(path)} is still there, remove that file first",
        )
    return status
