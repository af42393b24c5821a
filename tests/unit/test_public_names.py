"""What `import streamconv` offers and loads."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import streamconv

PUBLIC = {
    *("open", "plan", "convert", "verify", "diff", "calibrate", "TensorRTLLM", "Resources", "Output"),
    *("Checkpoint", "LazyTensor", "Plan", "Report", "Verdict", "Comparison", "CalibrationReport", "Progress"),
    *("StreamconvError", "UsageError", "CheckpointError", "HeaderError",
    "HuggingFace", "SourceChangedError", "UnreadableError", "TensorError"),
    *("RefusedError", "BudgetError", "OutputError", "LockedError", "ResumeError", "VerifyError", "DataError", "HubError", "Interrupted"),
}
HEAVY = {"numpy", "torch", "click", "numba", "huggingface_hub", "transformers", "psutil", "safetensors"}


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_these_names_and_no_others() -> None:
    assert len(streamconv.__all__) == len(PUBLIC) and set(streamconv.__all__) == PUBLIC
    fresh = _python("import streamconv; print(*(name for name in dir(streamconv) if not name.startswith('_')))")
    assert set(fresh.split()) == PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = getattr(streamconv, "nothing")  # noqa: B009


def test_type_checkers_see_what_python_gives() -> None:
    """The imports under TYPE_CHECKING and the table at run time say the same of every name."""
    declared: dict[str | None, tuple[str | None, str]] = {}
    for node in ast.walk(ast.parse(Path(streamconv.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streamconv."):
            declared |= {alias.asname: (node.module, alias.name) for alias in node.names}
    assert declared.keys() == PUBLIC
    for name, (module, inner) in declared.items():
        assert getattr(streamconv, str(name)) is getattr(importlib.import_module(str(module)), inner), name


def test_all_errors_are_public() -> None:
    from streamconv import errors

    told = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, BaseException) and name[0] != "_"}
    assert told <= PUBLIC


def test_no_module_bears_a_public_name() -> None:
    """`import streamconv.x` anywhere would put the module in the place of the function x."""
    root = Path(streamconv.__file__).parent
    modules = {path.stem for path in root.glob("*.py")} | {path.parent.name for path in root.glob("*/*.py")}
    assert not modules & PUBLIC


def test_import_loads_nothing() -> None:
    assert _python("import streamconv, sys; print(*sorted(name for name in sys.modules if name.startswith('streamconv')))") == "streamconv"
    loaded = _python("import streamconv, sys; print(*sys.modules)").split()
    assert not HEAVY & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_name_loads_nothing_heavy(name: str) -> None:
    loaded = _python(f"import streamconv, sys; streamconv.{name}; print(*sys.modules)").split()
    assert not {"numpy", "torch", "click", "numba", "transformers"} & {module.split(".")[0] for module in loaded}


def test_every_public_thing_is_documented() -> None:
    for name in PUBLIC - {"TensorRTLLM"}:
        value = getattr(streamconv, name)
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name  # a dataclass without a docstring gets its signature
    for name in ("open", "plan", "convert", "verify", "calibrate"):
        function = getattr(streamconv, name)
        told = inspect.getdoc(function) or ""
        assert "Args:" in told and "Raises:" in told
        assert all(f"    {given}: " in told for given in inspect.signature(function).parameters), function
