"""How streamconv starts interpreters and threads, and what an interpreter may import from: the only place that does either.

A downloaded model brings files with any name, `json.py` among them. No interpreter that streamconv starts imports from the current
folder, the model or the output; PYTHONPATH and PYTHONSTARTUP of the user do not reach it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

_PACKAGE = Path(__file__).parent

_FILES = 1 << 16
"""More open files than a checkpoint has on both sides."""

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG

_START = """
import sys
folder, module, *more = sys.argv[1:]
sys.path += more
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("streamconv", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["streamconv"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["streamconv"])
from importlib import import_module
import_module(module).main()
"""
"""Loads this very package, wherever it lies, without the folder around it.

`-I` and `-c` leave the current folder out (Python 3.10 has no `-P`)."""


def import_path(kept_out: Iterable[Path] = ()) -> list[str]:
    """The entries of `sys.path` to import from: without relative ones, the current folder, and `kept_out`."""
    out = {os.path.realpath(folder) for folder in kept_out}
    with contextlib.suppress(OSError):  # a current folder that was removed
        out.add(os.path.realpath(os.getcwd()))
    return [entry for entry in sys.path if os.path.isabs(entry) and os.path.realpath(entry) not in out]


def start_interpreter(module: str, kept_out: Iterable[Path]) -> subprocess.Popen[str]:
    """A Python of its own that runs `main` of a module of streamconv, isolated, with pipes for standard input and output.

    SIGINT does not reach it: a terminal sends that to parent and child, and the parent ends the child.

    Args:
        kept_out: folders that nothing is imported from, beside the current one.
    """
    import subprocess

    utf8 = f"utf8={sys.flags.utf8_mode}"
    command = [sys.executable, "-I", "-X", utf8, "-c", _START, str(_PACKAGE), module, *import_path(kept_out)]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_JOIN = 'echo $$ > "$0" && exec "$@"'
"""A shell that joins a cgroup and becomes the command: none of it runs outside."""


def start_command(words: Sequence[str], log: Path, group: Path | None = None) -> subprocess.Popen[bytes]:
    """A command of the user's, without a shell of its own; what it prints goes to a file.

    Args:
        group: `cgroup.procs` of the cgroup that it runs in.
    """
    import subprocess

    joined = ["/bin/sh", "-c", _JOIN, str(group), *words] if group is not None else [*words]
    with log.open("wb") as file:
        return subprocess.Popen(joined, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


def start_thread(target: Callable[..., None], name: str, *arguments: object) -> threading.Thread | None:
    """A daemon thread that runs; None if the system gives no more (a limit of processes or of address space)."""
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def raise_file_limit() -> bool:
    """Raise the soft limit of open files to the hard one; False if that changes nothing."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError):
        return False
    return True


def die_with_parent() -> None:
    """End this process when the one that started it ends."""
    import ctypes

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
