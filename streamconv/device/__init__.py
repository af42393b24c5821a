"""Accelerators: which to use (choice), how much of their memory (sizing), how a tile is
encoded on one (step) while others are read, copied and written (ring).

What runs on a device is a fused kernel (fused) or the torch definition of each encoding: the bytes are those of the CPU.
"""

from streamconv.device.choice import HOST_COST, Choice, choose, parse, visible
from streamconv.device.ring import DeviceLost, Ring, Slot
from streamconv.device.sizing import BEST_ARENA, Demand, NoRoom, Sizes, arena, demand, fit, pinned_size, reserve, slots
from streamconv.device.step import Job

__all__ = [
    "HOST_COST", "Choice", "choose", "parse", "visible",
    "BEST_ARENA", "Demand", "NoRoom", "Sizes", "arena", "demand", "fit", "pinned_size", "reserve", "slots",
    "DeviceLost", "Job", "Ring", "Slot",
]  # fmt: skip
