"""Conversions for each budget and format, each in pairs with `cp` and with the user's own command."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.bench import command, machine
from streamconv.bench.command import Measured
from streamconv.errors import UsageError, printable
from streamconv.memory import show_size

OURS = (sys.executable, "-I", "-c", "from streamconv.__main__ import run; run()")


@dataclass(frozen=True, slots=True)
class Job:
    """A command that is measured; `{model}` and `{out}` in its words are replaced.

    Attributes:
        limit: of its memory cgroup, bytes; None runs it without one.
    """

    name: str
    words: tuple[str, ...]
    limit: int | None


def jobs(budgets: Sequence[int], quants: Sequence[str], flags: Sequence[str], against: Sequence[str]) -> list[Job]:
    """What is measured, beside `cp`.

    Raises:
        UsageError: a command of the user's has no {model} or no {out}.
    """
    made = []
    for quant in quants:
        more = ["--target-sm", "80"] if quant in ("int8", "int4") and not {"--target-sm", "--to"} & set(flags) else []
        for budget in budgets:
            words = (*OURS, "convert", "{model}", "{out}", "--quiet", "--quant", quant, "--memory-budget", str(budget), *more, *flags)
            made.append(Job(f"streamconv {quant} in {show_size(budget)}", words, budget))
    for text in against:
        words = tuple(shlex.split(text))
        if not all(any(name in word for word in words) for name in ("{model}", "{out}")):
            raise UsageError(f"--against {printable(text)}: the command needs {{model}} and {{out}}")
        made.append(Job(text, words, max(budgets)))
    return made


def run(
    model: Path, work: Path, asked: Sequence[Job], runs: int, told: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure; everything that was made is removed.

    Args:
        model: its folder.
        work: folder for outputs, on the disk to be measured.
        runs: pairs of each job with `cp`; who goes first alternates, and one more that is not counted comes before.

    Returns:
        the machine's rates and, for each job, seconds, ratios to `cp`, and memory, as JSON has them.
    """
    weights = max((path for path in model.iterdir() if os.path.isfile(path)), key=lambda path: path.stat().st_size)
    rates = {"read": machine.read_rate(weights), "write": machine.write_rate(work)}
    rates |= {f"encode {quant}": machine.kernel_rate(quant) for quant in ("int8", "int4")}
    cold, lines = _can_drop_caches(), []
    copy = Job("cp", ("cp", "-r", "{model}", "{out}"), None)
    for job in asked:
        pairs: list[tuple[Measured, Measured]] = []
        for number in range(runs + 1):
            order = (job, copy) if number % 2 else (copy, job)
            made = {each.name: _once(each, model, work, cold) for each in order}
            if made[job.name].status or made[copy.name].status:
                pairs = [(made[job.name], made[copy.name])]
                break
            if number:
                pairs.append((made[job.name], made[copy.name]))
        line = _line(job, pairs)
        lines.append(line)
        told(f"{job.name}: {line['status'] or 'done'}")
    return {"model": str(model), "bytes": _size(model), "cache": "cold" if cold else "as it was", "rates": rates, "jobs": lines}


def _line(job: Job, pairs: Sequence[tuple[Measured, Measured]]) -> dict[str, Any]:
    """What is told of a job."""
    ours = [mine for mine, _ in pairs]
    failed = next((mine for mine in ours if mine.status), None)
    line: dict[str, Any] = {"name": job.name, "limit": job.limit, "in_cgroup": ours[0].cgroup_peak is not None}
    line |= {"status": failed.status if failed else 0, "error": failed.error if failed else ""}
    line |= {"seconds": [mine.seconds for mine in ours], "cp_seconds": [theirs.seconds for _, theirs in pairs]}
    line["ratio"] = statistics.median(mine.seconds / theirs.seconds for mine, theirs in pairs) if not failed else None
    peaks = [mine.cgroup_peak for mine in ours if mine.cgroup_peak is not None]
    return line | {"peak": max(mine.peak for mine in ours), "cgroup_peak": max(peaks) if peaks else None}


def _once(job: Job, model: Path, work: Path, cold: bool) -> Measured:
    out, log = work / "out", work / "log"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    words = [word.replace("{model}", str(model)).replace("{out}", str(out)) for word in job.words]
    try:
        with command.group(job.limit) as place:
            return command.measured(words, log, place)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)


def _can_drop_caches() -> bool:
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if os.path.isfile(path))


@contextlib.contextmanager
def folder(at: Path) -> Iterator[Path]:
    """A folder of its own that is removed."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="streamconv-bench-", dir=at) as made:
        yield Path(made)
