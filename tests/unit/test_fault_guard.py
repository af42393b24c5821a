"""Missing pages of guarded mappings are zeros and noted; every other SIGBUS goes where it went before."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys

import pytest

from streamconv.checkpoint.fault_guard import MOST, FaultGuard, known_platform

pytestmark = pytest.mark.skipif(not known_platform(), reason="mappings are not guarded here")
PAGE = mmap.PAGESIZE

WORLD = """
import ctypes, faulthandler, mmap, os, signal, sys
import numpy as np
from streamconv.checkpoint.fault_guard import FaultGuard
from streamconv.kernels.fault import handler

def cut(pages=4):
    fd = os.memfd_create("cut")
    os.ftruncate(fd, pages * mmap.PAGESIZE)
    mapped = mmap.mmap(fd, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    os.ftruncate(fd, mmap.PAGESIZE)
    data = np.frombuffer(mapped, np.uint8)
    return data, data.__array_interface__["data"][0]

def guarded(guard):
    data, at = cut()
    slot = guard.take(at, at + data.size)
    assert data[0] == 0 and not slot.hit
    assert not data.any() and slot.hit == at + 3 * mmap.PAGESIZE
    guard.release(slot)

faulthandler.disable()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WORLD + code], capture_output=True, text=True)


def test_pages_that_are_gone_are_zeros() -> None:
    done = run("with FaultGuard(*handler()) as guard:\n  guarded(guard)\n  guarded(guard)\nprint('through')")
    assert (done.returncode, done.stdout) == (0, "through\n"), done.stderr


def test_without_the_guard_it_ends_the_process() -> None:
    """What the guard is for, and proof that the test above can fail."""
    assert run("data, _ = cut(); data.sum()").returncode == -signal.SIGBUS


ENDS = {
    "not ours": "with FaultGuard(*handler()) as guard:\n  guarded(guard)\n  cut()[0].sum()",
    "after it was released": (
        "with FaultGuard(*handler()) as guard:\n  data, at = cut()\n  guard.release(guard.take(at, at + data.size))\n  data.sum()"
    ),
    "after the guard": "with FaultGuard(*handler()) as guard:\n  guarded(guard)\ncut()[0].sum()",
    "sent": "with FaultGuard(*handler()) as guard:\n  os.kill(os.getpid(), signal.SIGBUS)\n  import time; time.sleep(9)",
}


@pytest.mark.parametrize(("case", "told"), [(case, True) for case in ENDS] + [("not ours", False), ("sent", False)])
def test_others_go_to_the_handler_before(case: str, told: bool) -> None:
    done = run(("faulthandler.enable()\n" if told else "") + ENDS[case])
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == told, done.stderr


def test_what_was_ignored_stays_ignored() -> None:
    code = "signal.signal(signal.SIGBUS, signal.SIG_IGN)\nwith FaultGuard(*handler()) as guard:\n  os.kill(os.getpid(), signal.SIGBUS)\n"
    done = run(code + "  guarded(guard)\n  print('through', flush=True)\n  cut()[0].sum()")
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "through\n"), done.stderr


def test_a_handler_that_goes_on_is_called_each_time() -> None:
    """As of another library that guards mappings of its own."""
    done = run("""
caught = []
signal.signal(signal.SIGBUS, lambda number, frame: caught.append(number))
with FaultGuard(*handler()) as guard:
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGBUS)
    guarded(guard)
print(len(caught), signal.getsignal(signal.SIGBUS) is not signal.SIG_DFL)
""")
    assert (done.returncode, done.stdout) == (0, "3 True\n"), done.stderr


def test_a_handler_that_came_later_is_left_alone() -> None:
    """It may go on to ours: with nothing guarded that goes on to the old one, and no circle comes of entering again."""
    enter = "with FaultGuard(*handler()) as guard:\n  "
    done = run(f"{enter}faulthandler.enable()\n{enter}guarded(guard)\n  cut()[0].sum()")
    assert done.returncode == -signal.SIGBUS and "Bus error" in done.stderr, done.stderr


def test_many_threads_and_guards() -> None:
    done = run("""
import threading
wrong = []
def work():
    try:
        for _ in range(50):
            with FaultGuard(*handler()) as guard:
                guarded(guard)
    except BaseException as error:
        wrong.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(wrong, flush=True)
cut()[0].sum()  # the old handler is back
""")
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "[]\n"), done.stderr


def test_more_than_fit_are_not_guarded() -> None:
    from streamconv.kernels.fault import handler

    with FaultGuard(*handler()) as guard:
        slots = [guard.take(PAGE * number, PAGE * number + 1) for number in range(1, MOST + 1)]
        assert None not in slots and guard.take(1, 2) is None
        for slot in slots:
            assert slot is not None
            guard.release(slot)
        again = guard.take(1, 2)
        assert again is not None
        guard.release(again)
