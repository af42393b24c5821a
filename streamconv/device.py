"""Accelerators: which to use, how much of their memory, and how a tile is encoded on one.

A worker bound to a device owns a stream, a pinned arena (host memory, part of the budget) and a device buffer. Reading,
copying in, encoding, copying out and writing of different workers overlap, because each waits only for its own stream.
The bytes are those of the CPU: what runs on the device is the torch definition of each encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from streamconv.errors import StreamconvError, UsageError
from streamconv.memory import GIB, MIB
from streamconv.plan import Plan, Span
from streamconv.quants.base import Findings
from streamconv.stages.encode import Request, is_copy, is_whole_copy

if TYPE_CHECKING:
    import numpy as np
    import torch

RESERVE = 256 * MIB
"""Device memory left to others, and to the driver."""

HOST_COST = 900 * MIB
"""Host memory that torch and a CUDA context take before the first tile (measured on an H200 node)."""

SLOTS = 3
"""Workers for each device: one reads or writes while the others' copies and kernels run."""

_START_SECONDS = 4.0
_DEVICE_RATE = 20e9
_CPU_RATE = 2.0e9


class DeviceLost(StreamconvError):
    """The device stopped working; the run can go on on the CPU."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs the encodings.

    Attributes:
        devices: torch device names; empty for the CPU.
        why: one line for the plan.
    """

    devices: tuple[str, ...]
    why: str


def parse(text: str) -> tuple[str, ...]:
    """ "auto", "cpu", "cuda", "cuda:0,cuda:1" -> names.

    Raises:
        UsageError: anything else.
    """
    names = tuple(part.strip() for part in text.split(","))
    if names in (("auto",), ("cpu",)):
        return names
    for name in names:
        kind, _, number = name.partition(":")
        if kind != "cuda" or (":" in name and not number.isdecimal()):
            raise UsageError(f"--device {text!r} is not known", hint="auto, cpu, cuda, cuda:0 or cuda:0,cuda:1")
    if len(set(names)) != len(names):
        raise UsageError(f"--device {text!r} names a device twice")
    return names


def visible() -> int:
    """CUDA devices that torch can use. Imports torch only where a driver is present."""
    import os

    if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/proc/driver/nvidia"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose(asked: str, plan: Plan, cores: int, host_budget: int) -> Choice:
    """Decide for a plan.

    `auto` takes a GPU only where the estimate says that it wins: encoded bytes over the CPU's rate on these cores
    against the start of CUDA plus both copies.

    Raises:
        UsageError: a device was asked for that is not here, or whose host memory does not fit the budget.
    """
    names = parse(asked)
    if names == ("cpu",):
        return Choice((), "asked for")
    count = visible()
    if names == ("auto",):
        if not count:
            return Choice((), "no GPU, using the CPU")
        work = sum(span.nbytes for span in plan.spans if _encodes(plan, span))
        cpu, gpu = work / (_CPU_RATE * cores), _START_SECONDS + work / _DEVICE_RATE
        if host_budget < HOST_COST + 256 * MIB:
            return Choice((), "using the CPU: the memory budget is too small for a GPU's host buffers")
        if gpu >= cpu:
            return Choice((), f"using the CPU: about {cpu:.1f} s of work there against {gpu:.1f} s with the GPU")
        return Choice(("cuda:0",), f"using the GPU: about {gpu:.1f} s against {cpu:.1f} s on the CPU")
    if not count:
        raise UsageError("--device cuda: no GPU is here", hint="--device cpu, or auto")
    found = tuple("cuda:0" if name == "cuda" else name for name in names)
    for name in found:
        if int(name.partition(":")[2]) >= count:
            raise UsageError(f"--device {name}: this machine has {count} GPU{'s' * (count != 1)}")
    if host_budget < HOST_COST + 64 * MIB:
        raise UsageError(
            "--device cuda: the memory budget is smaller than what CUDA itself takes on the host",
            hint=f"--memory-budget {(HOST_COST + 256 * MIB) // MIB}MiB or more, or --device cpu",
        )
    return Choice(found, "asked for")


def _encodes(plan: Plan, span: Span) -> bool:
    requests = {(dest.cols, plan.matrices[dest.matrix].encoding) for dest in span.dests}
    return any(not is_copy(request, span.source.dtype) for request in requests)


