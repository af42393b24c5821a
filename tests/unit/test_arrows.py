"""The shape of the house: imports point one way, and the light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import streamconv

ROOT = Path(streamconv.__file__).parent
LEVELS = (
    ("errors", "options", "memory", "untrusted"),
    ("checkpoint",),
    ("quants", "families", "matching", "kernels", "fs", "ranges"),
    ("plan", "tables"),
    ("stages", "targets", "lock", "journal", "order", "resume", "results"),
    ("budget", "device", "manifest", "writer", "config_only", "tensorrt_llm_reader"),
    ("pool", "recipe", "hub", "calibrate"),
    ("planning",),
    ("api", "verify"),
    ("cli", "__main__"),
)
"""Rooms from the bottom up; a room imports from its own level and below (kernels and quants know each other)."""


def _level(module: str) -> int:
    room = module.split(".")[1] if "." in module else ""
    for level, rooms in enumerate(LEVELS):
        if room in rooms:
            return level
    raise AssertionError(f"{module} has no place in LEVELS")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("streamconv."):
            found.add(node.module)
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        if path.name == "__init__.py" and path.parent == ROOT:
            continue
        name = ".".join(("streamconv", *path.relative_to(ROOT).with_suffix("").parts))
        wrong += [f"{name} imports {other}" for other in _imports(path) if _level(other) > _level(name)]
    assert not [line for line in wrong if "stages.read imports streamconv.targets" not in line]


def test_no_rooms_without_a_purpose() -> None:
    names = {path.stem for path in ROOT.rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("command", [["--help"], ["convert", "--help"], ["list", "families"], ["list", "quants"]])
def test_light_commands_import_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from streamconv.cli.main import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'numba', 'numpy', 'transformers'} & set(sys.modules); print('heavy:', heavy, file=sys.stderr);"
        "sys.exit(bool(heavy) or status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
