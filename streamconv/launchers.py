"""Which of the processes that a launcher started this one is, from the environment that launchers set.

    Slurm array         SLURM_ARRAY_TASK_ID, from _MIN in steps of _STEP to _MAX. Never _COUNT: it is 1 when one task is started again
    srun                SLURM_PROCID of SLURM_STEP_NUM_TASKS, with SLURM_STEP_ID alone: a batch script has a SLURM_PROCID too
    Kubernetes          JOB_COMPLETION_INDEX of an Indexed Job; it tells no count: STREAMCONV_COUNT
    torchrun            RANK of WORLD_SIZE, with TORCHELASTIC_RUN_ID alone: training shells export RANK
    Open MPI            OMPI_COMM_WORLD_RANK of OMPI_COMM_WORLD_SIZE
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.errors import UsageError, printable


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those of a launcher.

    Attributes:
        launcher: its name, for people.
        count: how many there are, None if the launcher does not say.
    """

    launcher: str
    index: int
    count: int | None


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Who this process is; None if no launcher says. Raises UsageError: a variable holds no number."""
    # the innermost first: an array's task may start a step, and a step may start torchrun
    if "TORCHELASTIC_RUN_ID" in environment and "RANK" in environment:
        return Place("torchrun", _number(environment, "RANK"), _count(environment, "WORLD_SIZE"))
    if "OMPI_COMM_WORLD_RANK" in environment:
        return Place("Open MPI", _number(environment, "OMPI_COMM_WORLD_RANK"), _count(environment, "OMPI_COMM_WORLD_SIZE"))
    array = _array(environment) if "SLURM_ARRAY_TASK_ID" in environment else None
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        step = Place("srun", _number(environment, "SLURM_PROCID"), _count(environment, "SLURM_STEP_NUM_TASKS"))
        if array is None or step.count is None or step.count < 2:
            return array or step
        return Place("Slurm array", array.index * step.count + step.index, array.count and array.count * step.count)
    if array is not None:
        return array
    if "JOB_COMPLETION_INDEX" in environment:
        return Place("Kubernetes", _number(environment, "JOB_COMPLETION_INDEX"), _count(environment, "STREAMCONV_COUNT"))
    return None


def _array(environment: Mapping[str, str]) -> Place:
    first, step = (_number(environment, f"SLURM_ARRAY_TASK_{name}", other) for name, other in (("MIN", 0), ("STEP", 1)))
    index = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // max(step, 1)
    last = _count(environment, "SLURM_ARRAY_TASK_MAX")
    return Place("Slurm array", index, None if last is None else (last - first) // max(step, 1) + 1)


def _count(environment: Mapping[str, str], name: str) -> int | None:
    return _number(environment, name) if name in environment else None


def _number(environment: Mapping[str, str], name: str, other: int | None = None) -> int:
    text = environment.get(name, "" if other is None else str(other))
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{name}={printable(text)} in the environment is no number")
    return int(text)


def part_of(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """What `--part K/N` says: the part, from 0, and how many there are; K is "auto" where the launcher knows.

    Raises:
        UsageError: it says something else, or no launcher is at work.
    """
    index, slash, count = text.partition("/")
    if not slash or not count.isdigit() or not (index.isdigit() or index == "auto"):
        raise UsageError(f"--part {printable(text)} is not K/N", hint="3/16 is the fourth of 16 parts: they are 0 to 15; or auto/16")
    if index == "auto":
        here = place(environment)
        if here is None:
            raise UsageError(
                f"--part {text}: no launcher says which process this is",
                hint="it is known of Slurm (arrays, srun), Kubernetes Indexed Jobs, torchrun and Open MPI; else name it: --part 3/16",
            )
        index = str(here.index)
    if int(index) >= int(count):
        raise UsageError(f"--part {int(index)}/{int(count)}: parts are 0 to {int(count) - 1}")
    return int(index), int(count)


def begin(environment: Mapping[str, str] = os.environ) -> float:
    """Where in the parts this process begins, from 0 to 1; workers that begin apart share few source files."""
    here = place(environment)
    if here is None or not here.count:
        return 0.0
    return min(here.index, here.count - 1) / here.count