def tile_limit(free: int, budget: int | None, slots: int, bytes_per_source_byte: int) -> int:
    """Source bytes of a tile such that `slots` tiles fit the device.

    Args:
        free: free device memory, bytes.
        budget: what the user allows, None for what is free less the reserve, at most 2 GiB.
        bytes_per_source_byte: device memory a tile needs for each of its source bytes, outputs and temporaries included.
    """
    room = min(budget if budget is not None else 2 * GIB, max(free - RESERVE, 0))
    return max(room // slots // bytes_per_source_byte, 64 * 1024)


class Device(Protocol):
    """What encoding needs of an accelerator; tests put the CPU in its place."""

    def arena(self, size: int) -> np.ndarray[Any, Any]: ...
    def upload(self, block: np.ndarray[Any, Any]) -> torch.Tensor: ...
    def download(self, made: torch.Tensor, out: np.ndarray[Any, Any]) -> None: ...
    def wait(self) -> None: ...
    def scope(self) -> Any: ...
    def is_full(self, error: BaseException) -> bool: ...
    def is_lost(self, error: BaseException) -> bool: ...
    def relieve(self) -> None: ...


class Cuda:
    """One worker's view of a CUDA device: its own stream and pinned arena."""

    def __init__(self, name: str) -> None:
        import torch

        self.name = name
        self._torch = torch
        self._device = torch.device(name)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def arena(self, size: int) -> np.ndarray[Any, Any]:
        return self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True).numpy()

    def upload(self, block: np.ndarray[Any, Any]) -> torch.Tensor:
        return self._torch.from_numpy(block).to(self._device, non_blocking=True)

    def download(self, made: torch.Tensor, out: np.ndarray[Any, Any]) -> None:
        self._torch.from_numpy(out).copy_(made, non_blocking=True)

    def wait(self) -> None:
        self._stream.synchronize()

    def scope(self) -> Any:
        return self._torch.cuda.stream(self._stream)

    def is_full(self, error: BaseException) -> bool:
        return isinstance(error, self._torch.cuda.OutOfMemoryError)

    def is_lost(self, error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and "CUDA error" in str(error)

    def relieve(self) -> None:
        self._torch.cuda.empty_cache()


def encode_on(
    device: Device,
    request: Request,
    span: Span,
    rows: int,
    block: np.ndarray[Any, Any],
    space: np.ndarray[Any, Any],
    findings: Findings,
) -> list[np.ndarray[Any, Any]]:
    """`stages.encode.encode` on a device; the same bytes.

    Out of device memory (someone else took it) halves the rows and goes on, down to the encoding's row_align.

    Raises:
        DeviceLost: the device does not answer any more.
    """
    if is_whole_copy(request, span):
        return [block]
    encoding = request[1]
    cols = sum(stop - start for start, stop in request[0])
    outs = []
    for part in encoding.parts(encoding.row_align, cols):
        size = rows * part.row_bytes
        outs.append(space[:size])
        space = space[-(-size // 64) * 64 :]
    first, step = 0, rows
    while first < rows:
        take = min(step, rows - first)
        met = Findings()
        try:
            with device.scope():
                made = _made(device, request, span, take, block[first * span.row_bytes : (first + take) * span.row_bytes], met)
                for out, part_bytes in zip(outs, made, strict=True):
                    each = out.size // rows
                    device.download(part_bytes, out[first * each : (first + take) * each])
            device.wait()
        except Exception as error:
            if device.is_full(error) and take > encoding.row_align:
                device.relieve()
                step = max(encoding.row_align, take // 2 // encoding.row_align * encoding.row_align)
                continue
            if device.is_lost(error) or device.is_full(error):
                raise DeviceLost(f"the GPU stopped working: {str(error).splitlines()[0]}") from error
            raise
        findings.add(met)
        first += take
    return outs


def _made(
    device: Device, request: Request, span: Span, rows: int, block: np.ndarray[Any, Any], findings: Findings
) -> tuple[torch.Tensor, ...]:
    import torch

    matrix = device.upload(block).view(getattr(torch, span.source.dtype.torch)).reshape(rows, span.source.cols)
    pieces = [matrix[:, start:stop] for start, stop in request[0]]
    chosen = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return request[1].encode(chosen, findings)
