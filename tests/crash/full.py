"""The full counts of the crash tests: `python -m tests.crash.full --what kills|faults|power|...`; prints counts and differences.

Exit status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.crash import faults, flips, intruders, kills, powercut, processes
from tests.crash.kills import Count
from tests.crash.world import World, fast_folder

FORMATS, LAYOUTS = ("none", "int8", "int4"), (1, 2)


@contextmanager
def world(**settings: object) -> Iterator[World]:
    root = fast_folder()
    try:
        yield World(root, **settings)  # type: ignore[arg-type]
    finally:
        shutil.rmtree(root)


@contextmanager
def runs(quant: str = "none", megabytes: int = 64) -> Iterator[processes.Runs]:
    root = fast_folder()
    try:
        yield processes.Runs(root, quant, megabytes)
    finally:
        shutil.rmtree(root)


def show(what: str, count: Count, began: float) -> int:
    facts = "".join(f", {value} {name}" for name, value in count.facts.items())
    print(f"{what}: {count.cases} cases{facts}, {len(count.wrong)} wrong, {time.monotonic() - began:.0f} s", flush=True)
    for line in count.wrong[:20]:
        print(f"  {line}")
    return len(count.wrong)


def in_worlds(what: str, job: Callable[[World], Count]) -> int:
    """Every format x layout, and one that replaces an older output."""
    wrong = 0
    cases: list[dict[str, object]] = [{"quant": quant, "tp": tp} for quant in FORMATS for tp in LAYOUTS]
    for settings in [*cases, {"replaced": True}, {"mounted": True}, {"mounted": True, "replaced": True}]:
        began = time.monotonic()
        with world(**settings) as place:
            wrong += show(f"{what} {settings}", job(place), began)
    return wrong


def main() -> int:
    jobs: dict[str, Callable[[float], int]] = {
        "kills": lambda share: in_worlds("every kill, any depth", kills.every_state),
        "sigkill": lambda share: in_worlds("SIGKILL, 3 in a row", lambda w: kills.real_kills(w, 3, step=int(1 / share))),
        "faults": lambda share: in_worlds("faults", lambda w: faults.every_operation(w, step=int(1 / share))),
        "intruders": lambda share: in_worlds("intruders", lambda w: intruders.every_operation(w, step=int(1 / share))),
        "power": lambda share: in_worlds("power cuts", lambda w: powercut.cuts(w, int(50_000 * share / 7) + 1)),
        "matrix": lambda share: in_worlds("workers x budget x interruptions", flips.matrix),
        "flips": lambda share: in_worlds("flipped bits", lambda w: flips.flips(w, int(10_000 * share / 7) + 1)),
        "random": lambda share: in_runs("random SIGKILL", lambda r: processes.random_kills(r, int(1000 * share))),
        "locks": lambda share: in_runs("lock races", lambda r: processes.lock_races(r, int(200 * share)), 8),
        "disk": lambda share: in_runs("full disk", lambda r: processes.full_disk(r, int(40 * share))),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=[*jobs, "all"], default="all")
    parser.add_argument("--share", type=float, default=1.0, help="part of the full count, at most 1")
    asked = parser.parse_args()
    return 1 if sum(jobs[what](asked.share) for what in (jobs if asked.what == "all" else [asked.what])) else 0


def in_runs(what: str, job: Callable[[processes.Runs], Count], megabytes: int = 64) -> int:
    began = time.monotonic()
    with runs(megabytes=megabytes) as place:
        return show(what, job(place), began)


if __name__ == "__main__":
    sys.exit(main())
