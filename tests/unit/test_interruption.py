"""A signal is never taken for the failure of the work that it stopped."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.cli.main import main
from streamconv.errors import Interrupted, StreamconvError
from tests import tiny

ROOT = Path(streamconv.__file__).parent
WIDE = {"BaseException", "KeyboardInterrupt", "Interrupted", "GeneratorExit", "SystemExit"}
THREADS = {("pool.py", "_work"), ("recorder.py", "_work")}
"""What a thread runs: Python delivers signals to the main thread only, and `run` raises there what these met."""


def test_an_interruption_is_no_failure() -> None:
    assert not issubclass(Interrupted, Exception) and not issubclass(Interrupted, StreamconvError)
    assert [Interrupted("", signum=number).exit_status for number in (2, 15)] == [130, 143]


def _names(node: ast.AST | None) -> set[str]:
    return {"BaseException"} if node is None else {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} | {
        each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)
    }


def _leaves(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that leave a `finally` block and so drop the exception on its way."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return | ast.Break | ast.Continue):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.Lambda | ast.For | ast.While):
            yield from _leaves(child)


def _swallowing(tree: ast.AST, path: Path) -> Iterator[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    threads = {id(inner) for f in functions if (path.name, f.name) in THREADS for inner in ast.walk(f)}
    for node in ast.walk(tree):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler) and _names(node.type) & WIDE and id(node) not in threads and path.parent.name != "cli":
            last = node.body[-1]
            if not (isinstance(last, ast.Raise) and last.exc is None):
                yield f"{where} catches {sorted(_names(node.type) & WIDE)} and does not raise it again"
        if isinstance(node, ast.Try) and any(list(_leaves(ast.Module([each], []))) for each in node.finalbody):
            yield f"{where} leaves a finally block"
        if isinstance(node, ast.Call) and "suppress" in _names(node.func) and any(_names(each) & WIDE for each in node.args):
            yield f"{where} suppresses an interruption"
        if isinstance(node, ast.FunctionDef) and node.name in ("__exit__", "__del__"):
            returned = [each for each in ast.walk(node) if isinstance(each, ast.Return) and each.value is not None]
            if node.name == "__del__" or returned:
                yield f"{where} {node.name} may swallow an interruption"


def test_no_except_catches_an_interruption() -> None:
    assert not [line for path in sorted(ROOT.rglob("*.py")) for line in _swallowing(ast.parse(path.read_text()), path)]


@pytest.mark.parametrize(
    "code",
    [
        "try: f()\nexcept BaseException: g()",
        "try: f()\nexcept: g()",
        "try: f()\nexcept (OSError, KeyboardInterrupt) as e: print(e)",
        "def h():\n for x in y:\n  try: f()\n  finally: return 1",
        "with contextlib.suppress(BaseException): f()",
    ],
)
def test_the_rule_above_sees(code: str) -> None:
    assert list(_swallowing(ast.parse(code), ROOT / "x.py"))


COMMANDS = {
    "verify": ["verify", "OUT"],
    "verify the source": ["verify", "OUT", "--source", "MODEL"],
    "plan": ["plan", "MODEL", "--quant", "int8", "--target-sm", "80"],
    "inspect": ["inspect", "MODEL"],
    "convert": ["convert", "MODEL", "NEW", "--workers", "1"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_read_ends_a_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from streamconv.checkpoint.shard import Shard

    model = tiny.write(tmp_path / "model")
    assert main(["convert", str(model), str(tmp_path / "out"), "--quiet"]) == 0
    places = {"OUT": tmp_path / "out", "MODEL": model}
    calls, at = 0, 0

    def step(real: Any) -> Any:
        def stepped(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Interrupted("stopped by SIGTERM", signum=15)
            return real(*arguments)

        return stepped

    for method in ("fileno", "_fill"):  # every look into a file
        monkeypatch.setattr(Shard, method, step(getattr(Shard, method)))
    def run() -> int:
        nonlocal calls
        calls = 0
        return main([str((places | {"NEW": tmp_path / f"new{at}"}).get(word, word)) for word in COMMANDS[name]])

    assert run() == 0
    total = calls
    assert total > 2
    for at in sorted({1, 2, 3, total // 2, total - 1, total}):
        capsys.readouterr()
        assert run() == 143, at
        told = capsys.readouterr()
        assert told.err.strip().splitlines()[-1].startswith("error: stopped by SIGTERM") and "good" not in told.out
