"""Conversions for each budget and format, each in pairs with `cp` and with the user's own command."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.bench import command
from streamconv.bench.command import Measured
from streamconv.errors import StreamconvError, UsageError, printable
from streamconv.lazy import np
from streamconv.memory import show_size
from streamconv.run import probe

OURS = (sys.executable, "-I", "-c", "from streamconv.__main__ import run; run()")


@dataclass(frozen=True, slots=True)
class Job:
    """A command that is measured; `{model}` and `{out}` in its words are replaced.

    Attributes:
        limit: of its memory cgroup, bytes; None for one without.
        ours: it is no command of the user's.
    """

    name: str
    words: tuple[str, ...]
    limit: int | None = None
    ours: bool = False


_COPY = Job("cp", ("cp", "-r", "{model}", "{out}"))
_Round = dict[Job, Measured]


def jobs(budgets: Sequence[int], quants: Sequence[str], flags: Sequence[str], against: Sequence[str]) -> list[Job]:
    """What is measured, beside `cp`. Raises UsageError: a command of the user's has no {model} or no {out}."""
    listed = []
    for quant in quants:
        more = ["--target-sm", "80"] if quant in ("int8", "int4") and not {"--target-sm", "--to"} & set(flags) else []
        for budget in budgets:
            words = (*OURS, "convert", "{model}", "{out}", "--quiet", "--quant", quant, "--memory-budget", str(budget), *more, *flags)
            listed.append(Job(f"streamconv {quant} in {show_size(budget)}", words, budget, ours=True))
    for text in against:
        words = tuple(shlex.split(text))
        if not all(any(name in word for word in words) for name in ("{model}", "{out}")):
            raise UsageError(f"--against {printable(text)}: the command needs {{model}} and {{out}}")
        listed.append(Job(text, words))
    return listed


def run(
    model: Path, work: Path, asked: Sequence[Job], runs: int, report_line: Callable[[str], None] = lambda line: None, warm: bool = False
) -> dict[str, Any]:
    """Measure; everything that was made is removed.

    Args:
        work: folder for outputs, on the disk to be measured.
        runs: rounds of `cp` and all jobs, to and fro by turns; one more that is not counted comes before.
        warm: the page cache holds the model before each run, as far as it fits; else it is empty, where that can be.

    Returns:
        the machine's rates and, for each job, seconds, ratios to `cp` and to commands of the user's, and memory, as JSON has them.
    """
    weights = max((path for path in model.iterdir() if os.path.isfile(path)), key=lambda path: path.stat().st_size)
    rates = disk_rates(weights, work)
    rates |= {f"encode {quant}": kernel_rate(quant) for quant in ("int8", "int4")}
    cold, rounds = not warm and os.access("/proc/sys/vm/drop_caches", os.W_OK), list[_Round]()
    for number in range(runs + 1):
        before, measured = rounds[-1] if rounds else {}, _Round()
        for job in (_COPY, *asked) if number % 2 else (*reversed(asked), _COPY):
            if job in before and before[job].status:  # it fails again
                measured[job] = before[job]
                continue
            measured[job] = _once(job, model, work, cold, warm)
            report_line(f"{'first run' if not number else f'{number} of {runs}'}: {job.name}, {measured[job].seconds:.2f} s")
        rounds.append(measured)
    cache = "cold" if cold else "warm" if warm else "as it was"
    lines = [_line(job, rounds[1:]) for job in asked]
    return {"model": str(model), "bytes": size_of(model), "cache": cache, "rates": rates, "jobs": lines}


def _line(job: Job, rounds: Sequence[_Round]) -> dict[str, Any]:
    """What is told of a job."""
    ours, copies = [each[job] for each in rounds], [each[_COPY] for each in rounds]
    failed = next((mine for mine in (*ours, *copies) if mine.status), None)
    line: dict[str, Any] = {"name": job.name, "limit": job.limit, "in_cgroup": ours[0].cgroup_peak is not None}
    line |= {"status": failed.status if failed else 0, "error": failed.error if failed else ""}
    line |= {"seconds": [mine.seconds for mine in ours], "cp_seconds": [theirs.seconds for theirs in copies]}
    line["cpu_seconds"] = statistics.median(mine.cpu for mine in ours)
    line["ratio"] = _median_ratio(ours, copies) if not failed else None
    peaks = [mine.cgroup_peak for mine in ours if mine.cgroup_peak is not None]
    line |= {"peak": max(mine.peak for mine in ours), "cgroup_peak": max(peaks) if peaks else None}
    peers = {peer: [each[peer] for each in rounds] for peer in rounds[0] if peer is not _COPY and not peer.ours}
    return line | {"against": [_beside(ours, peer, theirs) for peer, theirs in peers.items() if job.ours and not failed]}


def _beside(ours: Sequence[Measured], peer: Job, theirs: Sequence[Measured]) -> dict[str, Any]:
    """How much faster than a command of the user's, and its memory's share; None if that failed."""
    failed = any(each.status for each in theirs)
    peaks = (max(each.peak for each in side) for side in (ours, theirs))
    share = None if failed else next(peaks) / max(next(peaks), 1)
    return {"name": peer.name, "faster": None if failed else _median_ratio(theirs, ours), "memory": share}


def _median_ratio(some: Sequence[Measured], others: Sequence[Measured]) -> float:
    return statistics.median(one.seconds / other.seconds for one, other in zip(some, others, strict=True))


def _once(job: Job, model: Path, work: Path, cold: bool, warm: bool) -> Measured:
    out, log = work / "out", work / "log"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    if warm:
        warm_up(model)
    words = [word.replace("{model}", str(model)).replace("{out}", str(out)) for word in job.words]
    try:
        with command.group(job.limit) as place:
            return command.measured(words, log, place)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)


def warm_up(folder: Path) -> None:
    """Bring its files into the page cache."""
    for path in filter(os.path.isfile, sorted(folder.iterdir())):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if os.path.isfile(path))


def disk_rates(file: Path, folder: Path) -> dict[str, float | None]:
    """Bytes a second that are read from a file, out of the page cache's reach where the kernel does that, and written to a folder.

    None of what cannot be measured.
    """
    rates: dict[str, float | None] = {"read": None, "write": None}
    with contextlib.suppress(OSError, StreamconvError):
        rates["read"] = probe.read_rate([file], 1.0, cold=True)
    with contextlib.suppress(OSError, StreamconvError):
        rates["write"] = probe.write_rate(folder, 1.0)
    return rates


def kernel_rate(quant: str, seconds: float = 0.5) -> float:
    """Bytes of bfloat16 weights a second that one thread encodes as int8 or int4 for Ampere."""
    from streamconv.checkpoint.dtypes import BF16
    from streamconv.quants.weight_only import WeightOnly

    rows, cols = 256, 4096
    codec = WeightOnly(8 if quant == "int8" else 4, "sm80", BF16)
    kernel = codec.kernel(BF16)
    assert kernel is not None
    block = (np.random.default_rng(0).standard_normal(rows * cols).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    outs = [np.empty(part.nbytes(rows), np.uint8) for part in codec.parts(rows, cols)]
    kernel(block, 0, cols, rows, cols, outs)  # compiled
    rounds, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        kernel(block, 0, cols, rows, cols, outs)
        rounds += 1
    return rounds * block.nbytes / (time.monotonic() - began)
