"""Nothing in the package starts an interpreter, a thread or code from a file but `process`; nothing prints but `cli/output`."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamconv

ROOT = Path(streamconv.__file__).parent

STARTS = {
    "subprocess", "multiprocessing", "pty", "runpy", "popen2", "Popen", "popen", "system", "fork", "forkpty", "posix_spawn", "posix_spawnp",
    "ProcessPoolExecutor", "ThreadPoolExecutor", "Thread", "Timer", "start_new_thread", "create_subprocess_exec", "create_subprocess_shell",
    "to_thread", "run_in_executor", "ThreadPool",
}  # fmt: skip
"""Names that start a process or a thread, and `os.exec*`, `os.spawn*`."""
RUNS = {"eval", "exec", "compile", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "unsafe_load", "full_load"}
"""Names that run code which a file brings."""
TALKS = {"print", "echo", "secho", "stdout", "stderr", "__stdout__", "__stderr__", "stdin", "input", "prompt", "confirm", "pause"}
"""Names that reach a terminal, or ask there."""
BUILTIN = {"eval", "exec", "compile", "input", "pause", "print", "prompt", "confirm"}
"""Methods of other things have these names, too."""
ALLOWED = {
    ("process.py", "STARTS"): {"subprocess", "Popen", "Thread"},
    ("run/pool.py", "STARTS"): {"Thread"},  # the type
    ("run/recorder.py", "STARTS"): {"Thread"},  # the type
    ("hub/push.py", "TALKS"): {"stderr"},  # whether somebody watches
    ("hub/repo.py", "TALKS"): {"stderr"},  # whether somebody watches
    ("cli/output.py", "TALKS"): {"print", "stdout", "stderr"},
    ("cli/ending.py", "TALKS"): {"stdout", "stderr"},  # flushed at the end
    ("calibration/child.py", "TALKS"): {"stdin", "stdout", "stderr"},  # pipes of parent and child
    ("progress.py", "TALKS"): {"stderr"},  # a program asked for it
    ("streams.py", "TALKS"): set(),
    ("process.py", "RUNS"): set(),
}


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node, ast.Name):
            yield "" if node.id in BUILTIN else node.id
        elif isinstance(node, ast.Attribute):
            plain = node.attr in BUILTIN and not (isinstance(node.value, ast.Name) and node.value.id in ("click", "builtins"))
            yield "" if plain else node.attr
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]


@functools.cache
def _all_names(code: str) -> frozenset[str]:
    return frozenset(_names(ast.parse(code)))


def _found(code: str, kind: str) -> set[str]:
    names = _all_names(code)
    more = {name for name in names if name.startswith(("execv", "execl", "spawnv", "spawnl"))} if kind == "STARTS" else set()
    return {*(names & globals()[kind]), *more}


@pytest.mark.parametrize("kind", ["STARTS", "RUNS", "TALKS"])
def test_only_the_one_place_does(kind: str) -> None:
    wrong = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if found := _found(path.read_text(), kind) - ALLOWED.get((name, kind), set()):
            wrong[name] = found
    assert not wrong


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("STARTS", "import subprocess"),
        ("STARTS", "from multiprocessing import Pool"),
        ("STARTS", "import os; os.execvp('x', [])"),
        ("STARTS", "import torch; torch.multiprocessing.spawn(f)"),
        ("STARTS", "from concurrent.futures import ThreadPoolExecutor"),
        ("RUNS", "import pickle"),
        ("RUNS", "exec(text)"),
        ("TALKS", "print(name)"),
        ("TALKS", "import sys; sys.stderr.write(name)"),
        ("TALKS", "click.confirm('run it?')"),
    ],
)
def test_the_rule_above_sees(kind: str, code: str) -> None:
    assert _found(code, kind)


def test_no_library_is_asked_to_run_the_code_of_a_model() -> None:
    """Every call that may, says that it must not."""
    loaders = {"from_pretrained", "from_config", "load_dataset", "for_model"}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and {getattr(node.func, "attr", ""), getattr(node.func, "id", "")} & loaders:
                trust = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                assert trust.get("trust_remote_code") is False, (path, node.lineno)
            if isinstance(node, ast.ImportFrom | ast.Import) and "transformers" in _names_of(node):
                assert path.name in ("pretrained.py", "run.py"), f"{path}: transformers has one door, calibration/pretrained.py"


def test_no_look_at_a_path_raises() -> None:
    """os.path.isdir() and its kin give False for a name that is too long, or that nobody may look at; those of pathlib raise OSError."""
    asks = {"is_dir", "is_file", "exists", "is_symlink", "is_fifo", "is_mount", "is_socket"}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in asks:
                assert ast.unparse(node.func.value) == "os.path", f"{path}:{node.lineno}"


def _names_of(node: ast.Import | ast.ImportFrom) -> set[str]:
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else {alias.name.split(".")[0] for alias in node.names}
