"""Publishing an output that was written in parts: by the last worker, or by hand."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from streamconv.checkpoint.index import Index
from streamconv.errors import LockedError, OutputError, few, printable
from streamconv.open_plan import open_and_plan
from streamconv.planning.parts import Part, cut
from streamconv.planning.plan import Plan
from streamconv.progress import Meter, unwatched
from streamconv.run import journal, manifest
from streamconv.run.claims import Claims, Over
from streamconv.run.finalize import finalize, records_of
from streamconv.run.fs import Disk
from streamconv.run.inside import choose
from streamconv.run.joining import join, plan_file
from streamconv.run.output_state import value_warnings
from streamconv.run.part_record import counted
from streamconv.run.writer import Writer
from streamconv.targets import target_from_json

POLL = 0.2
"""Seconds between two looks at parts that others hold."""


def work_on(out: Path, disk: Disk | None = None) -> Claims | None:
    """The work on an output that is shared in parts; None if the output is complete. Raises OutputError: no such work was begun."""
    claims = Claims.of(out, disk)
    if claims is None and not os.path.exists(out / manifest.NAME):
        raise OutputError(f"{printable(out)}: no work in parts was begun", hint="streamconv convert MODEL OUT --parts N")
    return claims


def finish(out: str | Path, *, check: bool = False, meter: Meter | None = None, disk: Disk | None = None, no_lock: bool = False) -> None:
    """Publish an output whose parts are all done, as the last worker does.

    Args:
        check: read the output back first, and compare it with the hashes of the parts.

    Raises:
        OutputError: parts are not done, or another process is at it. ResumeError: the source is not what it was.
        VerifyError: something else than the parts wrote was read back.
    """
    claims = work_on(Path(out), disk)
    if claims is None:
        return
    begun = claims.plan_file
    claims.leave()
    options = begun["run"]["options"]
    target = target_from_json(options["target"], {name: value for name, value in options.items() if name != "target"})
    index, plan = open_and_plan(begun["source"], target)
    with index:
        parts = cut(plan, begun["parts"])
        claims = Claims(choose(Path(out), disk or Disk(), no_lock), len(parts))
        what = (begun[name] for name in ("page", "private", "force", "source"))
        run = plan_file(journal.identity(plan, index.shards), len(parts), *what)
        try:
            if not join(claims, plan, index.shards, run, False, 60.0):
                return
            missing = [number for number in range(len(parts)) if not claims.done(number)]
            if missing:
                raise OutputError(
                    f"{printable(out)}: of {len(parts)} parts {few([*map(str, missing)], 10)} are not done",
                    hint="`streamconv status` shows who is at them; any worker does what is free",
                )
            publish(claims, index, plan, parts, meter or Meter(unwatched), 60.0, check)
        except Over:
            return
        finally:
            claims.leave()


def publish(
    claims: Claims, index: Index, plan: Plan, parts: Sequence[Part], meter: Meter, patience: float, check: bool = False
) -> list[str]:
    """Publish the work of all parts, once nobody else is at it.

    Args:
        patience: seconds to wait for others.
        check: see `finalize`.

    Returns:
        what the values of the source mean for the output.

    Raises:
        Over: somebody else has published. LockedError: somebody else is at it, and does not come to an end.
    """
    until = time.monotonic() + patience
    while True:
        right = claims.publisher()
        try:
            if right is None:
                raise LockedError(f"{printable(claims.place.out)} is being published by another process", hint="wait for it")
            return _publish(claims, index, plan, parts, meter, check)
        except LockedError:  # one that joins holds the output for a moment
            if time.monotonic() >= until:
                raise
        finally:
            if right is not None:
                right.close()
        time.sleep(POLL)


def _publish(claims: Claims, index: Index, plan: Plan, parts: Sequence[Part], meter: Meter, check: bool) -> list[str]:
    meter.phase("syncing")
    records, place = records_of(claims, plan, parts), claims.place
    with Writer(place.out, index.root, plan, index.shards, claims.plan_file["force"], place.disk, place.lenient, parts=True) as writer:
        if not writer.finished:
            finalize(claims, writer, plan, parts, records, check)
        claims.remove()
    place.keep_parents()
    return value_warnings(plan, counted(records, "overflow"), counted(records, "nonfinite"))
