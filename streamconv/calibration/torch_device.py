"""The one device that a calibration runs on."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext

from streamconv.errors import UsageError, count
from streamconv.lazy import torch


def torch_device(name: str) -> str:
    """The torch device that --device means: "cpu" or "cuda:N". Raises UsageError: there is no such device."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    kind, _, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or (number and not (number.isascii() and number.isdecimal()))):
        raise UsageError(f"--device {name} is not auto, cpu, cuda or cuda:N", hint="calibration runs on one device")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= devices:
        there = count(devices, "CUDA device") if devices else "no CUDA devices"
        raise UsageError(f"--device {name}: this machine has {there}", hint="--device cpu")
    return f"cuda:{int(number or 0)}"


def free_memory(device: str) -> int | None:
    """Free bytes of a device; None for the CPU, and for a device that this machine has not."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def current(device: str) -> AbstractContextManager[None]:
    """The device is this thread's current one: a library's own kernels run there, wherever their tensors lie."""
    return torch.cuda.device(device) if device != "cpu" else nullcontext()


def give_back() -> None:
    """What a layer held on a device is free again for others in this process; its hooks make cycles of it."""
    gc.collect()
    torch.cuda.empty_cache()
