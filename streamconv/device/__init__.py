"""Accelerators: which to use (choice), how much of their memory (sizing), how a tile is
encoded on one (step) while others are read, copied and written (pipeline).

What runs on a device is a fused Triton kernel or, where there is none or it does not compile, the torch definition of the
encoding (the report warns, for each device): the bytes are those of the CPU. Unquantized bytes never go there. Up to 6 workers
have a pinned arena each (together at most 1/16 of what the plan reads, part of the memory budget) and two device buffers: a tile is
one copy in, one kernel for each encoding, one copy out. Several devices share the tiles.

Device memory: --device-memory-budget; by default what is free less a reserve of 1/16 (256 MiB at least), at most 2 GiB. Torch's
allocator is held to it; the CUDA context (about 0.5 GB) comes on top. Out of memory because of other processes: steps are halved, and
grow again later. A device that is lost: the CPU does the rest and the report says why, or --on-device-loss stop.
"""

from typing import TYPE_CHECKING

from streamconv.device.choice import Choice, choose, parse, visible

if TYPE_CHECKING:
    from streamconv.device.backend import Cuda
    from streamconv.device.pipeline import DeviceLost, DevicePipeline, WorkerBuffers
    from streamconv.device.sizing import BEST_ARENA, Demand, NoRoom, Sizes, arena, demand, fit, pinned_size, reserve, slots
    from streamconv.device.step import Job

__all__ = [
    "Choice", "choose", "parse", "visible",
    "BEST_ARENA", "Demand", "NoRoom", "Sizes", "arena", "demand", "fit", "pinned_size", "reserve", "slots",
    "Cuda", "DeviceLost", "DevicePipeline", "Job", "WorkerBuffers",
]  # fmt: skip

if not TYPE_CHECKING:  # what runs on the CPU loads none of it

    def __getattr__(name: str) -> object:
        import importlib

        for module in ("sizing", "backend", "pipeline", "step") if name in __all__ else ():
            loaded = importlib.import_module(f"{__name__}.{module}")
            if name in vars(loaded):
                return vars(loaded)[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
