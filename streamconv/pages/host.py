"""What a run ran on."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

from streamconv import __version__
from streamconv.memory import limit, show_size
from streamconv.pages.page import Section, Table
from streamconv.planning.memory_plan import processors

_PACKAGES = ("numpy", "numba", "torch", "safetensors", "transformers", "xxhash")


def section() -> Section:
    """Processor, memory, kernel and versions; none of the packages is imported."""
    from importlib.metadata import PackageNotFoundError, version

    import psutil

    name = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    ceiling = limit()
    facts = {
        "processor": f"{name}, {processors()} usable",
        "memory": show_size(psutil.virtual_memory().total) + (f", limit of the container {show_size(ceiling)}" if ceiling else ""),
        "kernel": f"{os.uname().sysname} {os.uname().release}",
        "streamconv": __version__,
        "Python": platform.python_version(),
    }
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts[package] = version(package)
    return Section("Machine and versions", table=Table(("what", "value"), [*facts.items()]))
