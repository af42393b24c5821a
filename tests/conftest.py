"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from streamconv.kernels.cache import Code

with contextlib.suppress(ImportError):  # the GPU tests do without
    from hypothesis import HealthCheck, settings

    settings.register_profile("anywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine, too
    settings.load_profile("anywhere")

for _name in list(os.environ):  # what the user keeps for his own work with the Hub and with streamconv
    if _name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "STREAMCONV_")):
        del os.environ[_name]


@pytest.fixture(autouse=True)
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs inside this process: pytest and what other tests loaded are no part of streamconv. That a budget is a ceiling is
    shown by tests/e2e/test_memory*.py, in processes and memory cgroups of their own."""
    from streamconv import memory

    real = memory.resident
    monkeypatch.setattr(memory, "resident", lambda: min(real(), 200 * memory.MIB))


@pytest.fixture(autouse=True, scope="session")
def every_kernel_is_kept() -> None:
    """Machine code that needs something of the compiler's process is compiled again in every run, which takes seconds."""
    from streamconv.kernels import jit

    real = jit.kept

    def kept(name: str, types: str, compile_it: Callable[[], Code]) -> Code:
        code = real(name, types, compile_it)
        assert code.alone, name
        return code

    jit.kept = kept


@pytest.fixture(autouse=True, scope="session")
def no_disk_is_waited_for() -> None:
    """What fsync makes durable shows only when the power fails; tests/crash works that out from the order of the calls. Waiting for a disk
    took a third of a conversion's time. Files that are not open are still told, and processes of their own wait as ever."""

    def told(fd: int) -> None:
        os.fstat(fd)

    os.fsync = os.fdatasync = told


_threads: list[int] = []


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> None:
    """torch's threads beside those of the other test processes cost twice the processor time of one: they wait for each other. Calibration
    keeps them: its sums are held against those of processes of their own, which are as a user's."""
    torch = sys.modules.get("torch")
    if torch is not None:
        _threads[:] = _threads or [torch.get_num_threads()]
        torch.set_num_threads(_threads[0] if "calibrate" in request.path.parts else 1)


@pytest.fixture(scope="session")
def golden_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `inputs/<model>/` for every golden model, made once; go there to use the cases' relative paths."""
    from tests.golden import generate  # here, so that a run without golden tests does not pay for torch

    root = tmp_path_factory.mktemp("golden")
    for spec in generate.load_specs():
        generate.generate(spec, root / "inputs")
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Calibration loads transformers into this process; tests that hold the process to a memory budget come before it."""
    items.sort(key=lambda item: "calibrate" in item.path.parts)
