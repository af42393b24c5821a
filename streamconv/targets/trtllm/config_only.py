"""A checkpoint's config.json alone, without weights: for `trtllm-build` with random weights, or to look at."""

from __future__ import annotations

from pathlib import Path

from streamconv.errors import OutputError, printable
from streamconv.run.fs import Disk, named
from streamconv.run.inside import choose
from streamconv.run.lock import OutputLock
from streamconv.run.output_checks import check_free, check_place
from streamconv.run.output_folder import OutputFolder

NAME = "config.json"


def write_config(
    out: str | Path, data: bytes, *, source: Path | None = None, force: bool = False, no_lock: bool = False, disk: Disk | None = None
) -> None:
    """Write a folder that holds config.json and nothing else. It appears when it is complete.

    Args:
        source: the checkpoint it is about; `out` must not be it.
        force: replace a folder that holds something.
        no_lock: write even where the file system has no locks, or cannot sync a folder.

    Raises:
        OutputError: the folder holds something, an unfinished conversion to it is kept, or it cannot be written.
        LockedError: another run is writing to it.
    """
    place = choose(named(out), disk or Disk(), no_lock)
    folder = OutputFolder(place)
    check_place(place, source)
    lock = OutputLock(place)
    try:
        place.open()
        lock.acquire()
        past = place.journal().read()
        place.restore(past.ready)
        mark = check_free(place, force)
        if place.has_work() and not force:
            raise OutputError(
                f"an unfinished conversion to {printable(out)} is kept",
                hint="run its command again to finish it, or give it up with --force",
            )
        folder.create([], fresh=True)
        place.journal().remove(past)
        folder.complete([(NAME, [data])])
        folder.publish(mark)
        place.remove_old()
    except BaseException:
        folder.close()
        place.remove_parents()
        raise
    finally:
        lock.release()
        place.close()
