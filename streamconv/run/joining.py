"""Joining the work on an output that several processes share: the first one begins it, the others compare what it is for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamconv import __version__
from streamconv.checkpoint.shard import Shard
from streamconv.errors import OutputError, ResumeError, printable
from streamconv.planning.plan import OutputFile, Plan
from streamconv.run import journal, manifest
from streamconv.run.claims import CLAIMS, PLAN, Claims
from streamconv.run.fs import translate_errors
from streamconv.run.lock import OutputLock
from streamconv.run.output_checks import check_free, has_rows_of
from streamconv.run.presence import Presence

FORMAT = 1
"""Of plan.json."""


def plan_file(identity: dict[str, Any], count: int, page: int, private: bool, force: bool, source: str | Path) -> dict[str, Any]:
    """What plan.json holds.

    Args:
        identity: `journal.identity`; without times and inodes of source files, which differ where machines have copies of their own.
        page: bytes that a machine writes at once.
        source: what is converted, for whoever publishes by hand.
    """
    sources = [entry if len(entry) < 7 else [*entry[:3], 0, 0, 0, entry[6]] for entry in identity["sources"]]
    run = {"format": FORMAT, "run": identity | {"sources": sources}, "parts": count, "page": page, "private": private}
    return run | {"force": force, "source": str(source), "streamconv": __version__}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = journal.differences(old["run"], new["run"])
    for name in ("parts", "private"):
        if old.get(name) != new[name]:
            changed.append(f"--{name.replace('private', 'private-parts')} was {printable(old.get(name))}, is {new[name]}")
    return changed


def join(claims: Claims, plan: Plan, shards: Sequence[Shard], run: dict[str, Any], force: bool, patience: float) -> bool:
    """Take part in the work, and begin it if nobody has.

    Args:
        shards: of the source.
        run: what the work is for; see `plan_file`.
        force: replace an output, and give up work for something else that nobody is at.
        patience: seconds to wait for one who begins, or publishes.

    Returns:
        False if the output is there: nothing is left to do.

    Raises:
        ResumeError: the work that is there is for something else. LockedError: somebody else is at work.
        OutputError: the output cannot be written there.
    """
    place = claims.place
    place.ours |= plan.names
    place.open()
    with OutputLock(place).held(patience):  # those who begin and those who publish hold it for a moment
        past = place.journal().read()
        place.restore(past.ready)
        begun = claims.content() if claims.enter() else None
        place.adopt(begun["run"] if begun is not None else {})
        place.adopt(past.run)
        if not place.has_work() and manifest.is_of(place.out, plan.fingerprint()) and has_rows_of(plan, shards, place.out):
            place.remove_old()  # what whoever published it did not come to remove
            place.journal().remove(past)
            if claims.folders:
                claims.remove()
            return False
        if begun is not None and (changed := _differences(begun, run)):
            if not force:
                raise ResumeError(
                    f"an unfinished conversion in parts to {printable(place.out)} used other settings: {', '.join(changed)}",
                    hint="the same command joins the work; --force starts over, once nobody is at it",
                )
            claims.check_idle()
            begun = None
        if begun is None:
            _begin(claims, run, force, past)
        claims.plan_file = begun or run
        _make_files(claims, plan.files, begun is None)
        if not place.lenient:
            with translate_errors(claims.base.path, "write in"):
                claims.presence = Presence(claims.base, os.urandom(4).hex())
    return True


def _begin(claims: Claims, run: dict[str, Any], force: bool, past: journal.JournalState) -> None:
    """Make the folder. Whoever dies on the way leaves one without a plan."""
    if (past or claims.place.has_work()) and not claims.folders and not force:
        raise ResumeError(
            f"{printable(claims.place.out)} was begun without --parts",
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
        claims.write(PLAN, journal.sealed(run))
        claims.place.journal().remove(past)
        claims.place.base.sync()


def _make_files(claims: Claims, files: Sequence[OutputFile], fresh: bool) -> None:
    """Every file at its full size; holes are zeros, so it does not matter who makes them, or how often."""
    with translate_errors(claims.place.base.path / claims.place.hidden("partial"), "create"):
        claims.place.begin(fresh=False)
        work, complete = claims.place.work, False
        for file in files:
            there = work.look(file.name)
            if there is not None and there.st_size == file.size:
                continue
            if not fresh and any(claims.base.look(f"{part}.{of}") for part in range(claims.count) for of in ("json", "journal")):
                raise OutputError(
                    f"{printable(work.path(file.name))} is {'gone' if there is None else 'not as it was made'}",
                    hint="the parts that are done are lost with it: start over with --force",
                )
            fd, complete = work.open(file.name), True
            claims.disk.truncate(fd, file.size)
            claims.disk.sync(fd)  # before any part is begun: a file without its size is taken for a lost one
            claims.disk.close(fd)
        if complete:
            work.folder.sync()
            claims.place.base.sync()
