"""Commands in processes of their own that start at once: an interpreter that has loaded what they need, torch excepted, forks for each.

A start costs a hundredth of a second instead of half of one. What such a process is, is what `python -m` or `python -c` would be: its
environment, folder, output and end are its own. Tests of how an interpreter starts take a real one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamconv

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("numpy", "yaml", "safetensors.numpy", "asyncio", "filelock", "tqdm.auto", "typing_extensions", "fsspec", "httpx", "httpx2")
"""What huggingface_hub needs, as far as it is there; that itself reads its variables when it is loaded, and a command sets some before."""
LEFT = ("calibration", "device", "kernels.compiler", "kernels.fault_code", "__main__")
"""Of streamconv, what wants torch, numba, or to be the command."""


def run(arguments: list[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, which begin with -m or -c; standard input is empty."""
    with tempfile.TemporaryDirectory() as place:
        out, err = (os.path.join(place, name) for name in ("out", "err"))
        folder = str(cwd or Path.cwd())
        told = {"arguments": arguments, "cwd": folder, "env": dict(os.environ if env is None else env), "files": [out, err]}
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(told), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        shown = [Path(path).read_text() for path in (out, err)]
    return subprocess.CompletedProcess([sys.executable, *arguments], status, *shown)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for this process; with its children it goes when this process does."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.warm"]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    atexit.register(_end, made)
    return made


def _end(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None and server.stdout is not None
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    server.stdin.close()
    server.stdout.close()


def _forked() -> tuple[str, str]:
    """Serve until a line asks for a command; gives it to the child, which is to run it. At the end of the lines the process ends."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _become(told: dict[str, Any]) -> tuple[str, str]:
    null = os.open(os.devnull, os.O_RDONLY)
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for path in told["files"]]
    for number, fd in enumerate((null, *files)):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    how, what, *more = told["arguments"]
    sys.argv = ["-c" if how == "-c" else what, *more]
    return how, what


def _load() -> None:
    ours = [info.name for info in pkgutil.walk_packages(streamconv.__path__, "streamconv.")]
    for name in (*OTHERS, *(name for name in ours if not name.partition(".")[2].startswith(LEFT))):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    _load()
    assert not {"torch", "numba", "huggingface_hub"} & sys.modules.keys()
    _how, _what = _forked()
    if _how == "-m":
        runpy.run_module(_what, run_name="__main__", alter_sys=True)
    else:
        exec(_what, {"__name__": "__main__"})
