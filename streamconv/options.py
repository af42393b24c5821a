"""What a user can ask for. One place for every choice that decides output bytes, and for those that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Version = Literal["0.16", "1.0", "1.2"]
TARGET_VERSIONS: tuple[Version, ...] = ("0.16", "1.0", "1.2")
"""Release lines; 1.0 is 1.2 less the keys of config.json that only later readers know."""
TARGET_SMS = (70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 120, 121)

SEARCHED = ("clip", "awq", "gptq")
METHODS = ("rtn", "mse", *SEARCHED)
"""How the codes and scales of INT4 groups are found: rtn divides each group's maximum by 8, mse searches the least squared error, the
others look at what the layers' inputs are on some text."""

Read = Literal["auto", "map", "pread"]


@dataclass(frozen=True, slots=True)
class Resources:
    """Choices that never change a byte of the output.

    Attributes:
        memory_budget: ceiling of the process's peak resident set in bytes; None derives it from free memory.
        workers: worker threads; None derives them from processors and budget.
        device: "auto", "cpu", "cuda", "cuda:0", ...
        device_memory_budget: bytes of each device that may be used; None: what is free less a reserve, at most 2 GiB.
        on_device_loss: "cpu" finishes on the CPU when a device is lost; "stop" stops, and the same call resumes later.
        tile_rows: upper bound on the source rows of a tile (tests force small tiles with it).
        no_lock: write even where the output's file system has no locks, or cannot sync a folder; the manifest says so (one entry more).
        hub_keep: "all" keeps the shards of a Hub model in the cache; "none" removes each that was downloaded once it was read.
        read: "pread" copies the source's rows into the arena, "map" maps them where it can (see run/mapped.py), "auto" maps what the
            page cache holds, on the CPU.
        verify_inline: decode each tile and hold it against its source before it is written; the manifest says what was found.
        min_snr: dB that every matrix must then reach, None for what its encoding promises.
        probe: look at the disks for half a second, while kernels are loaded, to tell how long the run should take (of models above 16 GiB).
        source_check: hold a source that streamconv wrote against its own streamconv.json first, which reads it once more.
        parts: how many the work is cut into, the same for every process that does some of it; None: this process does all of it.
        part: do this one alone; None takes parts until none is left.
        begin: where among the parts this process begins, from 0 to 1; workers that begin apart share few source files.
        wait: seconds to wait for parts that others hold while nothing goes on.
        private_parts: write each part into a file of its own, for file systems whose locks do not reach other machines.
    """

    memory_budget: int | None = None
    workers: int | None = None
    device: str = "auto"
    device_memory_budget: int | None = None
    on_device_loss: Literal["cpu", "stop"] = "cpu"
    tile_rows: int | None = None
    hub_keep: str = "all"
    read: Read = "auto"
    no_lock: bool = False
    verify_inline: bool = False
    min_snr: float | None = None
    probe: bool = True
    source_check: bool = True
    parts: int | None = None
    part: int | None = None
    begin: float = 0.0
    wait: float = 300.0
    private_parts: bool = False
