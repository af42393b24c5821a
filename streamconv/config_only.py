"""A checkpoint's config.json alone, without weights: for `trtllm-build` with random weights, or to look at."""

from __future__ import annotations

import os
from pathlib import Path

from streamconv.errors import OutputError, printable
from streamconv.fs import Disk, OutputFolder, check_free, check_place
from streamconv.lock import OutputLock

NAME = "config.json"


def write_config(out: str | Path, data: bytes, *, source: Path | None = None, force: bool = False, disk: Disk | None = None) -> None:
    """Write a folder that holds config.json and nothing else. It appears when it is complete.

    Args:
        out: the folder.
        data: the file's bytes.
        source: the checkpoint it is about; `out` must not be it.
        force: replace a folder that holds something.
        disk: the operations to use (tests).

    Raises:
        OutputError: the folder holds something, an unfinished conversion to it is kept, or it cannot be written.
        LockedError: another run is writing to it.
    """
    folder = OutputFolder(Path(out), disk)
    if source is not None:
        check_place(folder.out, source)
    elif os.path.lexists(folder.out) and not folder.out.is_dir():
        raise OutputError(f"output {printable(str(out))} exists and is not a folder", hint="choose another name")
    folder.make_parents()
    lock = OutputLock(folder.out, folder.disk)
    try:
        lock.acquire()
        folder.restore()
        check_free(folder.out, force)
        if folder.work.exists() and not force:
            raise OutputError(
                f"an unfinished conversion to {printable(str(out))} is kept",
                hint="run its command again to finish it, or give it up with --force",
            )
        folder.create([], fresh=True)
        folder.complete([(NAME, [data])])
        folder.publish()
        folder.remove_old()
    except BaseException:
        folder.close()
        folder.remove_parents()
        raise
    finally:
        lock.release()
