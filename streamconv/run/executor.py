"""What is computed of a tile's rows, on the CPU or on a device: the caller does not know which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamconv.device.ring import Slot
from streamconv.device.step import Job
from streamconv.planning.plan import Dest, Plan, Span
from streamconv.quants.base import Findings
from streamconv.run.encode import Request, encode, is_copy, requests, row_costs
from streamconv.run.results import Results

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as they are stored in all of `dests`: uint8, one array for each part of the encoding."""

    request: Request
    dests: list[Dest]
    parts: list[Bytes]
    findings: Findings


def encoded(
    plan: Plan, span: Span, rows: int, block: Bytes, space: Bytes, results: Results, slot: Slot | None
) -> Iterator[Encoded]:
    """Encode rows of a span for every matrix that takes them; equal requests are encoded once.

    Args:
        rows: output rows, whose source rows are in `block`.
        space: uint8; holds what is encoded until the last of it was used.
        results: of the reductions that encodings need.
        slot: of a device, which encodes all that is no copy; None encodes on the CPU.
    """
    name, dtype = span.source.name, span.source.dtype
    wanted = requests(span, plan.matrices)
    jobs = {
        request: Job((request[0], request[1].bind(results, name))) for request in wanted if slot is not None and not is_copy(request, dtype)
    }
    if slot is not None and jobs:
        space = slot.encode(list(jobs.values()), span, rows, block, space)
    for request, dests in wanted.items():
        if request in jobs:
            yield Encoded(request, dests, jobs[request].parts, jobs[request].findings)
            continue
        findings = Findings()
        parts = encode((request[0], request[1].bind(results, name)), span, rows, block, space, findings)
        space = space[-(-row_costs(request, span)[0] * rows // 64) * 64 :]
        yield Encoded(request, dests, parts, findings)


def reduced(span: Span, rows: int, block: Bytes, results: Results, slot: Slot | None) -> np.ndarray[Any, Any]:
    """What rows contribute to the reduction of a span."""
    if span.reduce is None:
        raise AssertionError(f"{span.source.name}: nothing to reduce")
    kernel = span.reduce.kernel(span.source.dtype)
    if slot is not None:
        found: np.ndarray[Any, Any] = slot.reduce(span, rows, block, results).numpy()
        return found
    if kernel is not None:
        return kernel(block.view(span.source.dtype.storage), rows, span.source.cols)
    import torch

    matrix = torch.from_numpy(block).view(getattr(torch, span.source.dtype.torch)).reshape(rows, span.source.cols)
    found = span.reduce.tile(matrix, results).numpy()
    return found
