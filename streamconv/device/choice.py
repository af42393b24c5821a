"""CPU or GPU for a plan, and why."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.errors import UsageError, count
from streamconv.lazy import torch
from streamconv.memory import MIB
from streamconv.planning.reads import Reads
from streamconv.planning.tasks import encode_tasks

HOST_COST = 900 * MIB
"""Host memory that torch and a CUDA context take before the first tile (measured on an H200 node)."""

# Bytes a second. Files, kernels and definitions are for one core, the others for a device; measured on an H200 node of 16 cores.
_CPU_START, _GPU_START = 1.5, 3.7
"""Seconds until the first tile, and for pinned memory."""
_FILES, _FILES_OF_GPU = 0.4e9, 0.22e9
"""A device's tiles are larger: they leave the cache between the copy and the file."""
_KERNEL = 2.0e9
_TORCH = 0.01e9
_COPY = 50e9
_FUSED = 600e9
_DEFINITION = 5e9


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs the codecs.

    Attributes:
        devices: torch device names; empty for the CPU.
        why: one line for the plan.
    """

    devices: tuple[str, ...]
    why: str


def parse(text: str) -> tuple[str, ...]:
    """ "auto", "cpu", "cuda:0,cuda:1" -> names; "cuda" is "cuda:0". Raises UsageError: anything else."""
    names = tuple(part.strip() for part in text.split(","))
    if names in (("auto",), ("cpu",)):
        return names
    devices = []
    for name in names:
        kind, _, number = name.partition(":")
        if kind != "cuda" or (":" in name and not (number.isascii() and number.isdecimal())):
            raise UsageError(f"--device {text!r} is not known", hint="auto, cpu, cuda, cuda:0 or cuda:0,cuda:1")
        devices.append(f"cuda:{int(number or 0)}")
    if len(set(devices)) != len(devices):
        raise UsageError(f"--device {text!r} names a device twice")
    return tuple(devices)


def visible() -> int:
    """CUDA devices that torch can use. Imports torch only where a driver is present."""
    import os

    if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/proc/driver/nvidia"):
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@dataclass(frozen=True, slots=True)
class Work:
    """What the estimate is made from, bytes.

    Attributes:
        files: read and written.
        kernel, torch: source bytes that are encoded by fused kernels, and by the torch definitions.
        back: encoded bytes that a device copies back.
    """

    files: int = 0
    kernel: int = 0
    torch: int = 0
    back: int = 0

    def cpu_seconds(self, cores: int) -> float:
        return _CPU_START + (self.files / _FILES + self.kernel / _KERNEL + self.torch / _TORCH) / cores

    def gpu_seconds(self, cores: int) -> float:
        """Starting CUDA, then the slowest of files, copies in, copies out and kernels, which overlap."""
        encoded = self.kernel + self.torch
        computed = self.kernel / _FUSED + self.torch / _DEFINITION
        slowest = max(encoded / _COPY, self.back / _COPY, computed)
        return _GPU_START + max(self.files / _FILES_OF_GPU / cores, slowest)


def work_of(reads: Reads) -> Work:
    """What a run moves and computes."""
    kernel = torch = back = 0
    for plan, span in reads.spans():
        size = (span.stop - span.start) * span.row_bytes
        rows = span.op.out_rows(span.stop - span.start)
        if span.reduce is not None:
            fused = span.reduce.kernel(span.source.dtype) is not None
            kernel, torch = kernel + size * fused, torch + size * (not fused)
        for task in encode_tasks(span, plan.matrices):
            if task.is_copy:
                continue
            encoded = size * task.width // task.total
            fused = task.kernel is not None
            kernel, torch = kernel + encoded * fused, torch + encoded * (not fused)
            back += sum(part.nbytes(rows) for part in task.parts)
    return Work(reads.nbytes + sum(file.size for plan in reads.plans for file in plan.files), kernel, torch, back)


def choose(asked: str, reads: Reads, cores: int, host_budget: int) -> Choice:
    """Decide for a run. `auto` takes a GPU only where the estimate says that it wins.

    Raises:
        UsageError: a device was asked for that is not here, or whose host memory does not fit the budget.
    """
    names = parse(asked)
    if names == ("cpu",):
        return Choice((), "asked for")
    gpus = visible()
    if names == ("auto",):
        if not gpus:
            return Choice((), "no GPU, using the CPU")
        if host_budget < HOST_COST + 256 * MIB:
            return Choice((), "using the CPU: the memory budget is too small for a GPU's host buffers")
        work = work_of(reads)
        cpu, gpu = work.cpu_seconds(cores), work.gpu_seconds(cores)
        if gpu >= cpu:
            return Choice((), f"using the CPU: about {cpu:.1f} s there against {gpu:.1f} s with the GPU, its start and copies counted")
        return Choice(("cuda:0",), f"using the GPU: about {gpu:.1f} s, its start and copies counted, against {cpu:.1f} s on the CPU")
    if not gpus:
        raise UsageError(f"--device {asked}: no GPU is here", hint="--device cpu, or auto")
    for name in names:
        if int(name.partition(":")[2]) >= gpus:
            raise UsageError(f"--device {name}: this machine has {count(gpus, 'GPU')}")
    if host_budget < HOST_COST + 64 * MIB:
        raise UsageError(
            f"--device {asked}: the memory budget is smaller than what CUDA itself takes on the host",
            hint=f"--memory-budget {(HOST_COST + 256 * MIB) // MIB}MiB or more, or --device cpu",
        )
    return Choice(names, "asked for")
