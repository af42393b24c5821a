"""Every operation fails, once or from then on, with every error a disk knows."""

from __future__ import annotations

from streamconv.errors import OutputError, StreamconvError
from tests.crash.disks import FAULTS, Failing
from tests.crash.kills import Count, operations
from tests.crash.world import World


def one(world: World, k: int, fault: str, forever: bool) -> str:
    """Run with a fault, look, and run again on a good disk; gives what is wrong."""
    world.reset()
    disk = Failing(k, fault, forever)
    ended = ""
    try:
        world.run(disk)
        ended = "done"
    except OutputError as error:
        if "\n" in str(error) or not error.message:
            return f"not one line: {error}"
        if fault == "short":
            return f"a short write was not finished: {error}"
    except StreamconvError as error:
        return f"{type(error).__name__} instead of an OutputError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        leaked = len(disk.fds)
        disk.bury()
    if leaked:
        return f"{leaked} files are still open"
    if wrong := world.wrong_now():
        return wrong
    if ended and not (world.out / "config.json").exists():
        return "the run said it is done, and is not"
    return world.finish()


def every_operation(world: World, step: int = 1) -> Count:
    """All k x faults x {once, for good}; `step` > 1 takes only that part of the cases, all k among them."""
    count = Count()
    cases = [(fault, forever) for fault in FAULTS for forever in (False, True)]
    for k in range(operations(world)):
        for number, (fault, forever) in enumerate(cases):
            if (number + k) % step == 0:
                count.note(f"k={k} {fault} {'for good' if forever else 'once'}", one(world, k, fault, forever))
    return count
