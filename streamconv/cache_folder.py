"""Folders for compiled code, which is run as it is found: nobody else may be able to put something there."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path


def cache_folder(name: str, base: str | None = None) -> Path | None:
    """A folder of the user's own, 0700 whatever the umask; None if there is no such place, and nothing is kept then.

    One that others could write to is emptied first. A relative place is not taken: it would be in the current folder, which may be
    a downloaded model.

    Args:
        base: where it lies; default: `streamconv` in the user's cache (XDG_CACHE_HOME).
    """
    if not base:
        cache = os.environ.get("XDG_CACHE_HOME", "")
        base = os.path.join(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "streamconv")
    folder = Path(base, name)
    if not folder.is_absolute():
        return None
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not os.path.exists(path)]):
            _make(missing)
        if not is_own(os.lstat(folder)):
            shutil.rmtree(folder)
            _make(folder)
        good = is_own(os.lstat(folder)) and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return None
    return folder if good else None


def is_own(status: os.stat_result) -> bool:
    """Whether a file or folder is the user's, no link, and nobody else can write to it."""
    return status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(0o700)
        folder.chmod(0o700)
    except FileExistsError:  # another process was quicker
        pass
