"""Run a command inside a memory cgroup of N bytes, as a container with that much memory would.

    python benchmarks/cgroup.py --limit 512MiB -- COMMAND ...

Prints one JSON line: exit status, peak memory of the group (page cache included, so it may well touch the limit), the
largest resident set of one process, the number of processes the kernel killed for memory, seconds. Ends with the
command's status. Works with cgroup v1 and v2; needs root, and says so where a group cannot be made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from streamconv.memory import parse_size

# A shell that joins the group and then becomes the command: nothing of the command runs outside, and, unlike a
# preexec function, it is safe in a process that has threads.
JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_SAMPLE_SECONDS = 0.01


class CgroupError(Exception):
    """No memory cgroup can be made here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command did inside its group."""

    status: int
    limit: int
    cgroup_peak: int | None
    """Peak of the group in bytes, page cache included; None where the kernel does not say (v2 before 5.19)."""
    peak_rss: int
    """Largest resident set of one process (VmHWM), sampled."""
    oom_kills: int
    seconds: float
    stdout: str = dataclasses.field(default="", repr=False)
    stderr: str = dataclasses.field(default="", repr=False)


def _memory_mounts() -> Iterator[tuple[int, Path]]:
    """Version and mount point of every hierarchy that may control memory."""
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, point, kind, options, *_ = line.split()
            if kind == "cgroup" and "memory" in options.split(","):
                yield 1, Path(point)
            elif kind == "cgroup2":
                yield 2, Path(point)


def _own_group(version: int) -> str:
    """This process's group in the hierarchy, as a path below its mount point."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (version == 1 and "memory" in controllers.split(",")) or (version == 2 and not controllers):
            return path.strip("/")
    return ""


def _parents() -> Iterator[tuple[int, Path]]:
    """Groups that may get a child: our own first, so that its limits stay in force, then those above it."""
    for version, mount in _memory_mounts():
        group = mount / _own_group(version)
        while group != mount and mount in group.parents:
            if group.is_dir():
                yield version, group
            group = group.parent
        yield version, mount


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[tuple[int, Path]]:
    """A new group limited to `limit` bytes: (cgroup version, folder). Removed at the end with all that still runs.

    Raises:
        CgroupError: none can be made.
    """
    reasons = []
    for version, parent in _parents():
        group = parent / f"streamconv-{os.getpid()}-{time.monotonic_ns()}"
        limit_file = group / ("memory.limit_in_bytes" if version == 1 else "memory.max")
        try:
            group.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            limit_file.write_text(str(limit))
        except OSError as error:
            # v2 gives a child a memory.max only where the parent hands the controller on; one with processes cannot.
            reasons.append(f"{limit_file}: {error.strerror}")
            group.rmdir()
            continue
        try:
            # Swap would hide what is measured. The file is absent where the kernel does not count swap.
            with contextlib.suppress(OSError):
                name = "memory.memsw.limit_in_bytes" if version == 1 else "memory.swap.max"
                (group / name).write_text(str(limit) if version == 1 else "0")
            yield version, group
        finally:
            _remove(group)
        return
    why = "; ".join(reasons) or "no memory cgroup hierarchy is mounted"
    hint = "" if os.geteuid() == 0 else " (needs root)"
    raise CgroupError(f"cannot make a memory cgroup{hint}: {why}")


def _members(group: Path) -> list[int]:
    try:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _remove(group: Path) -> None:
    """Remove the group; a process ends a moment before its group counts as empty, so this takes a few tries."""
    for _ in range(100):
        for pid in _members(group):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.02)


def why_not() -> str | None:
    """Why no memory cgroup can be made here; None where it can."""
    try:
        with memory_group(1 << 30):
            return None
    except CgroupError as error:
        return str(error)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _oom_kills(version: int, group: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (group / ("memory.oom_control" if version == 1 else "memory.events")).read_text().splitlines():
            key, value = line.split()
            if key == "oom_kill":
                return int(value)
    return 0


def _high_water(pid: int) -> int:
    """VmHWM of a process in bytes; 0 once it is gone."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def run_limited(
    command: Sequence[str],
    limit: int,
    *,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    capture: bool = True,
) -> Result:
    """Run `command` in a memory group of `limit` bytes and wait for it.

    Args:
        timeout: seconds after which the command is killed.
        capture: give stdout and stderr back; otherwise they go where ours go.

    Raises:
        CgroupError: no group can be made.
        subprocess.TimeoutExpired: the command took longer than `timeout`.
    """
    with memory_group(limit) as (version, group), contextlib.ExitStack() as stack:
        # Files and not pipes: what the command prints must not block it, whatever its size.
        out = stack.enter_context(tempfile.TemporaryFile("w+")) if capture else None
        err = stack.enter_context(tempfile.TemporaryFile("w+")) if capture else None
        began = time.monotonic()
        process = subprocess.Popen(
            ["/bin/sh", "-c", JOIN, str(group), *command], stdout=out, stderr=err, env=env, cwd=cwd
        )
        done = threading.Event()
        peaks = [0]

        def watch() -> None:
            while not done.wait(_SAMPLE_SECONDS):
                peaks[0] = max(peaks[0], *(_high_water(pid) for pid in [*_members(group), process.pid]))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            status = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            done.set()
            watcher.join()
        seconds = time.monotonic() - began
        texts = []
        for file in (out, err):
            if file is not None:
                file.seek(0)
            texts.append(file.read() if file is not None else "")
        return Result(
            status=status,
            limit=limit,
            cgroup_peak=_number(group / ("memory.max_usage_in_bytes" if version == 1 else "memory.peak")),
            peak_rss=peaks[0],
            oom_kills=_oom_kills(version, group),
            seconds=round(seconds, 3),
            stdout=texts[0],
            stderr=texts[1],
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run a command inside a memory cgroup.")
    parser.add_argument("--limit", required=True, type=parse_size, help="512MiB, 1GiB, or bytes")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    try:
        result = run_limited(args.command, args.limit, capture=False)
    except CgroupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts = {key: value for key, value in dataclasses.asdict(result).items() if key not in ("stdout", "stderr")}
    print(json.dumps(facts))
    return result.status if result.status >= 0 else 128 - result.status


if __name__ == "__main__":
    sys.exit(main())
