"""Joining the work on an output that several processes share: the first one begins it, the others compare what it is for."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from streamconv.errors import LockedError, OutputError, ResumeError, VerifyError, printable
from streamconv.run import journal, manifest
from streamconv.run.claim import SharedFolder, differences
from streamconv.run.claims import CLAIMS, PLAN, Claims
from streamconv.run.fs import translate_errors
from streamconv.run.lock import OutputLock
from streamconv.run.output_checks import check_free
from streamconv.run.presence import Presence


def join(
    claims: Claims, run: dict[str, Any], files: Sequence[tuple[str, int]], force: bool, patience: float, is_of: Callable[[], bool]
) -> bool:
    """Take part in the work, and begin it if nobody has.

    Args:
        run: what the work is for; see `told`.
        files: name and size of the tensor files.
        force: replace an output, and give up work for something else that nobody is at.
        patience: seconds to wait for one who begins, or publishes.
        is_of: an output with the same plan is of this source.

    Returns:
        False if the output is there: nothing is left to do.

    Raises:
        ResumeError: the work that is there is for something else. LockedError: somebody else is at work.
        OutputError: the output cannot be written there.
    """
    claims.place.open()
    with _alone(claims, patience):
        past = journal.read(claims.place)
        claims.place.restore(past.ready if past is not None else ())
        found = claims.content() if claims.enter() else None
        _ours(claims, found, past.run if past is not None else {})
        if not claims.place.has_work() and _published(claims, run) and is_of():
            _tidy(claims, past)
            return False
        if found is not None and (changed := differences(found, run)):
            if not force:
                raise ResumeError(
                    f"{printable(str(claims.place.out))} was begun in parts with something else: {', '.join(changed)}",
                    hint="the same command joins the work; --force starts over, once nobody is at it",
                )
            claims.check_idle()
            found = None
        if found is None:
            _begin(claims, run, force, past)
        claims.told = found or run
        _files(claims, files, found is None)
        if not claims.place.lenient:
            with translate_errors(claims.base.path, "write in"):
                claims.presence = Presence(claims.base, secrets.token_hex(4))
    return True


def _ours(claims: Claims, *runs: dict[str, Any] | None) -> None:
    """Files of the work that is there, which has other names with other options."""
    for run in runs:
        listed = (run or {}).get("run", run or {}).get("files")
        claims.place.ours.update(name for name in listed or () if isinstance(name, str))


def _tidy(claims: Claims, past: journal.JournalState | None) -> None:
    """The output is there: remove what whoever published it did not come to remove."""
    claims.place.remove_old()
    if past is not None:
        journal.Journal(claims.place).remove(past)
    if claims.folders:
        claims.remove()


@contextlib.contextmanager
def _alone(claims: Claims, patience: float) -> Iterator[None]:
    """Hold the lock of the output, which those who begin and those who publish hold for a moment."""
    lock, until = OutputLock(claims.place), time.monotonic() + patience
    while True:
        try:
            lock.acquire()
            break
        except LockedError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def _published(claims: Claims, run: dict[str, Any]) -> bool:
    """The output is there, and is what this work makes."""
    path = claims.place.out / manifest.NAME
    if not os.path.lexists(path):
        return False
    with contextlib.suppress(VerifyError):
        return bool(manifest.read_head(path).fingerprint == run["run"]["fingerprint"])
    return False


def _begin(claims: Claims, run: dict[str, Any], force: bool, past: journal.JournalState | None) -> None:
    """Make the folder. Whoever dies on the way leaves one without a plan."""
    if (past is not None or claims.place.has_work()) and not claims.folders and not force:
        raise ResumeError(
            f"{printable(str(claims.place.out))} was begun without --parts",
            hint="run that command again to finish it, or start over with --force",
        )
    with translate_errors(claims.place.out, "read"):
        check_free(claims.place, force)
    with translate_errors(claims.place.base.path / claims.name, "create"):
        if not claims.folders:
            claims.disk.mkdir(claims.place.base, claims.name)
            claims.place.base.sync()  # a power cut that took this name and left that of the work would make it one without parts
            claims.enter()
        claims.place.keep_parents()
        for name in sorted(claims.base.names(), key=lambda name: name != PLAN):
            claims.base.unlink(name)
        claims.place.begin(fresh=True)
        claims.disk.close(claims.base.open(CLAIMS, fresh=True))
        claims.base.sync()  # the plan without it would be work that somebody has published
        SharedFolder(claims.base).write(PLAN, journal.sealed(run))
        if past is not None:
            journal.Journal(claims.place).remove(past)
        claims.place.base.sync()


def _files(claims: Claims, files: Sequence[tuple[str, int]], fresh: bool) -> None:
    """Every file at its full size; holes are zeros, so it does not matter who makes them, or how often."""
    with translate_errors(claims.place.base.path / claims.place.hidden("partial"), "create"):
        claims.place.begin(fresh=False)
        work, made = claims.place.work, False
        for name, size in files:
            there = work.look(name)
            if there is not None and there.st_size == size:
                continue
            if not fresh and any(_is_begun(claims, part) for part in range(claims.count)):
                raise OutputError(
                    f"{printable(str(work.path(name)))} is {'gone' if there is None else 'not as it was made'}",
                    hint="the parts that are done are lost with it: start over with --force",
                )
            fd, made = work.open(name), True
            claims.disk.truncate(fd, size)
            claims.disk.sync(fd)  # before any part is begun: a file without its size is taken for a lost one
            claims.disk.close(fd)
        if made:
            work.folder.sync()
            claims.place.base.sync()


def _is_begun(claims: Claims, part: int) -> bool:
    return any(claims.base.look(f"{part}.{what}") is not None for what in ("json", "journal"))
