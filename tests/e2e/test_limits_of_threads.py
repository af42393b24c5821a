"""A system that gives no more threads or memory: fewer threads do the same work, and none at all is told of in a line."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from streamconv.cli import ending
from streamconv.cli.main import main
from tests import tiny


def _limit(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    real, left = threading.Thread.start, [count]

    def start(self: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("threads", [0, 1, 2, 3])
def test_few_threads(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write(tmp_path / "model")
    assert main(["convert", str(model), str(tmp_path / "right"), "--quiet"]) == 0
    _limit(monkeypatch, threads)
    status = main(["convert", str(model), str(tmp_path / "out"), "--workers", "4", "--quiet"])
    if threads < 2:  # the journal's is the first
        assert status == 5 and "no thread can be started" in capsys.readouterr().err
        return
    assert status == 0
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() == (tmp_path / "right" / "rank0.safetensors").read_bytes()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(12, "Cannot allocate memory"), OSError(11, "x"), RuntimeError("can't start new thread"),
     ImportError("x.so: failed to map segment from shared object")],
)  # fmt: skip
def test_a_lack_is_a_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise error

    assert ending.status_of(command, as_json=False) == 5
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(5, "x"), ImportError("x"), ValueError()])
def test_what_is_no_lack_is_raised(error: Exception) -> None:
    def command() -> int:
        raise error

    with pytest.raises(type(error)):
        ending.status_of(command, as_json=False)


def test_a_signal_without_a_thread_for_its_watchdog(tmp_path: Path) -> None:
    code = (
        "import os, signal, threading\n"
        "from streamconv.cli import ending\n"
        "def start(self): raise RuntimeError(\"can't start new thread\")\n"
        "threading.Thread.start = start\n"
        "ending.run(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "error: stopped by SIGTERM\n")


def test_an_interruption_that_something_swallows_is_the_status_all_the_same(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored, where the tests run in the background
        "from streamconv.cli import ending\n"
        "def command():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException: pass\n"
        "    return 7\n"
        "ending.run(command)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 130


@pytest.mark.parametrize("kilobytes", [400_000, 700_000])
def test_a_limit_of_address_space_is_no_traceback(kilobytes: int, tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model")
    words = [sys.executable, "-m", "streamconv", "convert", str(model), str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(["sh", "-c", f'ulimit -v {kilobytes}; exec "$@"', "sh", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode in (0, 5) and "Traceback" not in done.stderr, done.stderr
