"""Two clients with page caches of their own write one output in parts, at the same time.

    python -m tests.two_clients --outputs 50 [--in-place]
    python -m tests.two_clients --outputs 50 --stopped [--no-locks]

Parts alternate between the clients; a third look at the folder beneath tells what arrived. `--in-place` writes the pages that parts share
in place too: outputs then come out wrong, which shows that this test can fail.

`--stopped`: one client stops in the middle of a part, with pages that are not written back, and dies when the other has waited for it, or
has published. The locks of both are those of the folder beneath, as of a server that both see. `--no-locks` takes none: the pages of the
dead client then come over the output. Needs what `mirror` needs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from streamconv import api
from streamconv.errors import StreamconvError
from streamconv.options import Resources
from streamconv.publishing import finish
from streamconv.run import finalize, part_folder
from streamconv.run.fs import Disk
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.crash.world import snapshot, write_model

PARTS = 8
OPTIONS = TensorRTLLM(tp_size=2)


def _resources(**more: float) -> Resources:
    return Resources(memory_budget=4 << 30, workers=1, device="cpu", tile_rows=16, **more)  # type: ignore[arg-type]


@contextlib.contextmanager
def mounted(folder: Path, place: Path) -> Iterator[Path]:
    place.mkdir()
    server = subprocess.Popen([sys.executable, "-m", "tests.two_clients.mirror", str(folder), str(place)])
    try:
        until = time.monotonic() + 20
        while not os.path.ismount(place):
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit("the mirror could not be mounted")
            time.sleep(0.02)
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
        server.wait(20)


def _work(model: Path, out: Path, parts: list[int]) -> int:
    """A process that does parts on one client; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for part in parts:
            api.convert(model, out, OPTIONS, _resources(parts=PARTS, part=part, no_lock=True))
        status = 0
    except BaseException as error:
        print(f"{out}: {error}", flush=True)
    finally:
        os._exit(status)


class _Beneath(Disk):
    """Locks are taken in the folder that both clients show.

    Args:
        stop: before so many writes of tiles the process stops; 0 never does.
    """

    def __init__(self, mount: Path, beneath: Path, locks: bool, stop: int = 0) -> None:
        self.mount, self.beneath, self.locks, self.left = str(mount), str(beneath), locks, stop
        self.held: dict[int, int] = {}

    def _twin(self, fd: int) -> int:
        if fd not in self.held:
            self.held[fd] = os.open(os.readlink(f"/proc/self/fd/{fd}").replace(self.mount, self.beneath, 1), os.O_RDWR)
        return self.held[fd]

    def lock_range(self, fd: int, begin: int, end: int) -> None:
        if self.locks:
            super().lock_range(self._twin(fd), begin, end)

    def locked(self, fd: int, begin: int) -> bool:
        return self.locks and super().locked(self._twin(fd), begin)

    def lock(self, fd: int) -> None:
        if self.locks:
            super().lock(self._twin(fd))

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if self.left and len(data) > 1024:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGSTOP)
        return super().pwrite(fd, data, offset)

    def push(self, fd: int, offset: int, size: int) -> None:
        """Nothing: what the client holds stays there."""

    def close(self, fd: int) -> None:
        super().close(fd)  # and writes back what it holds
        if fd in self.held:
            os.close(self.held.pop(fd))


def _stopped(model: Path, right: dict[str, bytes | None], root: Path, number: int, locks: bool) -> str:
    """What is wrong with an output after one of two clients stopped in the middle of a part."""
    beneath = root / f"shared{number}"
    beneath.mkdir()

    def work(mount: Path, stop: int = 0) -> int:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                disk = _Beneath(mount, beneath, locks, stop)
                api.convert(model, mount / "out", OPTIONS, _resources(parts=PARTS, wait=60.0), disk=disk)
                status = 0
            except BaseException as error:
                print(f"{mount}: {error}", flush=True)
            finally:
                os._exit(status)
        return pid

    with mounted(beneath, root / f"a{number}") as one, mounted(beneath, root / f"b{number}") as other:
        first = work(one, stop=20 + number % 7)
        if not os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1]):
            return "the first client did not stop"
        second = work(other)
        until = time.monotonic() + 3
        while time.monotonic() < until and not (beneath / "out").exists():
            time.sleep(0.02)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        if os.waitpid(second, 0)[1]:
            return "the second client failed"
    found = snapshot(beneath / "out")
    wrong = sum(a != b for name in right for a, b in zip(right[name] or b"", found.get(name) or b"", strict=False))
    return "" if found == right else f"{wrong} bytes differ"


def _one(model: Path, right: dict[str, bytes | None], root: Path, number: int) -> str:
    """What is wrong with an output of two clients."""
    beneath = root / f"shared{number}"
    beneath.mkdir()
    with mounted(beneath, root / f"a{number}") as one, mounted(beneath, root / f"b{number}") as other:
        first = _work(model, one / "out", [0])  # one begins: the mirror's locks do not reach the other client
        if os.waitpid(first, 0)[1]:
            return "the first part failed"
        both = [_work(model, one / "out", [*range(2, PARTS, 2)]), _work(model, other / "out", [*range(1, PARTS, 2)])]
        ended = [os.waitpid(pid, 0)[1] for pid in both]
    try:
        finish(beneath / "out")  # what the clients have synced is there
    except StreamconvError as error:
        return f"{error} (the clients ended with {ended})"
    found = snapshot(beneath / "out")
    wrong = sum(a != b for name in right for a, b in zip(right[name] or b"", found.get(name) or b"", strict=False))
    return "" if found == right else f"{wrong} bytes differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=50)
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--stopped", action="store_true")
    parser.add_argument("--no-locks", action="store_true")
    given = parser.parse_args()
    wrong = 0
    if given.in_place:  # before the workers are forked
        part_folder.own_pages = finalize.own_pages = lambda ranges, size, page: list(ranges)
    with tempfile.TemporaryDirectory(prefix="two-clients-") as name:
        root = Path(name)
        model = write_model(root / "model", hidden=128, layers=2)
        api.convert(model, root / "right", OPTIONS, _resources())
        right = snapshot(root / "right")
        for number in range(given.outputs):
            problem = _stopped(model, right, root, number, not given.no_locks) if given.stopped else _one(model, right, root, number)
            wrong += bool(problem)
            if problem:
                print(f"output {number}: {problem}", flush=True)
    how = " after a client had stopped" * given.stopped + " with shared pages written in place" * given.in_place
    how += " without locks" * given.no_locks
    print(f"{wrong} of {given.outputs} outputs wrong{how}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
